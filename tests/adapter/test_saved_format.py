"""Saved adapters have a format with a number: what was saved under it stays readable, and what was not is refused.

`format_1/` is an adapter as users have it on disk, with what it computes in `expected.json`; `format_1/make.py` made it.
"""

# mypy: disable-error-code="attr-defined"
from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
import transformers as tr
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_config, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from adapters import config, edited_model, is_bare, logits
from conftest import make_model
from peft_baft import BaftConfig
from peft_baft.adapter import baft_layers
from peft_baft_cli.options import AskCommand
from peft_baft_cli.work import common
from peft_baft_cli.work.ask import ask

FROZEN = Path(__file__).parent / "format_1"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Settings that came to format 1 later: a folder without them remembers nothing, and no forward depends on them. Where
# `pack_ranks` or `answer_positions` is not empty, on which it does, the format is 2.
ADDED_LATER = {"template", "template_hash", "pack_ranks", "answer_positions", "base_sample"}
PROMPT = [5, 9, 17, 33, 60, 12]
SETTINGS: dict[str, Any] = {
    "task_type": "CAUSAL_LM",
    "r": 4,
    "layers_to_transform": [1, 3],
    "weighting": "product",
    "gate_norm": "scale",
    "gate_bias": True,
    "gate_offset": 0.0,
}


def fill(parameters: Iterable[tuple[str, torch.Tensor]], size: float) -> None:
    """Set parameters by arithmetic alone, since random numbers may change with the version of torch."""
    with torch.no_grad():
        for name, parameter in parameters:
            index = torch.arange(parameter.numel(), dtype=torch.float64)
            waves = torch.sin(index * 1.7 + index.square() * 0.013 + crc32(name.encode()) % 1000)
            parameter.copy_(waves.view(parameter.shape) * size)


def model_of_known_weights() -> Any:
    model = make_model()
    fill(model.named_parameters(), 0.3)
    return model


def computed(model: Any) -> dict[str, Any]:
    """What a model answers to the prompt, and what its first edited block has counted."""
    prompt = torch.tensor([PROMPT])
    answer = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=4, do_sample=False
    )
    usage = [layer.baft_gate_usage["default"].tolist() for layer in baft_layers(model)]
    return {
        "logits": logits(model, prompt)[0].tolist(),
        "answer": answer[0, len(PROMPT) :].tolist(),
        "usage": usage,
    }


# what was saved under format 1 stays readable


def test_a_folder_of_format_1_computes_what_it_computed_when_it_was_saved() -> None:
    expected = json.loads((FROZEN / "expected.json").read_text())
    model = PeftModel.from_pretrained(model_of_known_weights(), FROZEN).eval()
    result = computed(model)
    torch.testing.assert_close(
        torch.tensor(result["logits"]), torch.tensor(expected["logits"]), rtol=1e-3, atol=1e-4
    )
    assert (result["answer"], result["usage"]) == (expected["answer"], expected["usage"])
    with model.disable_adapter():  # the control: without the adapter, it computes something else
        bare = computed(model)
    assert (torch.tensor(bare["logits"]) - torch.tensor(expected["logits"])).abs().max() > 0.5


def shapes_and_settings(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Names and shapes of a folder's tensors, and its settings but for PEFT's and those that came later."""
    left_out = {field.name for field in fields(PeftConfig)} | ADDED_LATER
    settings = json.loads((folder / CONFIG).read_text())
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / WEIGHTS).items()}
    return shapes, {name: value for name, value in settings.items() if name not in left_out}


def save_today(folder: Path) -> Path:
    get_peft_model(make_model(), BaftConfig(**SETTINGS)).save_pretrained(str(folder))
    return folder


def test_what_is_saved_today_has_the_names_shapes_and_settings_of_format_1(tmp_path: Path) -> None:
    assert shapes_and_settings(save_today(tmp_path)) == shapes_and_settings(FROZEN)
    assert shapes_and_settings(FROZEN)[1]["baft_format"] == 1


@pytest.mark.parametrize("change", ["a tensor's name", "a setting's name"])
def test_a_change_of_the_format_would_be_noticed(tmp_path: Path, change: str) -> None:
    folder = save_today(tmp_path)
    if change == "a tensor's name":
        rename_tensors(folder, "baft_gate_usage", "baft_usage")
    else:
        write_config(
            folder, lambda settings: settings.update(gate_start=settings.pop("gate_offset"))
        )
    assert shapes_and_settings(folder) != shapes_and_settings(FROZEN)


def test_a_config_made_in_python_gets_the_present_number_also_when_it_is_copied() -> None:
    new = BaftConfig(r=4)
    assert new.baft_format == 1
    assert BaftConfig(**new.to_dict()) == new and get_peft_config(new.to_dict()).baft_format == 1


# what was not is refused, before a model is touched


def rename_tensors(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file(
        {name.replace(old, new): tensor for name, tensor in tensors.items()}, folder / WEIGHTS
    )


def write_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    settings = json.loads((folder / CONFIG).read_text())
    change(settings)
    (folder / CONFIG).write_text(json.dumps(settings))


def to_newer(folder: Path) -> None:
    write_config(folder, lambda settings: settings.update(baft_format=4, gate_sharpness=1.0))


def to_former(folder: Path) -> None:
    rename_tensors(folder, "baft_gate_usage", "baft_load")
    write_config(folder, lambda settings: settings.pop("baft_format"))


def to_former_tensors(folder: Path) -> None:
    rename_tensors(folder, "baft_gate_usage", "baft_load")


NEWER = (
    r"saved by a newer peft_baft \(format 4\); this version reads up to 2: pip install -U peft-baft"
)
FORMER = r"Edit again, or convert it to format 1: in adapter_model.safetensors, rename .*\"baft_format\": 1"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "newer": (to_newer, NEWER),
    "former": (to_former, FORMER),
    "former tensors": (to_former_tensors, FORMER),
}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """A base model in `base`, and an adapter for it in `adapter`."""
    make_model().save_pretrained(tmp_path / "base")
    edited = get_peft_model(tr.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config())
    edited.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path


@pytest.mark.filterwarnings(
    "ignore:Unexpected keyword arguments"
)  # PEFT's, of the setting of a newer format
@pytest.mark.parametrize("kind", REFUSED)
def test_a_folder_of_another_format_is_refused_and_the_model_stays_bare(
    kind: str, folders: Path, tokens
) -> None:
    damage, message = REFUSED[kind]
    base, held = make_model(), edited_model()
    before, before_held = logits(base, tokens), logits(held, tokens)
    held.load_adapter(folders / "adapter", "control")
    damage(folders / "adapter")
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, folders / "adapter")
    with pytest.raises(ValueError, match=message):
        held.load_adapter(folders / "adapter", "second")
    with pytest.raises(ValueError, match=message):
        AutoPeftModelForCausalLM.from_pretrained(folders / "adapter")
    assert (
        is_bare(base)
        and not hasattr(base, "peft_config")
        and torch.equal(logits(base, tokens), before)
    )
    assert [*held.peft_config] == ["default", "control"] and torch.equal(
        logits(held, tokens), before_held
    )


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.parametrize("kind", ["newer", "former"])
def test_transformers_own_loading_refuses_it_as_well(kind: str, folders: Path, tokens) -> None:
    damage, message = REFUSED[kind]
    make_model().load_adapter(str(folders / "adapter"))
    damage(folders / "adapter")
    base = make_model()
    before = logits(base, tokens)
    with pytest.raises(ValueError, match=message):
        base.load_adapter(str(folders / "adapter"))
    assert is_bare(base) and torch.equal(logits(base, tokens), before)
    with pytest.raises(ValueError, match=message):
        tr.AutoModelForCausalLM.from_pretrained(folders / "adapter")


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.parametrize("kind", ["newer", "former"])
def test_baft_ask_refuses_it_before_a_model_is_loaded(
    kind: str, folders: Path, monkeypatch
) -> None:
    class Loaded(Exception):
        pass

    def refuse(*_: Any) -> nn.Module:
        raise Loaded

    monkeypatch.setattr(common, "load_base", refuse)
    damage, message = REFUSED[kind]
    with pytest.raises(Loaded):  # the control: the whole folder gets that far
        ask(AskCommand(prompts=["a"], adapter=str(folders / "adapter"), device="cpu"))
    damage(folders / "adapter")
    with pytest.raises(ValueError, match=message):
        ask(AskCommand(prompts=["a"], adapter=str(folders / "adapter"), device="cpu"))


def test_a_former_folder_loads_once_what_the_message_says_is_done(folders: Path, tokens) -> None:
    randomised = edited_model()
    randomised.save_pretrained(str(folders / "adapter"))
    to_former(folders / "adapter")
    rename_tensors(folders / "adapter", "baft_load", "baft_gate_usage")
    write_config(folders / "adapter", lambda settings: settings.update(baft_format=1))
    loaded = PeftModel.from_pretrained(make_model(), folders / "adapter").eval()
    assert torch.equal(logits(loaded, tokens), logits(randomised, tokens))
