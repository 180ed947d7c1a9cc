"""ROME's change of rank 1: what it makes of its key, what it leaves, and that plain PEFT loads it."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

import facts
from facts import CAPITALS, COUNTRIES, MEALS, FactModel
from facts import edits_with_subjects as edits
from peft_baft.evaluation.scoring import token_match
from peft_baft_bench.methods import locating
from peft_baft_bench.methods.locating import (
    Search,
    generate_prefixes,
    keys_and_outputs,
    locate_fact,
)
from peft_baft_bench.methods.rome import Rome, RomeEditor

fact_model = facts.fact_model
# The toy model's vectors are short, and it never saw a text before its prompts.
LEFT, RIGHT = (f"model.layers.0.mlp.down_proj.{side}" for side in ("left", "right"))
SEARCH = Search(max_steps=60, stop_loss=0.05, clamp=50.0, kl=0.0, weight_decay=0.0)


@pytest.fixture
def toy(fact_model: FactModel) -> FactModel:
    return FactModel(deepcopy(fact_model.base), fact_model.tokenizer)


def editor_of(toy: FactModel, **settings: Any) -> RomeEditor:
    chosen: dict[str, Any] = {"layer": 0, "contexts": 0, "search": SEARCH}
    return Rome(**(chosen | settings)).start(toy.base, toy.tokenizer)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_the_changed_weight_makes_the_searched_vector_of_the_key(toy: FactModel) -> None:
    editor, (edit,) = editor_of(toy), edits(0)
    before = weights(toy.base)
    assert editor.edit([edit]).learned
    assert token_match(toy.base, toy.tokenizer, [(edit.prompt, edit.target)]) == [1.0]
    changed = [k for k, t in toy.base.state_dict().items() if not torch.equal(t, before[k])]
    assert changed == ["model.layers.0.mlp.down_proj.weight"]
    difference = toy.base.state_dict()[changed[0]] - before[changed[0]]
    assert torch.linalg.matrix_rank(difference, rtol=1e-3) == 1
    # The key stands before the changed weight, so that it is what it was.
    located = locate_fact(toy.base, toy.tokenizer, edit, [], "rome")
    assert str(toy.tokenizer.decode(located.rows[0].ids[located.places[0]])).strip() == COUNTRIES[0]
    projection = toy.base.model.layers[0].mlp.down_proj
    (key,), output = keys_and_outputs(toy.base, toy.tokenizer, projection, projection, located)
    state = editor.state_dict()
    old = before[changed[0]] @ key
    # (W + Δ) k = v: the change is v - W k along the key, divided by what the direction makes of it.
    torch.testing.assert_close(
        output, old + state[LEFT][0] * (state[RIGHT][0] @ key), atol=1e-4, rtol=1e-4
    )
    # What is at a right angle to the direction is left alone.
    other = torch.randn(len(key))
    other -= (other @ state[RIGHT][0]) * state[RIGHT][0]
    torch.testing.assert_close(difference @ other, torch.zeros(len(old)), atol=1e-4, rtol=0)


def test_an_edit_spares_other_facts_that_a_large_change_would_not(toy: FactModel) -> None:
    editor = editor_of(toy)
    asked = [(fact.prompt, fact.answer) for fact in MEALS[:12]]
    assert token_match(toy.base, toy.tokenizer, asked) == [1.0] * 12
    editor.edit(edits(0))
    assert sum(token_match(toy.base, toy.tokenizer, asked)) >= 10
    state = editor.state_dict()
    editor.load_state_dict({LEFT: 50 * state[LEFT], RIGHT: state[RIGHT]})
    assert sum(token_match(toy.base, toy.tokenizer, asked)) < 10  # the control


@pytest.mark.parametrize("mean_key", [False, True])
def test_edits_in_sequence_are_each_of_rank_one_and_plain_peft_loads_them(
    toy: FactModel, tmp_path: Path, mean_key: bool
) -> None:
    editor = editor_of(toy, mean_key=mean_key, contexts=2)
    unedited = deepcopy(toy.base)
    for edit in edits(0, 5):
        editor.edit([edit])
    assert len(editor.state_dict()[LEFT]) == 2
    editor.save_lora(tmp_path / "lora")
    ids = torch.tensor([toy.tokenizer(CAPITALS[0].prompt)["input_ids"]])
    loaded = PeftModel.from_pretrained(unedited, str(tmp_path / "lora")).eval()
    assert loaded.peft_config["default"].peft_type == "LORA"
    with torch.no_grad():
        edited = toy.base(ids).logits
        torch.testing.assert_close(loaded(ids).logits, edited, atol=1e-4, rtol=1e-4)
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(ids).logits, edited, atol=1e-2)
    with pytest.raises(ValueError, match="not empty"):
        editor.save_lora(tmp_path / "lora")


def test_contexts_are_the_same_for_the_same_seed_and_leave_random_numbers_alone(
    toy: FactModel,
) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    found = generate_prefixes(toy.base, toy.tokenizer, ((3, 4),))
    assert torch.equal(torch.rand(1), expected)
    assert len(found) == 4 and found == generate_prefixes(toy.base, toy.tokenizer, ((3, 4),))
    assert found != generate_prefixes(toy.base, toy.tokenizer, ((3, 4),), seed=1)


def test_an_edit_that_breaks_off_leaves_the_weight_as_it_was(
    toy: FactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor, before = editor_of(toy), weights(toy.base)
    first, second = edits(0, 1)
    with pytest.raises(ValueError, match="names none: give Edit"):
        editor.edit([first, replace(second, subject=None)])
    losses, calls = locating.answer_losses, []

    def broken(*given: Any) -> torch.Tensor:
        calls.append(given)
        return losses(*given) * (float("nan") if len(calls) > 3 else 1.0)

    monkeypatch.setattr(locating, "answer_losses", broken)
    with pytest.raises(FloatingPointError, match="the loss became"):
        editor.edit([first])
    assert all(torch.equal(t, before[k]) for k, t in toy.base.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"lr": 0.0}, "lr must"), ({"max_steps": 0}, "max_steps must"), ({"kl": -1.0}, "kl must")],
)
def test_bad_settings_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Search(**changes)
    with pytest.raises(ValueError, match="contexts must be an integer of at least 0, not -1"):
        Rome(contexts=-1)
