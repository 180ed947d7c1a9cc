"""GRACE's codebook: radii, what matches, and that nothing else is touched."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor

import facts
from facts import CAPITALS, MEALS, FactModel, edits
from peft_baft import DescentConfig, Edit
from peft_baft.evaluation.scoring import greedy_answers, token_match
from peft_baft_bench.methods.grace import GAP, Grace, GraceEditor
from peft_baft_bench.methods.prompts import TrainingTexts

fact_model = facts.fact_model
QUICK = DescentConfig(lr=0.5, max_steps=60, weight_decay=0.0, stop_loss=0.02)


@pytest.fixture
def toy(fact_model: FactModel) -> FactModel:
    return FactModel(deepcopy(fact_model.base), fact_model.tokenizer)


def editor_of(toy: FactModel, radius: float = 0.5, **more: Any) -> GraceEditor:
    return Grace(radius=radius, descent=QUICK, **more).start(toy.base, toy.tokenizer)


def key_of(toy: FactModel, prompt: str) -> Tensor:
    """What enters the last down projection at the prompt's last token: the plain computation."""
    seen: list[Tensor] = []
    projection = toy.base.model.layers[3].mlp.down_proj
    handle = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        toy.base(torch.tensor([toy.tokenizer(prompt)["input_ids"]]))
    handle.remove()
    return seen[0][0, -1]


def test_the_key_is_what_enters_the_projection_at_the_last_prompt_token(toy: FactModel) -> None:
    expected = key_of(toy, CAPITALS[0].prompt)
    editor = editor_of(toy)  # 27 of 32 is 3 of 4
    assert editor.edit(edits(0)).learned
    torch.testing.assert_close(editor.state_dict()["keys"][0], expected)
    assert editor.state_dict()["radii"].tolist() == [0.5]


def test_radii_keep_different_answers_apart_and_equal_ones_together(toy: FactModel) -> None:
    keys = [key_of(toy, CAPITALS[i].prompt) for i in (0, 1)]
    distance = (keys[0] - keys[1]).norm().item()
    far = editor_of(toy, radius=distance / 2.5)
    far.edit(edits(0, 1))
    assert far.state_dict()["radii"].tolist() == pytest.approx([distance / 2.5] * 2)
    far.remove()
    near = editor_of(toy, radius=distance)
    near.edit(edits(0))
    near.edit(edits(1))
    radii = near.state_dict()["radii"].tolist()
    assert (
        radii == pytest.approx([distance / 2 - GAP, distance / 2], rel=1e-4) and radii[0] < radii[1]
    )
    near.remove()
    same = editor_of(toy, radius=distance * 0.6)
    same.edit(edits(0))
    same.edit([Edit(CAPITALS[1].prompt, edits(0)[0].target)])
    assert same.state_dict()["radii"].tolist() == pytest.approx([distance], rel=1e-4)
    pairs = [(CAPITALS[i].prompt, edits(0)[0].target) for i in (0, 1)]
    assert token_match(same.model, toy.tokenizer, pairs) == [1.0, 1.0]
    same.remove()


def test_a_prompt_that_matches_nothing_is_computed_bit_for_bit_as_before(toy: FactModel) -> None:
    prompts = [fact.prompt for fact in (*CAPITALS[4:8], *MEALS[:4])]
    ids = [torch.tensor([toy.tokenizer(prompt)["input_ids"]]) for prompt in prompts]
    with torch.no_grad():
        before = [toy.base(row).logits for row in ids]
        said = greedy_answers(toy.base, toy.tokenizer, prompts)
        editor = editor_of(toy, radius=1e-3)
        editor.edit(edits(0, 1, 2))
        assert all(torch.equal(toy.base(row).logits, b) for row, b in zip(ids, before, strict=True))
    assert greedy_answers(toy.base, toy.tokenizer, prompts) == said
    # The control: the edited ones are answered otherwise, in teacher forcing and in generation alike, in one batch.
    asked = [(edit.prompt, edit.target) for edit in edits(0, 1, 2)]
    assert token_match(toy.base, toy.tokenizer, asked) == [1.0] * 3
    answers = greedy_answers(toy.base, toy.tokenizer, [prompt for prompt, _ in asked])
    assert all(a.startswith(t) for a, (_, t) in zip(answers, asked, strict=True))
    editor.remove()


def test_a_value_replaces_what_leaves_the_projection_at_that_token_alone(toy: FactModel) -> None:
    editor = editor_of(toy)
    editor.edit(edits(0))
    ids = torch.tensor([[*toy.tokenizer(CAPITALS[0].prompt)["input_ids"], 7, 9]])
    labels = torch.tensor([[*[-100] * (ids.shape[1] - 2), 7, 9]])
    with torch.no_grad():
        found = toy.base(ids, labels=labels).logits
        value = editor.state_dict()["values"][0]
        editor.remove()
        projection = toy.base.model.layers[3].mlp.down_proj

        def put(_m: Any, _a: Any, out: Tensor) -> Tensor:
            out = out.clone()
            out[0, -3] = value
            return out

        handle = projection.register_forward_hook(put)
        torch.testing.assert_close(toy.base(ids).logits, found)
        handle.remove()
        assert not torch.allclose(toy.base(ids).logits[:, -3], found[:, -3])


def test_an_edit_that_breaks_off_leaves_the_codebook_as_it_was(
    toy: FactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = editor_of(toy)
    editor.edit(edits(0))
    before = {name: tensor.clone() for name, tensor in editor.state_dict().items()}
    whole, calls = TrainingTexts.loss, []

    def loss(taught: TrainingTexts) -> Tensor:
        calls.append(taught)
        return whole(taught) * (float("nan") if len(calls) > 3 else 1.0)

    monkeypatch.setattr(TrainingTexts, "loss", loss)
    with pytest.raises(FloatingPointError):
        editor.edit(edits(1, 3))
    assert all(torch.equal(t, before[n]) for n, t in editor.state_dict().items())
    editor.remove()


def test_bad_settings_are_refused() -> None:
    with pytest.raises(TypeError, match="grace: layer must be an integer"):
        Grace(layer="last")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="radius must be above 0"):
        Grace(radius=0.0)
