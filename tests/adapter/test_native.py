"""The functions for adapters that transformers gives to its own models, by version.

transformers names a lowest PEFT for them, and from 5.24.0 that one is newer than any release of PEFT when 5.24.0 came out. Then
they raise for every kind of adapter; loading one, and all of `PeftModel`, goes on to work (docs/versions.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig
from transformers.integrations.peft import MIN_PEFT_VERSION

from adapters import config, edited_model, is_bare, logits
from conftest import make_model

TOO_OLD = Version(peft.__version__) < Version(MIN_PEFT_VERSION)
FUNCTIONS = {
    "set_adapter": lambda model: model.set_adapter("default"),
    "disable_adapters": lambda model: model.disable_adapters(),
    "enable_adapters": lambda model: model.enable_adapters(),
    "active_adapters": lambda model: model.active_adapters(),
    "get_adapter_state_dict": lambda model: model.get_adapter_state_dict(),
    "delete_adapter": lambda model: model.delete_adapter("default"),
}


@pytest.fixture
def loaded(tmp_path: Path, tokens: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """A model into which transformers has loaded an adapter, and the logits that it should give."""
    edited = edited_model()
    edited.save_pretrained(str(tmp_path / "adapter"))
    model = make_model()
    model.load_adapter(str(tmp_path / "adapter"))
    return model, logits(edited, tokens)


def test_loading_works_with_every_version(
    loaded: tuple[Any, torch.Tensor], tokens: torch.Tensor
) -> None:
    model, expected = loaded
    assert torch.equal(logits(model, tokens), expected)
    assert not torch.equal(logits(make_model(), tokens), expected)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_native_function_works_or_names_the_peft_that_it_wants(
    loaded: tuple[Any, torch.Tensor], tokens, name
) -> None:
    model, expected = loaded
    if TOO_OLD:
        with pytest.raises(ValueError, match=MIN_PEFT_VERSION):
            FUNCTIONS[name](model)
        assert torch.equal(logits(model, tokens), expected)
        return
    FUNCTIONS[name](model)
    still_edited = name not in ("disable_adapters", "delete_adapter")
    assert torch.equal(logits(model, tokens), expected) == still_edited


def test_native_saving_keeps_the_adapter_or_names_the_peft_that_it_wants(
    loaded, tokens, tmp_path: Path
) -> None:
    model, expected = loaded
    if TOO_OLD:
        with pytest.raises(ValueError, match=MIN_PEFT_VERSION):
            model.save_pretrained(tmp_path / "again")
        return
    model.save_pretrained(tmp_path / "again")
    again = make_model()
    again.load_adapter(str(tmp_path / "again"))
    assert torch.equal(logits(again, tokens), expected)


def test_native_adding_works_or_leaves_the_model_bare_and_lora_fares_no_better(
    tokens: torch.Tensor,
) -> None:
    model, beside = make_model(), make_model()
    if TOO_OLD:
        with pytest.raises(ValueError, match=MIN_PEFT_VERSION):
            model.add_adapter(config())
        with pytest.raises(ValueError, match=MIN_PEFT_VERSION):  # the control: it is not about BaFT
            beside.add_adapter(LoraConfig())
        assert is_bare(model)
        return
    before = logits(model, tokens)
    model.add_adapter(config())
    beside.add_adapter(LoraConfig())
    assert not is_bare(model) and torch.equal(
        logits(model, tokens), before
    )  # a fresh adapter changes nothing
