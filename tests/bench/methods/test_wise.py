"""WISE's side memory: margins, masks, merging, the choice by prompt, and that nothing else is touched."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

import facts
from facts import MEALS, FactModel, edits
from peft_baft import DescentConfig
from peft_baft.evaluation.scoring import greedy_answers, token_match
from peft_baft_bench.methods.method import EditorSetup
from peft_baft_bench.methods.wise import Shard, Wise, WiseEditor, merge, positive_mean

fact_model = facts.fact_model
QUICK = DescentConfig(lr=1.0, max_steps=60, weight_decay=0.0, stop_loss=0.02)


@pytest.fixture
def toy(fact_model: FactModel) -> FactModel:
    return FactModel(deepcopy(fact_model.base), fact_model.tokenizer)


def editor_of(toy: FactModel, **settings: Any) -> WiseEditor:
    chosen: dict[str, Any] = {"contexts": 0, "near": 0.1, "far": 1.0, "gap": 0.5, "descent": QUICK}
    setup = EditorSetup(facts.meals(0, 8), seed=3)
    return Wise(**(chosen | settings)).start(toy.base, toy.tokenizer, setup)


def test_a_margin_counts_what_is_above_zero_alone() -> None:
    assert positive_mean(torch.tensor([-1.0, 2.0, 4.0])) == 3.0
    assert positive_mean(torch.tensor([-1.0, 0.0])) == 0.0


def test_only_the_masked_places_change_and_within_bounds(toy: FactModel) -> None:
    before = {name: tensor.clone() for name, tensor in toy.base.state_dict().items()}
    editor = editor_of(toy, largest_change=0.05)
    editor.edit(edits(0))
    assert all(torch.equal(t, before[n]) for n, t in toy.base.state_dict().items())
    shard = editor._open
    changed = (editor._with(shard.places, shard.values) - editor._weight).flatten()
    assert 0.15 < len(shard.places) / changed.numel() < 0.25  # a fifth of all places
    outside = torch.ones(changed.numel(), dtype=torch.bool).index_fill(0, shard.places, False)
    assert not changed[outside].any() and 0 < shard.values.abs().max() <= 0.05
    light = editor_of(toy, subset=0.125)
    assert 0.01 < len(light._open.places) / changed.numel() < 0.04
    another = light._new_shard(1).places  # of the same eighth
    allowed = torch.rand(changed.numel(), generator=torch.Generator().manual_seed(3)) < 0.125
    assert allowed[another].all() and not torch.equal(another, light._open.places)


def test_ties_keeps_the_largest_changes_of_the_prevailing_sign() -> None:
    first = Shard(torch.tensor([0, 1, 2]), torch.tensor([4.0, -1.0, 0.1]), 3.0)
    second = Shard(torch.tensor([0, 1, 3]), torch.tensor([-1.0, -3.0, 2.0]), 2.0)
    # Two of four places each: of the first 4 and -1, of the second -3 and 2.
    merged = merge([first, second], density=0.5, size=4)
    assert dict(zip(merged.places.tolist(), merged.values.tolist(), strict=True)) == {
        0: 4.0,
        1: -2.0,
        3: 2.0,
    }
    assert merged.smallest == 2.0
    # With all of them, what disagrees with the sum is left out.
    merged = merge([first, second], density=1.0, size=4)
    assert merged.values[merged.places == 0].tolist() == [4.0]


def test_shards_are_closed_and_merged_and_each_answers_its_own_edits(toy: FactModel) -> None:
    editor = editor_of(toy, edits_a_shard=1, shards_a_merge=4)
    for edit in edits(0, 5, 10):
        editor.edit([edit])
    assert [len(part) for part in (editor._closed,)] == [3]
    asked = [(edit.prompt, edit.target) for edit in edits(0, 5, 10)]
    assert sum(token_match(toy.base, toy.tokenizer, asked)) >= 2
    state = {name: tensor.clone() for name, tensor in editor.state_dict().items()}
    editor.edit(edits(15))
    assert len(editor._closed) == 1 and len(editor._closed[0].places) > 0
    editor.load_state_dict(state)
    assert len(editor._closed) == 3 and editor._edits == 3
    editor.remove()


def test_a_prompt_of_small_distance_is_computed_bit_for_bit_as_before(toy: FactModel) -> None:
    ids = [torch.tensor([toy.tokenizer(fact.prompt)["input_ids"]]) for fact in MEALS[:4]]
    with torch.no_grad():
        before = [toy.base(row).logits for row in ids]
        editor = editor_of(toy)
        editor.edit(edits(0))
        assert all(torch.equal(toy.base(row).logits, b) for row, b in zip(ids, before, strict=True))
    asked = [(edit.prompt, edit.target) for edit in edits(0)]
    assert token_match(toy.base, toy.tokenizer, asked) == [1.0]
    (said,) = greedy_answers(toy.base, toy.tokenizer, [asked[0][0]])
    assert said.startswith(asked[0][1])
    editor.remove()
    everything = editor_of(toy, threshold=0.0)  # the control: any distance is enough
    everything.edit(edits(0))
    with torch.no_grad():
        assert not torch.equal(toy.base(ids[0]).logits, before[0])


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="mask_share must be above 0"):
        Wise(mask_share=0.0)
    with pytest.raises(ValueError, match="shards_a_merge must be an integer of at least 2"):
        Wise(shards_a_merge=1)
