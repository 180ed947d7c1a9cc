"""A BaFT adapter on a base model that carries an adapter of another PEFT method: each leaves the other alone."""

# mypy: disable-error-code="arg-type, attr-defined, union-attr"
from __future__ import annotations

import logging
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from peft.tuners.lora import LoraLayer

import facts
from adapters import config, logits
from conftest import make_model, randomise
from facts import ADAPTER, DESCENT, FactModel, edits
from peft_baft import NARROW, AdapterEditor, BaftConfig, BaftEditor
from peft_baft.adapter import baft_layers
from peft_baft.adapter.state import adapter_tensors, without_adapters

fact_model = facts.fact_model
pytestmark = pytest.mark.filterwarnings(
    "ignore:You are trying to modify a model with PEFT for a second time",  # by PEFT, at every second adapter
    "ignore:Already found a `peft_config` attribute in the model",  # by PEFT, where a LoRA is injected second
)


def lora_config(**settings: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    )


def strengthen(model: torch.nn.Module) -> None:
    """Give a LoRA weights that are the same every time and show in the logits."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def in_a_peft_model(base: Any, name: str) -> Any:
    return get_peft_model(base, lora_config(), adapter_name=name)


def in_the_base_of_a_peft_model(base: Any, name: str) -> Any:
    return in_a_peft_model(base, name).get_base_model()


def injected(base: Any, name: str) -> Any:
    return inject_adapter_in_model(lora_config(), base, adapter_name=name)


LORAS: dict[str, Callable[[Any, str], Any]] = {
    "PeftModel": in_a_peft_model,
    "its base model": in_the_base_of_a_peft_model,
    "injected": injected,
}


def lora_state(model: torch.nn.Module) -> dict[str, Any]:
    """All of a LoRA that a BaFT adapter must leave alone: values, flags, which is active, whether it is on."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    tensors = [
        (n, p.detach().clone(), p.requires_grad)
        for m in layers
        for n, p in m.named_parameters()
        if "lora_" in n
    ]
    return {
        "tensors": tensors,
        "layers": [(m.active_adapters, m.disable_adapters, m.merged) for m in layers],
    }


def same_lora(one: dict[str, Any], two: dict[str, Any]) -> bool:
    pairs = zip(one["tensors"], two["tensors"], strict=True)
    equal = all(a[0] == b[0] and torch.equal(a[1], b[1]) and a[2] == b[2] for a, b in pairs)
    return bool(one["tensors"]) and equal and one["layers"] == two["layers"]


@pytest.mark.parametrize("name", ["default", "facts"])
@pytest.mark.parametrize("how", LORAS)
def test_an_edit_beside_a_lora_is_learned_saved_and_taken_off_and_the_lora_stays(
    how: str, name: str, fact_model: FactModel, tmp_path: Path
) -> None:
    def with_lora() -> Any:
        base = LORAS[how](deepcopy(fact_model.base), "default").eval()
        strengthen(base)
        return base

    base = with_lora()
    ids = fact_model.tokenizer([edit.prompt for edit in edits(0, 1)], return_tensors="pt")[
        "input_ids"
    ]
    lora, before = lora_state(base), logits(base, ids)
    # The control: the LoRA does something.
    assert not torch.equal(before, logits(fact_model.base, ids))

    torch.manual_seed(0)
    model = get_peft_model(
        base, BaftConfig(task_type="CAUSAL_LM", **ADAPTER), adapter_name=name
    ).eval()
    assert torch.equal(logits(model, ids), before) and same_lora(lora, lora_state(base))
    editor = BaftEditor(model, fact_model.tokenizer, descent=DESCENT, scope=NARROW)
    assert {id(t) for t in adapter_tensors(model)} == {
        id(t) for layer in baft_layers(model) for t in (*layer.parameters(), *layer.buffers())
    }
    assert editor.edit(edits(0)).learned
    edited = logits(model, ids)
    assert not torch.equal(edited, before) and same_lora(lora, lora_state(base))

    with model.disable_adapter():
        assert torch.equal(logits(model, ids), before) and same_lora(lora, lora_state(base))
    with without_adapters(model):
        assert torch.equal(logits(model, ids), before)
    assert torch.equal(logits(model, ids), edited) and same_lora(lora, lora_state(base))

    model.save_pretrained(str(tmp_path / "edit"))
    reloaded = PeftModel.from_pretrained(
        with_lora(), tmp_path / "edit" / ("" if name == "default" else name)
    ).eval()
    assert torch.equal(logits(reloaded, ids), edited)

    assert model.unload() is base
    assert (
        not baft_layers(base)
        and torch.equal(logits(base, ids), before)
        and same_lora(lora, lora_state(base))
    )


def test_an_edit_over_a_merged_lora_is_the_edit_beside_the_unmerged_one(
    fact_model: FactModel, tmp_path: Path
) -> None:
    def with_lora() -> Any:
        around = in_a_peft_model(deepcopy(fact_model.base), "default").eval()
        strengthen(around)
        return around

    ids = fact_model.tokenizer([edits(0)[0].prompt], return_tensors="pt")["input_ids"]
    torch.manual_seed(0)
    beside = get_peft_model(
        with_lora(), BaftConfig(task_type="CAUSAL_LM", **ADAPTER), adapter_name="facts"
    ).eval()
    editor = BaftEditor(beside, fact_model.tokenizer, descent=DESCENT, scope=NARROW)
    assert editor.edit(edits(0)).learned
    beside.save_pretrained(str(tmp_path))
    merged = with_lora().merge_and_unload()
    over = PeftModel.from_pretrained(merged, str(tmp_path / "facts")).eval()
    torch.testing.assert_close(logits(over, ids), logits(beside, ids), atol=1e-4, rtol=1e-4)
    # The control: on the model without the LoRA the same adapter does something else.
    bare = PeftModel.from_pretrained(deepcopy(fact_model.base), str(tmp_path / "facts")).eval()
    assert (logits(bare, ids) - logits(beside, ids)).abs().max() > 1e-2
    # One that is made over the merged model is learned there as well.
    torch.manual_seed(0)
    again = get_peft_model(over.unload(), BaftConfig(task_type="CAUSAL_LM", **ADAPTER)).eval()
    assert (
        BaftEditor(again, fact_model.tokenizer, descent=DESCENT, scope=NARROW)
        .edit(edits(0))
        .learned
    )


def test_an_adapters_file_does_not_depend_on_the_peft_model_around_its_base(
    tokens, tmp_path: Path
) -> None:
    around = get_peft_model(in_a_peft_model(make_model(), "other"), config())
    randomise(around)
    around.save_pretrained(str(tmp_path))
    alone = PeftModel.from_pretrained(make_model(), tmp_path).eval()
    plain = get_peft_model(make_model(), config()).eval()
    assert (
        alone.peft_config["default"].target_modules == plain.peft_config["default"].target_modules
    )
    assert [layer.name for layer in baft_layers(alone)] == [
        layer.name for layer in baft_layers(plain)
    ]
    pairs = zip(baft_layers(around), baft_layers(alone), strict=True)
    assert all(
        torch.equal(a.baft_source["default"].weight, b.baft_source["default"].weight)
        for a, b in pairs
    )


def test_the_other_methods_config_is_not_shared_so_neither_saves_the_others_adapter(
    tokens, tmp_path: Path
) -> None:
    lora = in_a_peft_model(make_model(), "default")
    model = get_peft_model(lora, config(), adapter_name="facts")
    assert list(lora.peft_config) == ["default"] and list(model.peft_config) == ["facts"]
    model.save_pretrained(str(tmp_path))
    assert (
        not (tmp_path / "adapter_config.json").exists()
        and (tmp_path / "facts" / "adapter_config.json").exists()
    )
    assert set(lora.get_base_model().peft_config) == {"default", "facts"}
    model.unload()
    assert set(lora.get_base_model().peft_config) == {"default"}


@pytest.mark.parametrize("second", ["other", "second"])
def test_switching_freezing_and_deleting_change_our_adapters_alone(second: str, tokens) -> None:
    base = injected(make_model(), "other")
    strengthen(base)
    model = get_peft_model(base, config()).eval()
    model.add_adapter(second, config())
    randomise(model)
    lora = lora_state(base)
    layers = baft_layers(model)
    model.set_adapter(second)
    assert all(layer.active_adapters == [second] for layer in layers) and same_lora(
        lora, lora_state(base)
    )
    model.set_requires_grad(second, False)
    assert not any(p.requires_grad for layer in layers for p in layer.parameters())
    assert same_lora(lora, lora_state(base))
    model.set_adapter("default")
    model.delete_adapter(second)
    assert same_lora(lora, lora_state(base)) and list(model.peft_config) == ["default"]
    assert all(list(layer.baft_source) == ["default"] for layer in layers)


def test_whole_modules_that_each_saves_are_its_own(tokens) -> None:
    base = inject_adapter_in_model(
        lora_config(modules_to_save=["lm_head"]), make_model(), adapter_name="default"
    )
    wrapper = base.lm_head
    model = get_peft_model(base, config(modules_to_save=["model.norm"])).eval()
    before = wrapper.active_adapters, wrapper.disable_adapters, set(wrapper.modules_to_save)
    model.add_adapter("second", config())
    model.set_adapter("second")
    with model.disable_adapter():
        assert (
            wrapper.active_adapters,
            wrapper.disable_adapters,
            set(wrapper.modules_to_save),
        ) == before
    model.delete_adapter("default")
    assert (
        wrapper.active_adapters,
        wrapper.disable_adapters,
        set(wrapper.modules_to_save),
    ) == before
    model.unload()
    assert base.lm_head is wrapper and type(base.model.norm) is type(make_model().model.norm)
    with pytest.raises(ValueError, match=r"lm_head belongs to an adapter of another PEFT method"):
        get_peft_model(base, config(modules_to_save=["lm_head"]))
    assert not baft_layers(base)


@pytest.mark.parametrize("name", ["default", "other"])
def test_a_lora_that_is_injected_after_an_edit_is_left_alone_too(
    name: str, fact_model: FactModel
) -> None:
    base = deepcopy(fact_model.base)
    ids = fact_model.tokenizer(edits(0)[0].prompt, return_tensors="pt")["input_ids"]
    model = get_peft_model(base, BaftConfig(task_type="CAUSAL_LM", **ADAPTER)).eval()
    editor = BaftEditor(model, fact_model.tokenizer, descent=DESCENT, scope=NARROW)
    assert editor.edit(edits(0)).learned
    injected(base, name)
    strengthen(base)
    lora = lora_state(base)
    with model.disable_adapter():
        unedited = logits(model, ids)
    assert not torch.equal(unedited, logits(fact_model.base, ids))
    assert editor.edit(edits(1)).learned and same_lora(lora, lora_state(base))
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model.unload(), ids), unedited) and same_lora(lora, lora_state(base))


def test_an_editor_of_a_lora_leaves_a_baft_adapter_alone(fact_model: FactModel) -> None:
    base = deepcopy(fact_model.base)
    baft = get_peft_model(base, BaftConfig(task_type="CAUSAL_LM", **ADAPTER))
    randomise(baft, scale=0.01)
    lora = get_peft_model(base, lora_config())
    before = [
        (p.detach().clone(), p.requires_grad)
        for layer in baft_layers(base)
        for p in layer.parameters()
    ]
    losses = AdapterEditor(lora, fact_model.tokenizer, DESCENT).edit(edits(0)).losses
    assert losses["teacher_forcing"] < 1
    after = [(p, p.requires_grad) for layer in baft_layers(base) for p in layer.parameters()]
    assert all(
        torch.equal(a, b) and flag == was for (a, was), (b, flag) in zip(before, after, strict=True)
    )


def test_adapters_of_half_precision_are_not_cast_by_ours() -> None:
    base = get_peft_model(
        make_model().to(torch.bfloat16), lora_config(), autocast_adapter_dtype=False
    )
    get_peft_model(base, config())
    assert {
        p.dtype for m in base.modules() if isinstance(m, LoraLayer) for p in m.parameters()
    } == {torch.bfloat16}
    assert {p.dtype for layer in baft_layers(base) for p in layer.parameters()} == {torch.float32}


def test_a_trainable_adapter_beside_ours_is_told_and_a_frozen_one_is_not(caplog) -> None:
    lora = in_a_peft_model(make_model(), "default")
    with caplog.at_level(logging.WARNING, logger="peft_baft"):
        get_peft_model(lora, config()).unload()
        assert "stays trainable" in caplog.text
        caplog.clear()
        lora.base_model.set_requires_grad("default", False)
        get_peft_model(lora, config())
        assert not caplog.text


@pytest.mark.parametrize(
    "other",
    [
        AdaLoraConfig(
            target_modules=["q_proj"], init_r=4, target_r=2, total_step=10, task_type="CAUSAL_LM"
        ),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM"),
    ],
    ids=["adalora", "ia3"],
)
def test_other_methods_than_lora_stay_as_well(other: Any, tokens) -> None:
    base = get_peft_model(make_model(), other).eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "ia3_" in name or "lora_E" in name:
                parameter.add_(0.5)
    before = logits(base, tokens)
    assert not torch.equal(before, logits(make_model(), tokens))
    model = get_peft_model(base, config()).eval()
    randomise(model)
    assert not torch.equal(logits(model, tokens), before)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), before)
    assert model.unload() is base and torch.equal(logits(base, tokens), before)


def test_an_adapter_that_acts_in_the_peft_models_own_forward_is_refused_before_anything_changes(
    tokens,
) -> None:
    prompted = get_peft_model(
        make_model(), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    with pytest.raises(ValueError, match=r"with an adapter of type PROMPT_TUNING.*unload it"):
        get_peft_model(prompted, config())
    assert not baft_layers(prompted)


def test_a_name_that_another_methods_adapter_has_is_refused_where_no_tuner_is_kept() -> None:
    base = injected(make_model(), "default")
    with pytest.raises(ValueError, match="choose another adapter_name"):
        inject_adapter_in_model(config(), base, adapter_name="default")
    assert not baft_layers(base)
    inject_adapter_in_model(config(), base, adapter_name="facts")
    assert baft_layers(base) and set(base.peft_config) == {"default", "facts"}


def test_a_module_that_a_lora_has_replaced_is_not_edited_but_refused() -> None:
    base = injected(make_model(), "default")
    with pytest.raises(ValueError, match=r"q_proj belongs to an adapter of another PEFT method"):
        get_peft_model(base, config(target_modules=["layers.1.self_attn.q_proj"]))
    assert not baft_layers(base)


def test_a_lora_that_transformers_loaded_stays_and_so_does_one_loaded_beside_a_loaded_edit(
    tokens, tmp_path
) -> None:
    lora = in_a_peft_model(make_model(), "default")
    strengthen(lora)
    lora.save_pretrained(str(tmp_path / "lora"))
    edit = get_peft_model(make_model(), config())
    randomise(edit)
    edit.save_pretrained(str(tmp_path / "edit"))
    base = make_model()
    base.load_adapter(str(tmp_path / "lora"), adapter_name="default")
    before, state = logits(base, tokens), lora_state(base)
    model = PeftModel.from_pretrained(base, tmp_path / "edit")
    both = logits(model, tokens)
    assert not torch.equal(both, before)
    with model.disable_adapter():
        assert torch.equal(logits(model, tokens), before)
    assert torch.equal(logits(model.unload(), tokens), before) and same_lora(
        state, lora_state(base)
    )
    assert list(base.peft_config) == ["default"]
    base.load_adapter(str(tmp_path / "edit"), adapter_name="facts")
    assert set(base.peft_config) == {"default", "facts"}
    for module in base.modules():
        if isinstance(module, LoraLayer):
            # Transformers switches all layers to the adapter that it loaded last.
            module.set_adapter("default")
    assert torch.equal(logits(base, tokens), both)
