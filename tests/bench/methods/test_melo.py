"""MELO's clusters and its pool of LoRAs: which one answers, and that nothing else is touched."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

import facts
from facts import MEALS, FactModel, edits
from peft_baft import DescentConfig
from peft_baft.evaluation.scoring import greedy_answers, token_match
from peft_baft_bench.methods.grace import GAP
from peft_baft_bench.methods.melo import NO_LORA, Melo, MeloEditor
from peft_baft_bench.methods.prompts import TrainingTexts

fact_model = facts.fact_model
QUICK = DescentConfig(lr=0.02, max_steps=60, weight_decay=0.0, stop_loss=0.03)
ANSWER, OTHER = torch.tensor([7, 8]), torch.tensor([9])


@pytest.fixture
def toy(fact_model: FactModel) -> FactModel:
    return FactModel(deepcopy(fact_model.base), fact_model.tokenizer)


def editor_of(toy: FactModel, **settings: Any) -> MeloEditor:
    chosen: dict[str, Any] = {"layer": 0, "scaling": 20.0, "descent": QUICK} | settings
    return Melo(**chosen).start(toy.base, toy.tokenizer)


def key(*values: float) -> torch.Tensor:
    """A key that is zero but for its first numbers."""
    return torch.tensor([*values, *[0.0] * (128 - len(values))])


def test_clusters_grow_with_equal_answers_and_part_from_others(toy: FactModel) -> None:
    editor = editor_of(toy, radius=1.0)
    editor._assign_to_cluster(key(0.0), ANSWER, 0)
    editor._assign_to_cluster(
        key(1.8), ANSWER, 1
    )  # within both radii: one cluster, with its centre between them
    assert editor._centres[:, 0].tolist() == pytest.approx([0.9])
    assert editor._radii.tolist() == [1.0]
    queries = torch.stack([key(0.1), key(1.7), key(5.0)])
    assert editor.choose(queries).tolist() == [0, 1, NO_LORA]
    editor._assign_to_cluster(key(9.0), OTHER, 2)  # far away: a cluster of its own
    assert editor._radii.tolist() == [1.0, 1.0]
    editor._assign_to_cluster(
        key(2.1), OTHER, 3
    )  # near the first: both shrink to half the distance between them
    assert editor._radii.tolist() == pytest.approx([0.6 - GAP, 1.0, 0.6 + GAP])
    # Of the first cluster no edit is within its radius any more: it answers nothing.
    queries = torch.stack([key(0.9), key(0.0), key(2.1), key(9.0)])
    assert editor.choose(queries).tolist() == [NO_LORA, NO_LORA, 3, 2]


def test_a_batch_shares_loras_and_a_later_edit_gets_one_of_its_own(toy: FactModel) -> None:
    editor = editor_of(toy, edits_a_lora=2)
    editor.edit(edits(0, 1, 2))
    assert editor.state_dict()["loras"].tolist() == [0, 0, 1]
    editor.edit(edits(5))
    first, second = editor._a.values()
    assert len(first) == len(second) == 3
    asked = [(edit.prompt, edit.target) for edit in edits(0, 1, 2, 5)]
    assert token_match(toy.base, toy.tokenizer, asked) == [1.0] * 4
    said = greedy_answers(toy.base, toy.tokenizer, [prompt for prompt, _ in asked])
    assert all(text.startswith(target) for text, (_, target) in zip(said, asked, strict=True))
    editor.remove()


def test_a_prompt_outside_every_cluster_is_computed_bit_for_bit_as_before(toy: FactModel) -> None:
    ids = [torch.tensor([toy.tokenizer(fact.prompt)["input_ids"]]) for fact in MEALS[:6]]
    with torch.no_grad():
        before = [toy.base(row).logits for row in ids]
        editor = editor_of(toy, radius=0.05)
        editor.edit(edits(0))
        assert all(torch.equal(toy.base(row).logits, b) for row, b in zip(ids, before, strict=True))
        editor.remove()
        wide = editor_of(toy, radius=1e4)  # the control
        wide.edit(edits(0))
        assert not torch.equal(toy.base(ids[0]).logits, before[0])


def test_an_edit_that_breaks_off_leaves_everything_as_it_was(
    toy: FactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = editor_of(toy)
    editor.edit(edits(0))
    before = {name: tensor.clone() for name, tensor in editor.state_dict().items()}
    monkeypatch.setattr(TrainingTexts, "loss", lambda taught: torch.tensor(float("nan")))
    with pytest.raises(FloatingPointError):
        editor.edit(edits(5))
    assert all(torch.equal(t, before[n]) for n, t in editor.state_dict().items())


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="rank must be an integer of at least 1"):
        Melo(rank=0)
    with pytest.raises(TypeError, match="layer must be an integer"):
        Melo(layer="first")  # type: ignore[arg-type]
