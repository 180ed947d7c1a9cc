"""Adapters that are made or loaded while torch's default dtype is another one, as many scripts set it for the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from conftest import make_model
from default_dtypes import DTYPES, default_dtype
from side_by_side import METHODS, adapted, config_of


@pytest.mark.parametrize("of_base", ["default", torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_attached_and_trained(
    method: str, dtype: torch.dtype, of_base: str | torch.dtype, tokens: Tensor
) -> None:
    base: Any = make_model()
    base.to(dtype if of_base == "default" else of_base)
    expected = base(input_ids=tokens).logits
    with default_dtype(dtype):
        model = get_peft_model(base, config_of(method)).eval()
        output = model(input_ids=tokens, labels=tokens)
        output.loss.backward()
    assert torch.equal(output.logits, expected)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_loaded_as_under_the_usual_default(
    method: str, dtype: torch.dtype, low_cpu_mem_usage: bool, tmp_path: Path
) -> None:
    adapted(method).save_pretrained(str(tmp_path))
    loaded = []
    for default in (torch.float32, dtype):
        base: Any = make_model()
        base.to(dtype)
        with default_dtype(default):
            model = PeftModel.from_pretrained(
                base, str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage
            )
        loaded.append(get_peft_model_state_dict(model))
    usual, found = loaded
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        torch.testing.assert_close(found[name], usual[name], rtol=0, atol=0)
        # With low_cpu_mem_usage, PEFT rounds every method's tensors to the base model's dtype.
        if not low_cpu_mem_usage:
            torch.testing.assert_close(found[name].float(), tensor, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_are_counted_in_float32(dtype: torch.dtype) -> None:
    with default_dtype(dtype):
        model = get_peft_model(make_model(), config_of("baft"))  # type: ignore[arg-type]
    usage = {name: b.dtype for name, b in model.named_buffers() if "gate_usage" in name}
    assert usage
    assert set(usage.values()) == {torch.float32}
