"""A memory of edits that is loaded under a name that exists computes with the settings of its file."""

# mypy: disable-error-code="attr-defined, operator, union-attr, arg-type, index, call-arg, var-annotated"
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from conftest import make_model
from peft_baft import BaftConfig
from peft_baft.adapter import baft_layers


def memory(**settings: Any) -> PeftModel:
    of_memory = {"key_dimensions": 16, **settings}
    return get_peft_model(make_model(), BaftConfig(memory=of_memory, task_type="CAUSAL_LM"))


def part_of(model: Any) -> Any:
    (layer,) = (layer for layer in baft_layers(model) if layer.parts())
    return layer.baft_part["default"]


def test_thresholds_of_the_file_are_taken_over(tmp_path: Path) -> None:
    own = {"strictness": 0.1, "least_subject": 0.9, "most_unlike": 3, "after": "continue"}
    memory(**own).save_pretrained(str(tmp_path))
    model = memory()
    assert model.peft_config["default"].memory.strictness != 0.1  # the control
    model.load_adapter(str(tmp_path), "default")
    config: Any = model.peft_config["default"]
    assert {name: getattr(config.memory, name) for name in own} == own
    assert part_of(model)._config.memory == config.memory


def test_what_is_not_such_a_memory_is_refused(tmp_path: Path) -> None:
    memory(key_dimensions=8).save_pretrained(str(tmp_path / "narrow"))
    plain = BaftConfig(task_type="CAUSAL_LM")
    get_peft_model(make_model(), plain).save_pretrained(str(tmp_path / "plain"))
    model = memory()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("narrow", "plain"):
        with pytest.raises(ValueError, match="has other parameters"):
            model.load_adapter(str(tmp_path / name), "default")
        after = model.state_dict()
        assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    memory().save_pretrained(str(tmp_path / "same"))  # the control
    model.load_adapter(str(tmp_path / "same"), "default")


def test_a_memory_that_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    model = memory()
    model.save_pretrained(str(tmp_path))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    part_of(model).replace({"edits": torch.zeros(3, 5, dtype=torch.int32)})
    with pytest.raises(ValueError, match="could not be loaded again"):
        model.save_pretrained(str(tmp_path))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double"])
def test_a_memory_that_is_cast_with_its_model_keeps_its_numbers(cast: str, tmp_path: Path) -> None:
    model = memory()
    part = part_of(model)
    part.replace({"mean": torch.linspace(70000, 80000, 32)})  # float16 ends at 65,504
    before = {name: tensor.clone() for name, tensor in part.tensors().items()}
    getattr(model, cast)()
    for name, tensor in part.tensors().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(make_model(), str(tmp_path))
    assert torch.equal(part_of(loaded).mean, before["mean"])


def test_an_empty_memory_made_of_a_saved_config_is_empty(tmp_path: Path) -> None:
    memory().save_pretrained(str(tmp_path))
    config = BaftConfig.from_pretrained(str(tmp_path))
    again = get_peft_model(make_model(), config)
    assert part_of(again).count == 0 and not part_of(again).is_measured
