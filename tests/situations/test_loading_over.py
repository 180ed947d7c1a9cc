"""A saved adapter is loaded, or a model wrapped, under a name that exists: the new adapter is there whole, or nothing changed."""

# mypy: disable-error-code="union-attr, arg-type, attr-defined, operator, index, misc"
from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn

from adapters import is_bare
from conftest import VOCABULARY, make_model
from peft_baft import BaftConfig
from peft_baft.adapter import baft_layers
from side_by_side import METHODS, OLD_PEFT, adapted, config_of, draw_adapter

IDS = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))
every_method = pytest.mark.parametrize("method", METHODS)
SECOND = "ignore:You are trying to modify a model with PEFT for a second time:UserWarning"


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=IDS).logits


def saved(folder: Path, method: str = "baft", seed: int = 1, **settings: Any) -> Path:
    adapted(method, seed=seed, **settings).save_pretrained(str(folder))
    return folder


def with_any_basis(model: PeftModel) -> PeftModel:
    """Give an adapter bases whose rows are not orthonormal already."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for layer in baft_layers(model):
            layer.baft_basis["default"].weight.normal_(generator=generator)
    return model


def loaded(folder: Path) -> PeftModel:
    return PeftModel.from_pretrained(make_model(), str(folder)).eval()


def state_of(model: nn.Module) -> Any:
    """What may not change: tensors, flags, modules, hooks, configs."""
    modules = dict(model.named_modules())
    return (
        {name: tensor.tolist() for name, tensor in model.state_dict().items()},
        [(name, p.requires_grad) for name, p in model.named_parameters()],
        {name: id(module) for name, module in modules.items()},
        {n: (list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in modules.items()},
        {n: (m.active_adapter, dict(m.configs)) for n, m in modules.items() if n.endswith("baft")},
        {name: deepcopy(vars(c)) for name, c in getattr(model, "peft_config", {}).items()},
        sorted(vars(model)),
    )


def assert_agree(model: PeftModel, settings: dict[str, Any]) -> None:
    """Every place that holds settings of the adapter holds these."""
    config = model.peft_config["default"]
    assert model.get_base_model().peft_config["default"] is config
    for layer in baft_layers(model):
        assert layer.configs["default"] is config
        gate = layer.baft_gate["default"]
        assert (gate.norm, gate.offset) == (config.gate_norm, config.gate_offset)
        assert layer.baft_basis["default"].pack_ranks == config.pack_ranks
    assert {name: getattr(config, name) for name in settings} == settings


# load_adapter


@every_method
def test_a_file_loaded_over_an_adapter_is_what_is_computed(method: str, tmp_path: Path) -> None:
    model = loaded(saved(tmp_path / "first", method))
    second = saved(tmp_path / "second", method, seed=2)
    expected = logits(loaded(second))
    assert not torch.allclose(logits(model), expected, atol=0.1)  # the control
    model.load_adapter(str(second), "default")
    torch.testing.assert_close(logits(model), expected)


SETTINGS: dict[str, dict[str, Any]] = {
    "prompt_positions": {"prompt_positions": 1},
    "answer_positions": {"answer_positions": 0, "prompt_positions": 5},
    "gate_offset": {"gate_offset": -2.0},
    "gate_norm": {"gate_norm": "none"},
    "pack_ranks": {"pack_ranks": [2, 2]},
    "template": {"template": "chat", "template_hash": "0123"},
    "balance_weight": {"balance_weight": 0.5},
}


@pytest.mark.parametrize("what", SETTINGS)
@pytest.mark.parametrize(
    "begin", ["loaded", "fresh"]
)  # fresh: as Trainer resumes from a checkpoint
def test_the_settings_of_the_file_are_taken_over(what: str, begin: str, tmp_path: Path) -> None:
    second = with_any_basis(adapted("baft", seed=2))
    second.save_pretrained(str(tmp_path / "plain"))
    for name, value in SETTINGS[what].items():
        setattr(second.peft_config["default"], name, value)
    second.peft_config["default"].baft_format = (
        2 if what in ("answer_positions", "pack_ranks") else 1
    )
    second.save_pretrained(str(tmp_path / "second"))
    expected = logits(loaded(tmp_path / "second"))
    plain = loaded(tmp_path / "plain")  # the same weights, other settings
    fresh = get_peft_model(make_model(), config_of("baft")).eval()
    model = fresh if begin == "fresh" else loaded(saved(tmp_path / "first"))
    logits(model)  # what is remembered between forwards is there
    before = model.peft_config["default"]
    model.load_adapter(str(tmp_path / "second"), "default")
    assert model.peft_config["default"] is before
    torch.testing.assert_close(logits(model), expected)
    if what not in ("template", "balance_weight"):
        assert not torch.allclose(logits(plain), expected, atol=1e-3)  # the control
    assert_agree(model, SETTINGS[what])
    assert before.inference_mode is (begin == "loaded")


def test_loading_again_from_a_folder_that_has_changed_takes_its_settings(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path))
    saved(tmp_path, seed=2, prompt_positions=1)
    model.load_adapter(str(tmp_path), "default")
    torch.testing.assert_close(logits(model), logits(loaded(tmp_path)))
    assert_agree(model, {"prompt_positions": 1})


OTHERS: dict[str, dict[str, Any]] = {
    "blocks": {"layers_to_transform": [2, 3]},
    "more blocks": {"layers_to_transform": [0, 1, 2, 3]},
    "rank": {"r": 5},
    "gate_norm": {"gate_norm": "scale"},
    "gate_bias": {"gate_bias": True},
    "no gates": {"weighting": "none"},
    "one gate": {"weighting": "subspace"},
    "a shared gate": {"weighting": "product"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("other_way", [False, True])
def test_other_parameters_are_refused_and_nothing_changes(
    what: str, other_way: bool, tmp_path: Path
) -> None:
    plain = {"r": 4, "gate_offset": 0.0, "task_type": "CAUSAL_LM", "layers_to_transform": [0, 1, 2]}
    configs = [BaftConfig(**plain), BaftConfig(**plain | OTHERS[what])]
    second, first = [
        get_peft_model(make_model(), config) for config in configs[:: -1 if other_way else 1]
    ]
    second.save_pretrained(str(tmp_path))
    before = state_of(first)
    with pytest.raises(ValueError, match=r"has other parameters than 'default'.*adapter_name"):
        first.load_adapter(str(tmp_path), "default")
    assert state_of(first) == before


def test_what_is_no_baft_adapter_is_refused_over_one(tmp_path: Path) -> None:
    model = adapted("baft")
    before = state_of(model)
    saved(tmp_path / "lora", "lora")
    with pytest.raises(ValueError, match="of type LORA"):
        model.load_adapter(str(tmp_path / "lora"), "default")
    saved(tmp_path / "torn")
    (tmp_path / "torn" / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be read"):
        model.load_adapter(str(tmp_path / "torn"), "default")
    (tmp_path / "torn" / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="adapter_config"):
        model.load_adapter(str(tmp_path / "torn"), "default")
    assert state_of(model) == before


@pytest.mark.skipif(OLD_PEFT, reason="PEFT 0.20 asks no tuner when it loads tensors")
def test_a_config_that_is_passed_counts_and_one_that_does_not_fit_is_refused(
    tmp_path: Path,
) -> None:
    saved(tmp_path)
    config = BaftConfig.from_pretrained(str(tmp_path))
    config.prompt_positions = 1
    model = PeftModel.from_pretrained(make_model(), str(tmp_path), config=config)
    assert_agree(model, {"prompt_positions": 1})
    base = make_model()
    before = state_of(base)
    fewer = config_of("baft", layers_to_transform=[0, 1])
    with pytest.raises(ValueError, match="has no such part"):
        PeftModel.from_pretrained(base, str(tmp_path), config=fewer)
    assert is_bare(base) and state_of(base) == before


# from_pretrained on a model that has an adapter


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
@every_method
def test_loading_twice_on_one_base_computes_with_the_second(method: str, tmp_path: Path) -> None:
    first, second = saved(tmp_path / "1", method), saved(tmp_path / "2", method, seed=2)
    base = make_model()
    PeftModel.from_pretrained(base, str(first))
    model = PeftModel.from_pretrained(base, str(second)).eval()
    torch.testing.assert_close(logits(model), logits(loaded(second)))


def test_the_second_replaces_the_first_whole_and_says_so(tmp_path: Path, caplog: Any) -> None:
    saved(tmp_path / "1", layers_to_transform=[0, 1], modules_to_save=["lm_head"])
    saved(tmp_path / "2", seed=2, layers_to_transform=[2, 3], prompt_positions=1)
    saved(tmp_path / "other", seed=3)
    expected = logits(loaded(tmp_path / "2"))
    base = make_model()
    first = PeftModel.from_pretrained(base, str(tmp_path / "1"))
    first.load_adapter(str(tmp_path / "other"), "other")
    caplog.clear()
    second = PeftModel.from_pretrained(base, str(tmp_path / "2")).eval()
    assert [record.message for record in caplog.records if "is replaced by" in record.message]
    torch.testing.assert_close(logits(second), expected)
    assert type(base.lm_head) is nn.Linear
    assert second.peft_config["default"] is first.peft_config["default"]
    second.set_adapter("other")
    torch.testing.assert_close(logits(second), logits(loaded(tmp_path / "other")))
    second.set_adapter("default")
    second.save_pretrained(str(tmp_path / "again"))
    torch.testing.assert_close(logits(loaded(tmp_path / "again")), expected)
    assert is_bare(second.unload())


def test_a_second_one_that_fails_leaves_the_first_as_it_was(
    tmp_path: Path, monkeypatch: Any
) -> None:
    saved(tmp_path / "1", layers_to_transform=[0, 1], modules_to_save=["lm_head"])
    saved(tmp_path / "2", seed=2, layers_to_transform=[2, 3])
    base = make_model()
    first = PeftModel.from_pretrained(base, str(tmp_path / "1")).eval()
    before, expected = state_of(first), logits(first)
    monkeypatch.setattr(peft.peft_model, "set_peft_model_state_dict", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        PeftModel.from_pretrained(base, str(tmp_path / "2"))
    with pytest.raises(RuntimeError, match="on purpose"):
        first.load_adapter(str(tmp_path / "2"), "second")
    assert state_of(first) == before and torch.equal(logits(first), expected)
    assert list(first.peft_config) == ["default"]
    monkeypatch.undo()
    first.load_adapter(str(tmp_path / "2"), "second")
    PeftModel.from_pretrained(base, str(tmp_path / "2"))


def fail(*_: Any, **__: Any) -> Any:
    raise RuntimeError("on purpose")


# a new adapter under a name that exists


@pytest.mark.filterwarnings(SECOND)
@pytest.mark.parametrize("blocks", [[0, 1], [2, 3]])
@pytest.mark.parametrize("wrapped", ["base", "PeftModel"])
def test_wrapping_an_edit_again_under_its_name_is_refused(
    blocks: list[int], wrapped: str, tmp_path: Path
) -> None:
    base = make_model()
    saved(tmp_path, layers_to_transform=[0, 1])
    model = PeftModel.from_pretrained(base, str(tmp_path), is_trainable=True).eval()
    before, expected = state_of(model), logits(model)
    again = config_of("baft", layers_to_transform=blocks)
    with pytest.raises(ValueError, match=r"carries a BaFT adapter 'default'.*load_adapter.*unload"):
        get_peft_model(base if wrapped == "base" else model, again)
    with pytest.raises(ValueError, match="carries a BaFT adapter 'default'"):
        inject_adapter_in_model(again, base)
    assert state_of(model) == before and torch.equal(logits(model), expected)
    # What the message names works.
    other = get_peft_model(base, deepcopy(again), adapter_name="other")
    assert other.active_adapters == ["other"] and len(other.peft_config) == 2
    get_peft_model(other.unload(), again)


# a failure at any step


@pytest.mark.parametrize("step", ["_set_trainable", "_mark_only_adapters_as_trainable", "attach"])
def test_an_attachment_that_fails_leaves_the_model_as_it_was(step: str, monkeypatch: Any) -> None:
    base = make_model()
    before = state_of(base)
    model = adapted("baft", modules_to_save=["norm"])
    held = state_of(model)
    if step == "_set_trainable":
        monkeypatch.setattr(peft.utils.other, step, fail)
    elif step == "attach":
        monkeypatch.setattr("peft_baft.adapter.layer.BaftLayer.set_adapter", fail)
    else:
        monkeypatch.setattr(peft.tuners.tuners_utils.BaseTuner, step, fail)
    config = config_of("baft", modules_to_save=["lm_head"], balance_weight=0.1)
    with pytest.raises(RuntimeError, match="on purpose"):
        get_peft_model(base, config)
    with pytest.raises(RuntimeError, match="on purpose"):
        model.add_adapter("second", config)
    assert is_bare(base) and state_of(base) == before
    assert state_of(model) == held and list(model.peft_config) == ["default"]
    monkeypatch.undo()
    get_peft_model(base, config)
    model.add_adapter("second", config)
    draw_adapter(model, "second", 2)
    model.set_adapter("second")


def test_a_module_that_cannot_be_saved_leaves_the_model_bare() -> None:
    base = make_model()
    before = state_of(base)
    with pytest.raises(ValueError, match="not found"):
        get_peft_model(base, config_of("baft", modules_to_save=["layers"]))
    assert is_bare(base) and state_of(base) == before
    with pytest.raises(TypeError, match="ModuleList"):
        get_peft_model(base, config_of("baft", modules_to_save=["layers"], target_modules=["norm"]))
    assert is_bare(base) and state_of(base) == before


# saving


def unreadable(model: PeftModel) -> dict[str, Any]:
    """Ways to make a model's adapter one that could not be loaded, and what the error says."""
    config, layer = model.peft_config["default"], baft_layers(model)[0]

    def spoil(tensor: Tensor, value: float) -> None:
        with torch.no_grad():
            tensor.view(-1)[0] = value

    return {
        "NaN": lambda: spoil(layer.baft_source["default"].weight, float("nan")),
        "holds NaN, infinity": lambda: spoil(layer.baft_gate_usage["default"], float("inf")),
        "lm_head": lambda: spoil(model.get_base_model().lm_head.weight, float("nan")),
        "prompt_positions": lambda: setattr(config, "prompt_positions", 0),
        "instead of": lambda: setattr(config, "r", 5),
        "is missing": lambda: config.target_modules.append("model.layers.9"),
        "JSON": lambda: setattr(config, "template_hash", IDS),
    }


@pytest.mark.parametrize(
    "message",
    [
        "NaN",
        "holds NaN, infinity",
        "lm_head",
        "prompt_positions",
        "instead of",
        "is missing",
        "JSON",
    ],
)
def test_what_could_not_be_loaded_is_not_saved_and_the_old_folder_stays(
    message: str, tmp_path: Path
) -> None:
    model = adapted("baft", modules_to_save=["lm_head"], layers_to_transform=[0, 1])
    model.save_pretrained(str(tmp_path / "old"))
    before = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}
    unreadable(model)[message]()
    for folder in ("old", "new"):
        with pytest.raises(ValueError, match=f"(?s)could not be loaded again.*{message}"):
            model.save_pretrained(str(tmp_path / folder))
    assert {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()} == before
    assert not (tmp_path / "new").exists()
    model.save_pretrained(str(tmp_path / "new"), is_main_process=False)  # writes nothing
    loaded(tmp_path / "old")


def test_a_pickle_that_would_not_be_read_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safetensors only"):
        adapted("baft").save_pretrained(str(tmp_path / "new"), safe_serialization=False)
    assert not (tmp_path / "new").exists()
    adapted("lora").save_pretrained(str(tmp_path / "lora"), safe_serialization=False)
    assert (tmp_path / "lora" / "adapter_model.bin").exists()  # other methods are left alone


def test_one_bad_adapter_of_several_stops_the_saving_of_all_that_were_chosen(
    tmp_path: Path,
) -> None:
    model = adapted("baft")
    model.add_adapter("second", config_of("baft"))
    model.peft_config["second"].gate_offset = float("nan")
    with pytest.raises(ValueError, match="'second'"):
        model.save_pretrained(str(tmp_path / "all"))
    assert not (tmp_path / "all").exists()
    model.save_pretrained(str(tmp_path / "one"), selected_adapters=["default"])
    assert json.loads((tmp_path / "one" / "adapter_config.json").read_text())["r"] == 4
