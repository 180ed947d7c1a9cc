"""Tiny models of pictures and text, and what they answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tr
from torch import Tensor

TEXT: dict[str, Any] = {
    "vocab_size": 240,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
IMAGE, START, END, VIDEO = 239, 238, 237, 236  # token ids that stand for pictures


def llava() -> Any:
    config = tr.LlavaConfig(
        text_config=tr.LlamaConfig(**TEXT),
        vision_config=tr.CLIPVisionConfig(projection_dim=16, **VISION),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    return tr.LlavaForConditionalGeneration(config)


def gemma3() -> Any:
    text = tr.Gemma3TextConfig(sliding_window=32, query_pre_attn_scalar=8, **TEXT)
    config = tr.Gemma3Config(
        text_config=text,
        vision_config=tr.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    return tr.Gemma3ForConditionalGeneration(config)


def qwen2_5_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = tr.Qwen2_5_VLConfig(
        text_config={k: v for k, v in TEXT.items() if k != "head_dim"} | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return tr.Qwen2_5_VLForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {"llava": llava, "gemma3": gemma3, "qwen2_5_vl": qwen2_5_vl}
each_model = pytest.mark.parametrize("name", MODELS)


def tiny(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    model.generation_config.eos_token_id = None
    return model


def answer(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Four greedy tokens; the whole sequences, and the logits of those tokens."""
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences, torch.stack(out.logits, 1)
