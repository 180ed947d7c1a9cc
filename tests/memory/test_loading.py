"""A memory of edits that is loaded under a name that exists computes with the settings of its file."""

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
    plain = {"task_type": "CAUSAL_LM", "memory": True, "r": 16, "key_dimensions": 16}
    return get_peft_model(make_model(), BaftConfig(**{**plain, **settings}))


def test_thresholds_of_the_file_are_taken_over(tmp_path: Path) -> None:
    memory(strictness=0.1, least_subject=0.9, most_unlike=3).save_pretrained(str(tmp_path))
    model = memory()
    model.load_adapter(str(tmp_path), "default")
    config: Any = model.peft_config["default"]
    assert (config.strictness, config.least_subject, config.most_unlike) == (0.1, 0.9, 3)
    for layer in baft_layers(model):
        for router in layer.baft_router.values():
            assert router.config is config


@pytest.mark.parametrize("settings", [{"memory": False}, {"r": 8}, {"key_dimensions": 8}])
def test_what_is_not_such_a_memory_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    memory(**settings).save_pretrained(str(tmp_path))
    model = memory()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="has other parameters"):
        model.load_adapter(str(tmp_path), "default")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_memory_that_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    model = memory()
    model.save_pretrained(str(tmp_path))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    baft_layers(model)[0].baft_router["default"].numbers = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="could not be loaded again"):
        model.save_pretrained(str(tmp_path))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_memory_that_is_cast_with_its_model_keeps_its_numbers(tmp_path: Path) -> None:
    model = memory()
    router: Any = next(layer for layer in baft_layers(model) if layer.baft_router).baft_router
    router["default"].mean.copy_(torch.linspace(70000, 80000, 32))  # float16 ends at 65,504
    model.half()
    assert router["default"].mean.dtype == torch.float32
    model.save_pretrained(str(tmp_path))
    PeftModel.from_pretrained(make_model(), str(tmp_path))
