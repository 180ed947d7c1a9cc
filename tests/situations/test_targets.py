"""What `target_modules` may name: blocks; with a warning, modules inside them; but not what is named by a habit from LoRA."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from adapters import config, is_bare, logits
from conftest import make_model, randomise
from peft_baft.adapter import baft_layers

INSIDE = [f"model.layers.{i}.mlp" for i in range(4)]


def edited_modules(**settings: Any) -> list[str]:
    return [layer.name for layer in baft_layers(get_peft_model(make_model(), config(**settings)))]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj"], r"names 'q_proj', which is model\.layers\.0\.self_attn\.q_proj.* and 2 more"),
        (["q_proj", "v_proj"], "names 'q_proj'"),
        (["layers.1", "mlp"], "names 'mlp'"),
        (["self_attn"], "names 'self_attn'"),
        ("all-linear", "the linear layers inside"),
        (["layers"], r"model\.layers is a list of modules"),
    ],
)
def test_modules_inside_all_blocks_are_refused_before_the_model_is_touched(
    targets: Any, message: str
) -> None:
    model = make_model()
    with pytest.raises(ValueError, match=rf"{message}.* choose them with layers_to_transform"):
        get_peft_model(model, config(target_modules=targets))
    assert is_bare(model)


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (INSIDE, INSIDE),
        (["layers.1.mlp"], INSIDE[1:2]),
        (r".*\.mlp", INSIDE),
        (["norm"], ["model.norm"]),
        (r"model\.layers\.1(\.mlp)?", ["model.layers.1.mlp", "model.layers.1"]),
    ],
    ids=["in full", "in one block", "expression", "outside", "block and inside"],
)
def test_modules_that_are_named_on_purpose_are_edited_with_a_warning(
    targets: Any, names: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="peft_baft"):
        assert edited_modules(target_modules=targets) == names
    assert f"edits the output of {names[0]}" in caplog.text and "layers_to_transform" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"layers_to_transform": [1]},
        {"target_modules": ["layers.1", "model.layers.2"]},
        {"target_modules": r"model\.layers\.\d"},
    ],
    ids=["default", "numbers", "names", "expression"],
)
def test_blocks_are_edited_without_a_warning(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="peft_baft"):
        names = edited_modules(**settings)
    assert names and all(name.removeprefix("model.layers.").isdigit() for name in names)
    assert not caplog.text


def test_an_adapter_that_was_saved_with_such_a_suffix_is_still_loaded(
    tokens: torch.Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = get_peft_model(make_model(), config(target_modules=r".*\.mlp")).eval()
    randomise(model)
    former: Any = model.peft_config["default"]
    former.target_modules = ["mlp"]  # as former versions wrote it
    model.save_pretrained(str(tmp_path))
    saved: Any = PeftConfig.from_pretrained(str(tmp_path))
    assert list(saved.target_modules) == ["mlp"]
    caplog.clear()
    loaded = PeftModel.from_pretrained(make_model(), str(tmp_path)).eval()
    natively = make_model()
    natively.load_adapter(str(tmp_path))
    for one in (loaded, natively):
        assert torch.equal(logits(one, tokens), logits(model, tokens))
    assert "edits the output" not in caplog.text


def test_any_suffix_will_do_for_a_model_without_decoder_blocks() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.ModuleDict({"wide": nn.Linear(4, 8)})
            self.two = nn.ModuleDict({"wide": nn.Linear(8, 8)})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two["wide"](self.one["wide"](x))

    model = get_peft_model(Pair(), config(target_modules=["wide"], task_type=None))
    assert [layer.name for layer in baft_layers(model)] == ["one.wide", "two.wide"]
