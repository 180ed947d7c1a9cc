"""What was measured of a base model is kept on the machine, and found again for this model only."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from toy import editor_of

import facts
from facts import FactModel
from peft_baft.memory import editor as memory_editor
from peft_baft.memory.tensors import PER_MODEL

fact_model = facts.fact_model


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """How often a model is measured from here on."""
    seen: list[int] = []
    measure = memory_editor.measure

    def counted(*given: Any) -> Any:
        seen.append(1)
        return measure(*given)

    monkeypatch.setattr(memory_editor, "measure", counted)
    monkeypatch.setenv("PEFT_BAFT_CACHE", str(tmp_path / "kept"))
    return seen


def test_a_second_memory_on_a_model_does_not_measure_it(
    fact_model: FactModel, count: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = editor_of(fact_model), editor_of(fact_model)
    assert len(count) == 1
    one, two = first.part.tensors(), second.part.tensors()
    assert all(torch.equal(one[name], two[name]) for name in PER_MODEL)
    changed = deepcopy(fact_model.base)
    changed.model.layers[0].mlp.up_proj.weight.data += 0.1
    editor_of(FactModel(changed, fact_model.tokenizer))  # the control: another model
    assert len(count) == 2
    monkeypatch.setenv("PEFT_BAFT_CACHE", "")
    editor_of(fact_model)
    assert len(count) == 3


def test_a_damaged_file_is_measured_anew(
    fact_model: FactModel, count: list[int], tmp_path: Path
) -> None:
    editor_of(fact_model)
    (file,) = (tmp_path / "kept").iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    editor_of(fact_model)
    assert len(count) == 2
    editor_of(fact_model)
    assert len(count) == 2


def test_other_texts_to_measure_on_are_another_file(
    fact_model: FactModel, count: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    editor_of(fact_model)
    monkeypatch.setattr(
        "peft_baft.memory.measurement_cache.measurement_texts", lambda: ["of another version"]
    )
    editor_of(fact_model)
    assert len(count) == 2
