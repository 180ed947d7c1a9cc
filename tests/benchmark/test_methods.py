"""Methods by name, and what the protocol promises of every editor: it edits, goes on from its state, and can be removed."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

import facts
from facts import FactModel, edits
from peft_baft import DescentConfig
from peft_baft.baselines.ft_m import FineTuning, FineTuningEditor
from peft_baft.benchmark.methods import METHODS, method
from peft_baft.editing.editor import Editor
from peft_baft.editing.presets import PRESETS
from peft_baft.evaluation.scoring import token_match

fact_model = facts.fact_model
QUICK = ";lr=0.02;stop_loss=0.02;max_steps=60"


def start(name: str, toy: FactModel) -> Editor:
    settings = method(f"{name}:{QUICK.strip(';')}", PRESETS["default"]).settings
    return settings.start(toy.base, toy.tokenizer, facts.meals(0, 12), seed=3)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def toy(fact_model: FactModel) -> FactModel:
    return FactModel(deepcopy(fact_model.base), fact_model.tokenizer)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "adalora"])
def test_a_removed_editor_gives_the_base_model_back_bit_for_bit(toy: FactModel, name: str) -> None:
    before, flags = weights(toy.base), [p.requires_grad for p in toy.base.parameters()]
    editor = start(name, toy)
    (fact,) = edits(0)
    assert editor.edit([fact]).learned
    assert token_match(editor.model, toy.tokenizer, [(fact.prompt, fact.target)]) == [1.0]
    editor.remove()
    after = weights(toy.base)
    assert before.keys() == after.keys() and all(
        torch.equal(before[key], after[key]) for key in before
    )
    assert token_match(toy.base, toy.tokenizer, [(fact.prompt, fact.target)]) == [0.0]
    if name == "ft-m":  # PEFT freezes a base model for good
        assert [p.requires_grad for p in toy.base.parameters()] == flags


@pytest.mark.parametrize("name", [name for name in METHODS if name != "adalora"])
def test_a_fresh_editor_goes_on_from_the_state_of_another(toy: FactModel, name: str) -> None:
    editor = start(name, toy)
    editor.edit(edits(0))
    state = {key: tensor.clone() for key, tensor in editor.state_dict().items()}
    second = editor.edit(edits(3))
    expected = {key: tensor.clone() for key, tensor in editor.state_dict().items()}
    editor.remove()
    again = start(name, toy)
    again.load_state_dict(state)
    result = again.edit(edits(3))
    assert (result.steps, result.losses) == (second.steps, second.losses)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())
    assert not all(
        torch.equal(state[key], expected[key]) for key in state
    )  # the control: the second edit changed it
    again.remove()


# ft-m


def test_fine_tuning_changes_one_down_projection_alone(toy: FactModel) -> None:
    editor = start("ft-m", toy)
    before = weights(toy.base)
    editor.edit(edits(0, 3))
    changed = [
        key for key, tensor in toy.base.state_dict().items() if not torch.equal(tensor, before[key])
    ]
    assert changed == ["model.layers.3.mlp.down_proj.weight"]  # EasyEdit's 21 of 32 is 3 of 4


def test_fine_tuning_minimises_the_mean_loss_of_the_answer_tokens(toy: FactModel) -> None:
    just_look = FineTuning(descent=DescentConfig(stop_loss=1e9))
    batch = facts.collate([facts.encode(toy.tokenizer, e.prompt, e.target) for e in edits(0, 3)], 0)
    with torch.no_grad():
        expected = toy.base(**batch).loss.item()
    result = just_look.start(toy.base, toy.tokenizer).edit(edits(0, 3))
    assert (
        result.losses["teacher_forcing"] == pytest.approx(expected, rel=1e-5) and result.steps == 0
    )


def test_fine_tuning_that_diverges_leaves_the_weight_as_it_was(toy: FactModel) -> None:
    editor = FineTuning(descent=DescentConfig(lr=1e30, stop_loss=0.0)).start(
        toy.base, toy.tokenizer
    )
    before = weights(toy.base)
    with pytest.raises(FloatingPointError):
        editor.edit(edits(0))
    assert all(torch.equal(tensor, before[key]) for key, tensor in toy.base.state_dict().items())
    assert all(p.grad is None for p in toy.base.parameters())


def test_fine_tuning_refuses_a_block_that_is_not_there(toy: FactModel) -> None:
    with pytest.raises(ValueError, match="a block of the model, 0 to 3, not 7"):
        FineTuningEditor(toy.base, toy.tokenizer, FineTuning(layer=7))
    toy.base.model.layers[2].mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match="no down projection"):
        FineTuningEditor(toy.base, toy.tokenizer, FineTuning(layer=2))


def test_settings_of_any_method_are_set_by_name() -> None:
    settings = method("ft-m:layer=2;lr=0.001", PRESETS["default"], {"max_steps": 7}).settings
    assert isinstance(settings, FineTuning)
    assert (settings.layer, settings.descent.lr, settings.descent.max_steps) == (2, 0.001, 7)
    assert settings.described() == {"layer": 2, "descent": settings.described()["descent"]}
    with pytest.raises(
        ValueError, match=r"ft-m:gamma=1: unknown setting 'gamma'; known are clip_norm, layer, lr"
    ):
        method("ft-m:gamma=1", PRESETS["default"])
