"""Loading an adapter from a dictionary of tensors: all of them are there, or nothing changes.

LoRA and IA3 load what there is, and leave the rest as it was drawn; transformers only logs what was missing.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters import is_bare, logits
from conftest import make_model
from peft_baft import BaftConfig
from peft_baft.adapter import baft_layers
from side_by_side import METHODS, OLD_PEFT, adapted

Tensors = dict[str, Tensor]
MISSING = r"model\.layers\.2\.baft\.baft_basis.* is missing"
PEFTS_OWN = pytest.mark.xfail(strict=True, reason="PEFT and transformers load what there is")


def without_a_block(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if ".layers.2." not in name}


def in_the_model(tensors: Tensors) -> Tensors:
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


def load_natively(tensors: Tensors, config: Any, name: str = "default") -> Any:
    model = make_model()
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    model.load_adapter(peft_config=config, adapter_state_dict=copies, adapter_name=name)
    return model.eval()


def inject_and_set(tensors: Tensors, config: Any) -> Any:
    model = inject_adapter_in_model(config, make_model(), state_dict=in_the_model(tensors))
    set_peft_model_state_dict(model, in_the_model(tensors))
    return model.eval()


def set_in_a_peft_model(tensors: Tensors, config: Any) -> Any:
    model = PeftModel(make_model(), config)
    set_peft_model_state_dict(model, tensors)
    return model.eval()


WAYS: dict[str, Callable[[Tensors, Any], Any]] = {
    "load_adapter": load_natively,
    "inject_adapter_in_model": inject_and_set,
    "set_peft_model_state_dict": set_in_a_peft_model,
}


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., tuple[Path, Tensors, Any]]:
    """Saves a method's adapter; its folder, its tensors, and its model."""

    def save(method: str = "baft", **settings: Any) -> tuple[Path, Tensors, Any]:
        model = adapted(method, **settings)
        model.save_pretrained(str(tmp_path))
        return tmp_path, load_file(tmp_path / "adapter_model.safetensors"), model

    return save


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_whole_tensors_give_the_adapter_that_was_saved(
    method: str, way: str, saved: Any, tokens: Tensor
) -> None:
    folder, tensors, model = saved(method)
    loaded = WAYS[way](tensors, PeftConfig.from_pretrained(str(folder)))
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    assert not torch.equal(logits(loaded, tokens), logits(make_model(), tokens))


OF_PEFTMODEL = pytest.param(
    "set_peft_model_state_dict",
    marks=pytest.mark.skipif(OLD_PEFT, reason="PEFT 0.20 asks no tuner when it loads tensors"),
)


@pytest.mark.parametrize("way", [*list(WAYS)[:2], OF_PEFTMODEL])
@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if m == "baft" else PEFTS_OWN) for m in METHODS]
)
def test_missing_tensors_are_refused_by_name(method: str, way: str, saved: Any) -> None:
    folder, tensors, _ = saved(method)
    with pytest.raises(ValueError, match=MISSING):
        WAYS[way](without_a_block(tensors), PeftConfig.from_pretrained(str(folder)))


@pytest.mark.parametrize("peft_way", [False, True], ids=["load_adapter", "inject"])
def test_a_model_is_left_bare_where_tensors_are_missing(peft_way: bool, saved: Any) -> None:
    folder, tensors, _ = saved()
    model, config = make_model(), PeftConfig.from_pretrained(str(folder))
    part = in_the_model(without_a_block(tensors))
    with pytest.raises(ValueError, match=MISSING):
        if peft_way:
            inject_adapter_in_model(config, model, state_dict=part)
        else:
            model.load_adapter(peft_config=config, adapter_state_dict=part)
    assert is_bare(model) and not hasattr(model, "peft_config")


def test_an_adapter_that_is_there_stays_as_it_is_where_a_second_ones_tensors_are_missing(
    saved: Any, tokens: Tensor
) -> None:
    folder, tensors, _ = saved()
    model = load_natively(tensors, PeftConfig.from_pretrained(str(folder)))
    before = logits(model, tokens)
    with pytest.raises(ValueError, match=MISSING):
        model.load_adapter(
            peft_config=PeftConfig.from_pretrained(str(folder)),
            adapter_state_dict=without_a_block(tensors),
            adapter_name="second",
        )
    assert torch.equal(logits(model, tokens), before) and list(model.peft_config) == ["default"]
    assert all(list(layer.baft_source) == ["default"] for layer in baft_layers(model))


NAMES: dict[str, Callable[[str, str], str]] = {
    "as saved": lambda name, _: name,
    "of the model": lambda name, _: name.removeprefix("base_model.model."),
    "of the stack": lambda name, _: name.removeprefix("base_model.model.model."),
    "as in its state_dict": lambda _, full: full.removeprefix("base_model.model."),
}


@pytest.mark.parametrize("name", ["default", "facts"])
@pytest.mark.parametrize("names", NAMES)
def test_tensors_may_have_the_names_that_transformers_finds(
    names: str, name: str, saved: Any, tokens: Tensor
) -> None:
    folder, tensors, _ = saved()
    model = adapted("baft", adapter_name=name)
    full = [one for one in model.state_dict() if "baft_" in one]
    assert len(full) == len(tensors)
    renamed = {
        NAMES[names](one.replace(f".{name}", ""), one): model.state_dict()[one] for one in full
    }
    loaded = load_natively(renamed, PeftConfig.from_pretrained(str(folder)), name)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
def test_tensors_under_names_that_transformers_does_not_find_are_refused(
    prefix: str, saved: Any
) -> None:
    folder, _, model = saved()
    full = {n: t for n, t in model.state_dict().items() if "baft_" in n}
    others = {prefix + n.removeprefix("base_model.model."): t for n, t in full.items()}
    with pytest.raises(ValueError, match="is missing"):
        load_natively(others, PeftConfig.from_pretrained(str(folder)), "default" if prefix else "b")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t[:1], r"is \(1, .*instead of \(4, "),
        (lambda t: t * float("nan"), "holds NaN"),
    ],
    ids=["shape", "nan"],
)
@pytest.mark.parametrize("in_memory", [True, False], ids=["in memory", "in a folder"])
def test_damaged_tensors_are_refused_before_the_model_is_touched(
    damage: Any, message: str, in_memory: bool, saved: Any
) -> None:
    folder, tensors, _ = saved()
    damaged = {name: damage(tensor).contiguous() for name, tensor in tensors.items()}
    save_file(damaged, folder / "adapter_model.safetensors")
    model, config = make_model(), PeftConfig.from_pretrained(str(folder))
    with pytest.raises(ValueError, match=message):
        if in_memory:
            model.load_adapter(peft_config=config, adapter_state_dict=damaged)
        else:
            model.load_adapter(str(folder))
    assert is_bare(model)


@pytest.mark.parametrize("what", ["missing", "more"])
def test_a_folder_that_transformers_loads_is_checked_as_one_that_peft_loads(
    what: str, saved: Any, tmp_path: Path
) -> None:
    folder, tensors, _ = saved()
    more = {**tensors, "base_model.model.model.norm.weight": torch.zeros(32)}
    damaged = without_a_block(tensors) if what == "missing" else more
    save_file(damaged, folder / "adapter_model.safetensors")
    inner = tmp_path / "more" / "inner"
    shutil.copytree(folder, inner, ignore=lambda *_: ["more"])
    model = make_model()
    for path, options in ((folder, {}), (tmp_path / "more", {"subfolder": "inner"})):
        with pytest.raises(ValueError, match=r"is missing|not part of its adapter"):
            model.load_adapter(str(path), adapter_kwargs=dict(options))
    assert is_bare(model)


def test_blocks_that_a_config_leaves_open_are_those_of_the_tensors(
    saved: Any, tokens: Tensor
) -> None:
    _, tensors, model = saved(layers_to_transform=[1, 3])
    config = BaftConfig(r=4, gate_offset=0.0)
    loaded = inject_and_set(tensors, config)
    assert [layer.name for layer in baft_layers(loaded)] == ["model.layers.1", "model.layers.3"]
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    with pytest.raises(ValueError, match=MISSING):  # the control: a config that names others
        inject_and_set(tensors, BaftConfig(r=4, gate_offset=0.0, layers_to_transform=[2]))


def test_saved_modules_are_asked_for_as_well(saved: Any, tokens: Tensor) -> None:
    folder, tensors, model = saved(modules_to_save=["norm"])
    config = PeftConfig.from_pretrained(str(folder))
    loaded = load_natively(tensors, config)
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    part = {name: tensor for name, tensor in tensors.items() if ".norm." not in name}
    with pytest.raises(ValueError, match=r"model\.norm\.weight is missing"):
        load_natively(part, PeftConfig.from_pretrained(str(folder)))


# hot-swapping


@pytest.mark.parametrize("first", ["lora", "baft"])
@pytest.mark.parametrize("enabled", [False, True])
def test_transformers_hotswap_is_refused_and_nothing_changes(
    first: str, enabled: bool, saved: Any, tokens: Tensor, tmp_path: Path
) -> None:
    adapted(first, seed=2).save_pretrained(str(tmp_path / "first"))
    second, _, edited = saved()
    model = make_model()
    if enabled:
        model.enable_peft_hotswap(target_rank=8)
    model.load_adapter(str(tmp_path / "first"), adapter_name="default")
    before = logits(model, tokens)
    with pytest.raises(ValueError, match=r"cannot be hot-swapped.*under another adapter_name"):
        model.load_adapter(str(second), adapter_name="default", hotswap="auto" if enabled else True)
    assert torch.equal(logits(model, tokens), before)
    if first == "baft":
        model.load_adapter(str(second), adapter_name="other", hotswap=False)
        assert torch.equal(logits(model, tokens), logits(edited, tokens))


@pytest.mark.parametrize("first", METHODS)
def test_pefts_hotswap_is_refused_and_nothing_changes(
    first: str, saved: Any, tokens: Tensor
) -> None:
    from peft.utils.hotswap import hotswap_adapter

    folder, _, _ = saved()
    model = adapted(first, seed=2)
    before = logits(model, tokens)
    with pytest.raises(ValueError, match=r"only supports LORA|Incompatible PEFT types"):
        hotswap_adapter(model, str(folder), "default", "cpu")
    assert torch.equal(logits(model, tokens), before)


def test_unreadable_folders_are_transformers_to_report(tmp_path: Path) -> None:
    model = make_model()
    with pytest.raises((OSError, ValueError)):
        model.load_adapter(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "NOTHING"}))
    with pytest.raises((OSError, ValueError, KeyError)):
        model.load_adapter(str(tmp_path))
    assert is_bare(model)
