"""MEMOIR's memory: masks by prompts, what they share, and that nothing else is touched."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

import facts
from facts import CAPITALS, MEALS, FactModel, edits
from peft_baft import DescentConfig
from peft_baft.data.batching import encode
from peft_baft.evaluation.scoring import greedy_answers, token_match
from peft_baft_bench.methods.memoir import Memoir, MemoirEditor

fact_model = facts.fact_model
QUICK = DescentConfig(lr=1.0, max_steps=60, weight_decay=0.0, stop_loss=0.02, clip_norm=1.0)


@pytest.fixture
def toy(fact_model: FactModel) -> FactModel:
    return FactModel(deepcopy(fact_model.base), fact_model.tokenizer)


def editor_of(toy: FactModel, **settings: Any) -> MemoirEditor:
    chosen: dict[str, Any] = {"contexts": 0, "overlap": 0.9, "descent": QUICK} | settings
    return Memoir(**chosen).start(toy.base, toy.tokenizer)


def test_a_mask_holds_the_places_that_differ_most_from_other_prompts(toy: FactModel) -> None:
    editor = editor_of(toy, share=0.25)
    row = encode(toy.tokenizer, CAPITALS[0].prompt, "x")
    means = editor._prompt_means([row])
    (mask,) = editor.compute_masks(means)
    assert mask.sum() == 32  # a quarter of 128
    chosen = editor._permutation.argsort()[mask.nonzero()[:, 0]]
    difference = (means[0] - editor._background).abs()
    others = torch.ones(128, dtype=torch.bool).index_fill(0, chosen, False)
    assert difference[chosen].min() >= difference[others].max()


def test_the_edit_whose_mask_shares_the_most_places_is_found(toy: FactModel) -> None:
    editor = editor_of(toy, share=0.25)
    editor._masks = torch.zeros(2, 128, dtype=torch.bool)
    editor._masks[0, :32] = editor._masks[1, 32:64] = True
    asked = torch.zeros(1, 128, dtype=torch.bool)
    asked[0, 24:56] = True  # 8 of the first, 24 of the second
    edit, share = editor.nearest(asked)
    assert (edit.tolist(), share.tolist()) == ([1], [0.75])


def test_an_edit_writes_into_its_own_columns_alone_and_keeps_the_others(toy: FactModel) -> None:
    editor = editor_of(toy)
    editor.edit(edits(0))
    memory, (mask,) = editor.state_dict()["memory"], editor.state_dict()["masks"]
    assert (memory[:, mask] != 0).any() and not (memory[:, ~mask] != 0).any()
    editor.edit(edits(5))
    second = editor.state_dict()["masks"][1]
    assert torch.equal(editor.state_dict()["memory"][:, ~second], memory[:, ~second])


def test_a_prompt_that_matches_nothing_is_computed_bit_for_bit_as_before(toy: FactModel) -> None:
    prompts = [fact.prompt for fact in MEALS[:6]]
    ids = [torch.tensor([toy.tokenizer(prompt)["input_ids"]]) for prompt in prompts]
    with torch.no_grad():
        before = [toy.base(row).logits for row in ids]
        editor = editor_of(toy)
        editor.edit(edits(0, 5))
        assert all(torch.equal(toy.base(row).logits, b) for row, b in zip(ids, before, strict=True))
    # The control: the edited ones are answered otherwise, in teacher forcing and decoded from a cache alike.
    asked = [(edit.prompt, edit.target) for edit in edits(0, 5)]
    assert token_match(toy.base, toy.tokenizer, asked) == [1.0, 1.0]
    said = greedy_answers(toy.base, toy.tokenizer, [prompt for prompt, _ in asked])
    assert all(text.startswith(target) for text, (_, target) in zip(said, asked, strict=True))
    editor.remove()
    assert token_match(toy.base, toy.tokenizer, asked) == [0.0, 0.0]


def test_a_smaller_overlap_lets_more_prompts_in(toy: FactModel) -> None:
    editor = editor_of(toy, overlap=0.01)
    editor.edit(edits(0))
    ids = torch.tensor([toy.tokenizer(MEALS[0].prompt)["input_ids"]])
    with torch.no_grad():
        changed = toy.base(ids).logits
        editor.remove()
        assert not torch.equal(toy.base(ids).logits, changed)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="overlap must be above 0 and at most 1"):
        Memoir(overlap=1.5)
    with pytest.raises(ValueError, match="contexts must be an integer"):
        Memoir(contexts=-1)
