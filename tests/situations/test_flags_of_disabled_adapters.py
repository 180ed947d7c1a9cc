"""Which parameters need gradients after adapters have been switched off and on again: the same ones as before.

PEFT 0.21.2 makes every active adapter trainable then; LoRA and IA3 are tried as well, to show what is PEFT's own behaviour.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, inject_adapter_in_model
from torch import nn

from adapters import logits
from conftest import make_model
from peft_baft.adapter import baft_layers
from peft_baft.adapter.switching import Switch
from side_by_side import METHODS, OLD_PEFT, adapted, config_of


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def loaded(method: str, folder: Path, **settings: Any) -> PeftModel:
    """A model with an adapter that was saved and loaded, so that it is frozen."""
    adapted(method, **settings).save_pretrained(str(folder))
    return PeftModel.from_pretrained(make_model(), str(folder))


PEFTS_OWN = pytest.mark.xfail(strict=True, reason="PEFT makes an active adapter trainable")


@pytest.mark.parametrize("saved", [[], ["norm"]], ids=["adapter", "adapter and module"])
@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m == "baft" else PEFTS_OWN) for m in METHODS]
)
def test_a_frozen_adapter_stays_frozen(
    method: str, saved: list[str], tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = loaded(method, tmp_path, **({"modules_to_save": saved} if saved else {}))
    assert not trainable(model)
    with model.disable_adapter():
        logits(model, tokens)
    assert not trainable(model)


@pytest.mark.parametrize("method", METHODS)
def test_a_trainable_adapter_is_frozen_while_it_is_off_and_trainable_afterwards(
    method: str,
) -> None:
    model = adapted(method, modules_to_save=["norm"])
    before = trainable(model)
    assert any("modules_to_save" in name for name in before) and len(before) > 1
    with model.disable_adapter():
        assert not trainable(model)
        with model.disable_adapter():
            assert not trainable(model)
        assert not trainable(model)
    assert trainable(model) == before
    model.base_model.disable_adapter_layers()
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert trainable(model) == before


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_that_is_chosen_while_all_are_off_is_the_trainable_one_afterwards(
    method: str,
) -> None:
    model = adapted(method, modules_to_save=["norm"])
    model.add_adapter("second", config_of(method, modules_to_save=["norm"]))
    of_first = trainable(model)
    with model.disable_adapter():
        model.set_adapter("second")
    assert trainable(model) == {name.replace("default", "second") for name in of_first}


def test_what_is_frozen_or_made_trainable_while_all_are_off_holds_afterwards() -> None:
    model = adapted("baft", modules_to_save=["norm"])
    model.add_adapter("second", config_of("baft", modules_to_save=["norm"]))
    of_first = trainable(model)
    of_second = {name.replace("default", "second") for name in of_first}
    with model.disable_adapter():
        model.base_model.set_requires_grad("second", True)
        assert not trainable(model)
    assert trainable(model) == of_first | of_second
    with model.disable_adapter():
        model.base_model.set_requires_grad("default", False)
    assert trainable(model) == of_second


@pytest.mark.skipif(OLD_PEFT, reason="PEFT 0.20 restores no flags when it loads an adapter")
@pytest.mark.parametrize("is_trainable", [True, False])
def test_an_adapter_that_is_loaded_while_all_are_off_changes_no_flag(
    is_trainable: bool, tokens: torch.Tensor, tmp_path: Path
) -> None:
    model = adapted("baft")
    model.save_pretrained(str(tmp_path))
    base, edited, before = logits(make_model(), tokens), logits(model, tokens), trainable(model)
    assert not torch.equal(base, edited)
    with model.disable_adapter():
        model.load_adapter(str(tmp_path), "second", is_trainable=is_trainable)
        assert torch.equal(logits(model, tokens), base)
    more = {name.replace("default", "second") for name in before} if is_trainable else set()
    assert trainable(model) == before | more and torch.equal(logits(model, tokens), edited)


def test_switching_layer_by_layer_as_transformers_does_restores_the_flags_too() -> None:
    model = inject_adapter_in_model(config_of("baft"), make_model())
    for layer in baft_layers(model)[1:]:
        layer.set_requires_grad("default", False)
    before = trainable(model)
    for enabled in (False, True):
        for layer in baft_layers(model):
            layer.enable_adapters(enabled)
        assert trainable(model) == (before if enabled else set())


def test_a_copy_of_a_model_that_is_off_has_its_own_flags() -> None:
    model = adapted("baft")
    before = trainable(model)
    with model.disable_adapter():
        copy = deepcopy(model)
    copy.base_model.enable_adapter_layers()
    assert trainable(copy) == before == trainable(model)


def test_a_switch_that_is_turned_twice_remembers_the_first_flags() -> None:
    module, switch = nn.Linear(2, 2), Switch()
    module.bias.requires_grad_(False)
    switch.turn(module, on=False)
    switch.turn(module, on=False)
    switch.turn(module, on=True)
    assert trainable(module) == {"weight"}
