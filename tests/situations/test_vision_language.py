"""Adapters on models of pictures and text, whose language part is called with embeddings and not with token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tr
from peft import PeftModel
from torch import Tensor

from peft_baft import prompt_lengths
from peft_baft.adapter import baft_layers
from side_by_side import METHODS, adapted

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


@pytest.mark.parametrize("method", METHODS)
@each_model
def test_cached_generation_is_one_forward_over_prompt_and_answer(
    name: str, method: str, tokens: Tensor
) -> None:
    base = tiny(name)
    unedited = base(input_ids=tokens).logits
    model = adapted(method, base)
    if method == "baft":
        assert all("language_model.layers" in layer.name for layer in baft_layers(model))
    sequences, logits = answer(model, tokens, torch.ones_like(tokens))
    lengths = {"prompt_lengths": [tokens.shape[1]] * 2} if method == "baft" else {}
    with torch.no_grad():
        whole = model(input_ids=sequences, **lengths).logits
    torch.testing.assert_close(whole[:, 6:-1], logits, atol=1e-4, rtol=1e-4)
    # The control: the adapter does something.
    assert (whole[:, 6] - unedited[:, 6]).abs().max() > 0.01


@each_model
def test_labels_and_stated_lengths_edit_the_same_tokens_and_padding_none(
    name: str, tokens: Tensor
) -> None:
    model = adapted("baft", tiny(name))
    labels = tokens.clone()
    labels[:, :4] = -100
    with torch.no_grad():
        by_labels = model(input_ids=tokens, labels=labels).logits
        with prompt_lengths(model, [4, 4]):
            stated = model(input_ids=tokens).logits
        other = model(input_ids=tokens, prompt_lengths=[7, 7]).logits
    torch.testing.assert_close(by_labels, stated)
    assert (other - stated).abs().max() > 0.01

    short = tokens[:1, 3:]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1)
    batch, mask = torch.cat([padded, tokens[1:]]), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    _, together = answer(model, batch, mask)
    _, single = answer(model, short, torch.ones_like(short))
    torch.testing.assert_close(together[:1], single, atol=1e-4, rtol=1e-4)


@each_model
def test_an_adapter_that_is_saved_is_the_same_after_loading(
    name: str, tokens: Tensor, tmp_path: Any
) -> None:
    model = adapted("baft", tiny(name))
    model.save_pretrained(str(tmp_path))
    with torch.no_grad():
        edited = model(input_ids=tokens).logits
        loaded = PeftModel.from_pretrained(tiny(name), str(tmp_path)).eval()
        assert torch.equal(loaded(input_ids=tokens).logits, edited)
