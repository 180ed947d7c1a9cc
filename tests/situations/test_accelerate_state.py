"""What accelerate's `save_state` writes of a model with an adapter, its `load_state` reads again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from adapters import logits
from side_by_side import METHODS, adapted


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


SETTINGS: dict[str, dict[str, Any]] = {
    "adapter": {},
    "adapter and module": {"modules_to_save": ["lm_head"]},
}
OF_BAFT: dict[str, dict[str, Any]] = {
    "without gates": {"weighting": "none"},
    "every gate": {"gate_norm": "scale", "weighting": "product", "gate_bias": True},
}
CASES = [(method, name) for method in METHODS for name in SETTINGS] + [
    ("baft", name) for name in OF_BAFT
]


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
@pytest.mark.parametrize(("method", "name"), CASES)
def test_a_training_run_goes_on_where_it_was_saved(
    method: str, name: str, safe: bool, accelerator: Any, tokens: Tensor, tmp_path: Path
) -> None:
    model = adapted(method, **(SETTINGS | OF_BAFT)[name])
    parameters = [p for p in model.parameters() if p.requires_grad]
    model, optimiser = accelerator.prepare(model, torch.optim.AdamW(parameters, lr=0.01))

    def step() -> Tensor:
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        optimiser.step()
        optimiser.zero_grad()
        return logits(model, tokens)

    step()
    accelerator.save_state(str(tmp_path), safe_serialization=safe)
    saved = logits(model, tokens)
    second = step()
    assert not torch.equal(second, saved)
    accelerator.load_state(str(tmp_path))
    assert torch.equal(logits(model, tokens), saved)
    assert torch.equal(step(), second)
