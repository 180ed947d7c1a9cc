"""An adapter that is put on another model of the same shape: it fits, and means nothing there, so that is told."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from peft import PeftModel, get_peft_model
from torch import nn

from conftest import make_model
from peft_baft import BaftConfig
from peft_baft.adapter import base_identity
from side_by_side import adapted

WARNING = "made on another base model"


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Callable[[], bool]:
    """Tells whether there was a warning since it was last asked."""

    def ask() -> bool:
        found = any(WARNING in record.getMessage() for record in caplog.records)
        caplog.clear()
        return found

    caplog.set_level(logging.WARNING)
    return ask


@pytest.fixture
def folder(tmp_path: Path) -> str:
    adapted("baft").save_pretrained(str(tmp_path / "adapter"))
    return str(tmp_path / "adapter")


def _config(folder: str) -> dict[str, Any]:
    return json.loads((Path(folder) / "adapter_config.json").read_text())


def _write(folder: str, config: dict[str, Any]) -> None:
    (Path(folder) / "adapter_config.json").write_text(json.dumps(config))


def _loaded(model: Any, folder: str) -> Any:
    return PeftModel.from_pretrained(model, folder)


def _loaded_by_transformers(model: Any, folder: str) -> Any:
    model.load_adapter(folder)
    return model


def _loaded_beside_another(model: Any, folder: str) -> Any:
    edited = get_peft_model(model, BaftConfig(r=4, task_type="CAUSAL_LM"), adapter_name="first")
    edited.load_adapter(folder, "second")
    return edited


@pytest.mark.parametrize("load", [_loaded, _loaded_by_transformers, _loaded_beside_another])
def test_another_model_of_the_same_shape_is_warned_of(
    load: Callable[[Any, str], Any], folder: str, warned: Callable[[], bool]
) -> None:
    load(make_model(), folder)
    assert not warned()
    load(make_model(seed=1), folder)
    assert warned()


def test_the_warning_names_both_models(folder: str, caplog: pytest.LogCaptureFixture) -> None:
    _write(folder, _config(folder) | {"base_model_name_or_path": "someone/one"})
    other = make_model(seed=1)
    other.name_or_path = "someone/other"
    _loaded(other, folder)
    assert "(someone/one) than the one it is being loaded on (someone/other)" in caplog.text


def _rounded(model: nn.Module, levels: int) -> nn.Module:
    """Round every weight as quantisation to so many levels of a row does."""
    with torch.no_grad():
        for parameter in model.parameters():
            step = 2 * parameter.abs().amax(-1, keepdim=True) / levels
            parameter.copy_((parameter / step).round() * step)
    return model


def _trained_a_little(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * parameter.std() * torch.randn_like(parameter))
    return model


def _with_more_tokens(model: Any) -> nn.Module:
    model.resize_token_embeddings(80, mean_resizing=False)
    return model


def _with_attribute(model: Any, name: str, value: Any) -> nn.Module:
    setattr(model, name, value)
    return model


SAME: dict[str, Callable[[Any], nn.Module]] = {
    "bfloat16": lambda model: model.bfloat16(),
    "float16": lambda model: model.half(),
    "float64": lambda model: model.double(),
    "8 bits": lambda model: _rounded(model, 255),
    "3 bits": lambda model: _rounded(model, 7),
    "trained": _trained_a_little,
    "more tokens": _with_more_tokens,
    "renamed": lambda model: _with_attribute(model, "name_or_path", "elsewhere"),
    "not at hand": lambda model: _with_attribute(model, "get_input_embeddings", nn.Identity),
}


@pytest.mark.parametrize("change", SAME)
def test_the_same_model_in_another_form_is_not_warned_of(
    change: str, folder: str, warned: Callable[[], bool]
) -> None:
    _loaded(SAME[change](make_model()), folder)
    assert not warned()


def test_what_is_saved_identifies_the_model_and_stays_when_it_is_saved_again(
    folder: str, tmp_path: Path
) -> None:
    sample = _config(folder)["base_sample"]
    assert len(sample) < 200
    expected = base_identity.embedding_sample(make_model(), rows=base_identity.FIRST)
    assert expected is not None
    found = base_identity.to_sample(sample)
    torch.testing.assert_close(
        found * expected.square().mean().sqrt(), expected, rtol=2e-3, atol=1e-4
    )
    _loaded(make_model(seed=1), folder).save_pretrained(str(tmp_path / "again"))
    assert _config(str(tmp_path / "again"))["base_sample"] == sample


def test_files_from_before_are_loaded_silently_and_do_not_claim_a_model_afterwards(
    folder: str, tmp_path: Path, warned: Callable[[], bool]
) -> None:
    config = _config(folder)
    del config["base_sample"]
    _write(folder, config)
    model = _loaded(make_model(seed=1), folder)
    assert not warned()
    model.save_pretrained(str(tmp_path / "again"))
    assert "base_sample" not in _config(str(tmp_path / "again"))


@pytest.mark.parametrize("damaged", ["", "abc", "AAAA", "é", "A" * 172, "/" * 170 + "=="])
def test_a_damaged_sample_is_refused(damaged: str, folder: str) -> None:
    _write(folder, _config(folder) | {"base_sample": damaged})
    with pytest.raises(ValueError, match="base_sample must hold 64 finite numbers"):
        _loaded(make_model(), folder)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Embedding(4, 4).to("meta"), tr.BertConfig])
def test_a_model_without_embeddings_at_hand_has_no_sample(model: Any) -> None:
    assert base_identity.embedding_sample(model) is None


def test_an_adapter_beside_one_that_trains_the_embeddings_is_of_the_same_model(
    folder: str, warned: Callable[[], bool]
) -> None:
    model = adapted("baft", modules_to_save=["embed_tokens"])  # which trains them a lot
    model.load_adapter(folder, "other")
    assert not warned()
