"""The gates' usage counts: it stays float32, however the model is cast and its files are read."""

# mypy: disable-error-code="union-attr, arg-type, attr-defined, operator"
from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, prepare_model_for_kbit_training
from safetensors.torch import load_file, save_file
from torch import nn

from adapters import edited_model
from conftest import make_model
from peft_baft.adapter import baft_layers

MANY = torch.tensor([30000.0, 50000.0, 65000.0, 70001.0, 80001.0])  # float16 ends at 65,504
CASTS: dict[str, Callable[[Any], Any]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to": lambda m: m.to(torch.float16),
    "the base model's": lambda m: m.get_base_model().to(dtype=torch.bfloat16),
    "type": lambda m: m.type(torch.float16),
    "and back": lambda m: m.half().float(),
    "double": lambda m: m.double(),
    "k-bit training": lambda m: prepare_model_for_kbit_training(m.half()),
    "device and dtype": lambda m: m.to("cpu", torch.float16),
    "copies": lambda m: copy.deepcopy(pickle.loads(pickle.dumps(m))).half(),
    "a block": lambda m: baft_layers(m)[0].half() and m.half(),
}


def usages(model: nn.Module) -> list[torch.Tensor]:
    return [layer.baft_gate_usage["default"] for layer in baft_layers(model)]


def much_edited() -> PeftModel:
    model = edited_model()
    for usage in usages(model):
        usage.copy_(MANY)
    return model


@pytest.mark.parametrize("how", CASTS)
def test_counts_stay_what_they_are_when_the_model_is_cast(how: str, tmp_path: Path) -> None:
    model = much_edited()
    cast = CASTS[how](model)
    model = cast if isinstance(cast, PeftModel) else model
    for usage in usages(model):
        assert usage.dtype == torch.float32 and torch.equal(usage, MANY)
    model.save_pretrained(str(tmp_path))
    for usage in usages(PeftModel.from_pretrained(make_model(), str(tmp_path))):
        assert usage.dtype == torch.float32 and torch.equal(usage, MANY)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_counts_are_float32_whatever_the_file_and_the_base_model(
    low_cpu_mem_usage: bool, base_dtype: torch.dtype, tmp_path: Path
) -> None:
    model = edited_model()
    for usage in usages(model):
        usage.fill_(7)
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)
    model = PeftModel.from_pretrained(
        make_model().to(base_dtype), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert {(usage.dtype, *usage.tolist()) for usage in usages(model)} == {
        (torch.float32, *[7.0] * 5)
    }
    base = make_model().to(base_dtype)
    base.load_adapter(str(tmp_path))
    assert {usage.dtype for usage in usages(base)} == {torch.float32}


def test_counts_follow_the_model_to_another_device() -> None:
    model = much_edited()
    model.to("meta")
    assert {usage.device.type for usage in usages(model)} == {"meta"}
    model.to_empty(device="cpu")
    assert {(usage.device.type, usage.dtype) for usage in usages(model)} == {("cpu", torch.float32)}
