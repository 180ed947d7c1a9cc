"""LoRA, IA3 and BaFT on the same tiny model, for situations in which every PEFT method has to give the right result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import torch
from packaging.version import Version
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn

from conftest import make_model
from peft_baft import BaftConfig

# PEFT 0.20 asks a tuner nothing when it loads tensors into an adapter that is attached: docs/versions.md says what that means.
OLD_PEFT = Version(peft.__version__) < Version("0.21")
# How each method's config is made; `settings` are those that PEFT's configs have in common, such as modules_to_save.
METHODS: dict[str, Callable[..., PeftConfig]] = {
    "lora": lambda **settings: LoraConfig(r=2, target_modules=["q_proj", "down_proj"], **settings),
    "ia3": lambda **settings: IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], **settings
    ),
    "baft": lambda **settings: BaftConfig(r=4, gate_offset=0.0, **settings),
}


def config_of(method: str, **settings: Any) -> PeftConfig:
    """Make a method's config for a causal language model."""
    return METHODS[method](**{"task_type": "CAUSAL_LM", **settings})


def draw_adapter(model: nn.Module, adapter_name: str = "default", seed: int = 1) -> None:
    """Give one adapter, and its copies of saved modules, random values, so that it visibly changes the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if f".{adapter_name}" not in name or "basis" in name:
                continue
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            if "modules_to_save" in name:
                parameter.add_(0.3 * noise)
            elif "ia3_" in name:
                parameter.copy_(1 + 0.5 * noise)
            else:
                parameter.copy_(0.3 * noise)


def adapted(
    method: str,
    base: nn.Module | None = None,
    adapter_name: str = "default",
    seed: int = 1,
    **settings: Any,
) -> PeftModel:
    """Make a model with one adapter of a method that visibly changes its logits, in evaluation mode.

    Args:
        base: the model to adapt, a fresh tiny Llama if it is left out.
    """
    base = make_model() if base is None else base
    model = get_peft_model(base, config_of(method, **settings), adapter_name=adapter_name)  # type: ignore[arg-type]
    draw_adapter(model, adapter_name, seed)
    return model.eval()
