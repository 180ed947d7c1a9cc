"""What tests share: tiny random models of every supported architecture."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# What memories measure of a base model is kept for the run, apart from the user's own.
os.environ["PEFT_BAFT_CACHE"] = _KEPT = tempfile.mkdtemp(prefix="peft_baft-tests-")
atexit.register(shutil.rmtree, _KEPT, ignore_errors=True)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models are slower on several threads

import pytest
import torch
import transformers as tr
from torch import nn

from peft_baft.running import cache_parameter

VOCABULARY, WIDTH, DEPTH = 64, 32, 4
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": WIDTH,
    "n_layer": DEPTH,
    "n_head": 4,
    "n_positions": 64,
}
_GPT_SHAPE |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_NO_KV: dict[str, Any] = {k: v for k, v in _SHAPE.items() if k != "num_key_value_heads"}
_WINDOW: dict[str, Any] = {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}

ARCHITECTURES = {
    "llama": lambda: tr.LlamaForCausalLM(tr.LlamaConfig(**_SHAPE)),
    "mistral": lambda: tr.MistralForCausalLM(tr.MistralConfig(sliding_window=4, **_SHAPE)),
    "qwen2": lambda: tr.Qwen2ForCausalLM(tr.Qwen2Config(**_SHAPE)),
    "qwen3": lambda: tr.Qwen3ForCausalLM(tr.Qwen3Config(head_dim=8, **_SHAPE)),
    "gemma2": lambda: tr.Gemma2ForCausalLM(tr.Gemma2Config(**_WINDOW, **_SHAPE)),
    "gemma3": lambda: tr.Gemma3ForCausalLM(tr.Gemma3TextConfig(**_WINDOW, **_SHAPE)),
    "phi3": lambda: tr.Phi3ForCausalLM(tr.Phi3Config(**_SHAPE)),
    "gpt2": lambda: tr.GPT2LMHeadModel(tr.GPT2Config(**_GPT_SHAPE)),
    "gpt_neox": lambda: tr.GPTNeoXForCausalLM(tr.GPTNeoXConfig(**_NO_KV)),
    "opt": lambda: tr.OPTForCausalLM(
        tr.OPTConfig(
            ffn_dim=48,
            word_embed_proj_dim=WIDTH,
            **{k: v for k, v in _NO_KV.items() if k != "intermediate_size"},
        )
    ),
    "falcon": lambda: tr.FalconForCausalLM(tr.FalconConfig(**_NO_KV)),
    "bloom": lambda: tr.BloomForCausalLM(
        tr.BloomConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            n_layer=DEPTH,
            n_head=4,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    ),
}


def make_model(architecture: str = "llama", seed: int = 0) -> tr.PreTrainedModel:
    """A tiny random model of `architecture`, in evaluation mode, with weights large enough to make its layers matter."""
    torch.manual_seed(seed)
    model = ARCHITECTURES[architecture]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    model.generation_config.eos_token_id = None  # tests compare fixed numbers of tokens
    return model


def cache_of(outputs: Mapping[str, Any]) -> tr.Cache:
    """The cache in what a model or `generate` gives, whatever this version of transformers calls it."""
    return next(value for value in outputs.values() if isinstance(value, tr.Cache))


def with_cache(model: nn.Module, cache: tr.Cache | None) -> dict[str, Any]:
    """The cache as a keyword argument of this version of transformers."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {cache_parameter(base): cache}


def randomise(model: nn.Module, scale: float = 1.0, seed: int = 1) -> None:
    """Give every adapter in `model` a random update, so that it visibly edits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".baft_source." in name:
                parameter.add_(
                    torch.randn(parameter.shape, generator=generator).to(parameter) * scale
                )


@pytest.fixture
def tally(record_property: Callable[[str, str], None]) -> Callable[..., None]:
    """Puts counts into the table of what was killed, corrupted and counted: `scripts/safety.py` adds them up."""
    return lambda what, **counts: record_property("tally", json.dumps([what, counts]))


@pytest.fixture
def tokens() -> torch.Tensor:
    """Two prompts of seven tokens, (2, 7)."""
    return torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))
