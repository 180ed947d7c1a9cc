"""One config object given to several models or adapters: each gets a copy, and the caller's object stays as it was."""

# mypy: disable-error-code="union-attr, arg-type, attr-defined, index"
from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)

from conftest import make_model
from peft_baft import BaftConfig
from peft_baft.adapter import baft_layers
from side_by_side import METHODS, config_of

every_method = pytest.mark.parametrize("method", METHODS)


def llama(depth: int = 4, width: int = 32) -> tr.LlamaForCausalLM:
    shape = {"num_hidden_layers": depth, "hidden_size": width, "head_dim": None}
    return tr.LlamaForCausalLM(tr.LlamaConfig(**{**make_model().config.to_dict(), **shape}))


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    return {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}


@every_method
@pytest.mark.parametrize(
    "other",
    [lambda: llama(depth=12), lambda: llama(depth=2), lambda: llama(width=64)],
    ids=["deeper", "shallower", "wider"],
)
def test_a_used_config_fits_another_model_as_a_fresh_one_does(method: str, other: Any) -> None:
    used = config_of(method)
    get_peft_model(llama(), used)
    found = shapes_of(get_peft_model(other(), used))
    assert found == shapes_of(get_peft_model(other(), config_of(method)))
    assert found != shapes_of(get_peft_model(llama(), used))  # the control


def test_a_used_config_fits_another_architecture() -> None:
    used = config_of("baft")
    get_peft_model(llama(), used)
    found = shapes_of(get_peft_model(make_model("gpt2"), used))
    assert found == shapes_of(get_peft_model(make_model("gpt2"), config_of("baft")))


def in_a_peft_model(base: Any, config: Any) -> Any:
    return get_peft_model(base, config).peft_config["default"]


def added(base: Any, config: Any) -> Any:
    model = get_peft_model(base, config_of("baft"), adapter_name="first")
    model.add_adapter("default", config)
    return model.peft_config["default"]


def injected(base: Any, config: Any) -> Any:
    return inject_adapter_in_model(config, base).peft_config["default"]


def loaded_natively(base: Any, config: Any) -> Any:
    state = get_peft_model_state_dict(get_peft_model(make_model(), deepcopy(config)))
    base.load_adapter(peft_config=config, adapter_state_dict=state)
    return base.peft_config["default"]


WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "get_peft_model": in_a_peft_model,
    "add_adapter": added,
    "inject_adapter_in_model": injected,
    "transformers": loaded_natively,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "named blocks": {"target_modules": ["layers.1", "layers.2"]},
    "an expression": {"target_modules": r".*layers\.[12]", "exclude_modules": ["layers.2"]},
    "a memory": {"memory": True},
}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("way", WAYS)
def test_the_callers_config_stays_as_it_was(way: str, kind: str) -> None:
    given = config_of("baft", **SETTINGS[kind])
    before = deepcopy(vars(given))
    base = make_model()
    kept = WAYS[way](base, given)
    # These two PEFT and transformers write into what they are given, for every method.
    ours = {n for n in before if n not in ("base_model_name_or_path", "inference_mode")}
    if before["target_modules"] is None:  # filled in for callers to read, as PEFT does
        ours -= {"target_modules", "chosen_targets"}
        assert given.target_modules == kept.target_modules is not given.target_modules
    assert {n: vars(given)[n] for n in ours} == {n: before[n] for n in ours}
    assert kept is not given and kept.hidden_size == 32  # what is filled in is in the copy
    configs = [c for layer in baft_layers(base) for n, c in layer.configs.items() if n == "default"]
    assert configs and all(config is kept for config in configs)
    assert base.peft_config["default"] is kept


def test_two_adapters_of_one_config_remember_apart() -> None:
    config = config_of("baft")
    model = get_peft_model(make_model(), config, adapter_name="first")
    model.add_adapter("second", config)
    model.peft_config["first"].template = "raw"
    model.peft_config["first"].target_modules.append("more")
    assert model.peft_config["second"].template is None and config.template is None
    assert model.peft_config["second"].target_modules[-1] == "model.layers.3"
    for layer in baft_layers(model):
        assert {name: c.template for name, c in layer.configs.items()} == {
            "first": "raw",
            "second": None,
        }


def test_a_combination_shares_nothing_with_its_parts() -> None:
    model = get_peft_model(make_model(), config_of("baft"), adapter_name="first")
    model.base_model.add_weighted_adapter(["first"], [1.0], "sum")
    model.peft_config["first"].target_modules.append("more")
    assert "more" not in model.peft_config["sum"].target_modules


@every_method
def test_a_refused_config_stays_as_it_was(method: str) -> None:
    given = config_of(method, modules_to_save=["layers"])
    before = deepcopy(vars(given))
    with pytest.raises((TypeError, ValueError)):
        get_peft_model(make_model(), given)
    if method != "lora":  # PEFT turns LoRA's target_modules into a set, in place
        assert {**vars(given), "base_model_name_or_path": None} == before


@every_method
def test_a_config_passed_to_from_pretrained_is_the_adapters_and_only_the_first_ones(
    method: str, tmp_path: Path
) -> None:
    """PEFT's own tests ask for the very object; a second adapter gets a copy, except of LoRA and IA3."""
    get_peft_model(make_model(), config_of(method)).save_pretrained(str(tmp_path))
    config = config_of(method)
    models = [PeftModel.from_pretrained(make_model(), str(tmp_path), config=config) for _ in "12"]
    first, second = (model.peft_config["default"] for model in models)
    assert first is config and first.inference_mode
    assert (second is config) is (method != "baft")
    assert second.target_modules == first.target_modules


def test_a_config_out_of_a_folder_can_be_loaded_twice(tmp_path: Path) -> None:
    torch.manual_seed(0)
    get_peft_model(make_model(), config_of("baft")).save_pretrained(str(tmp_path))
    read = BaftConfig.from_pretrained(str(tmp_path))
    before = deepcopy(vars(read))
    for name in ("first", "second"):
        PeftModel.from_pretrained(make_model(), str(tmp_path), adapter_name=name, config=read)
    assert {**vars(read), "inference_mode": before["inference_mode"]} == before
