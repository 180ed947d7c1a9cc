"""HoReN's codebook: unit keys, the Hopfield step, what matches, and that nothing else is touched."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import facts
from facts import CAPITALS, MEALS, FactModel, edits
from peft_baft import DescentConfig, Edit
from peft_baft.evaluation.scoring import token_match
from peft_baft_bench.methods.horen import Horen, HorenEditor

fact_model = facts.fact_model
QUICK = DescentConfig(lr=0.1, max_steps=60, weight_decay=0.0, stop_loss=0.02)


@pytest.fixture
def toy(fact_model: FactModel) -> FactModel:
    return FactModel(deepcopy(fact_model.base), fact_model.tokenizer)


def editor_of(toy: FactModel, threshold: float = 0.98, **settings: Any) -> HorenEditor:
    return Horen(threshold=threshold, descent=QUICK, **settings).start(toy.base, toy.tokenizer)


def test_the_key_is_the_unit_mean_over_the_last_half_of_the_prompt(toy: FactModel) -> None:
    seen: list[torch.Tensor] = []
    projection = toy.base.model.layers[3].mlp.down_proj
    handle = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ids = toy.tokenizer(CAPITALS[0].prompt)["input_ids"]
    with torch.no_grad():
        toy.base(torch.tensor([ids]))
    handle.remove()
    expected = F.normalize(seen[0][0, len(ids) // 2 :].mean(0), dim=0)
    editor = editor_of(toy)
    assert editor.edit(edits(0)).learned
    torch.testing.assert_close(editor.state_dict()["keys"][1], expected)


def test_a_match_is_the_largest_cosine_after_one_hopfield_step(toy: FactModel) -> None:
    editor = editor_of(toy, threshold=0.9)
    editor._keys = F.normalize(torch.randn(5, 128), dim=1)
    queries = F.normalize(editor._keys[[3, 1]] + 0.02 * torch.randn(2, 128), dim=1)
    for query, found in zip(queries, editor.matches(queries).tolist(), strict=True):
        recalled = torch.softmax(20 * editor._keys @ query, 0) @ editor._keys
        pulled = F.normalize(0.9 * query + 0.1 * F.normalize(recalled, dim=0), dim=0)
        cosines = editor._keys @ pulled
        assert cosines.max() > 0.9 and found == int(cosines.argmax())
    assert editor.matches(queries).tolist() == [3, 1]
    assert editor.matches(F.normalize(torch.randn(1, 128), dim=1)).tolist() == [0]


def test_equal_answers_of_like_prompts_share_an_entry_and_others_do_not(toy: FactModel) -> None:
    editor = editor_of(toy, threshold=0.5)
    (first,) = edits(0)
    editor.edit([first])
    editor.edit([Edit(CAPITALS[0].rephrase, first.target)])
    assert len(editor.state_dict()["keys"]) == 2  # the entry for none among them
    editor.edit([Edit(CAPITALS[0].rephrase, "Kasgrad")])
    assert len(editor.state_dict()["keys"]) == 3


def test_a_prompt_that_matches_nothing_is_computed_bit_for_bit_as_before(toy: FactModel) -> None:
    ids = [torch.tensor([toy.tokenizer(fact.prompt)["input_ids"]]) for fact in MEALS[:6]]
    with torch.no_grad():
        before = [toy.base(row).logits for row in ids]
        editor = editor_of(toy)
        editor.edit(edits(0, 5))
        assert all(torch.equal(toy.base(row).logits, b) for row, b in zip(ids, before, strict=True))
    asked = [(edit.prompt, edit.target) for edit in edits(0, 5)]
    assert token_match(toy.base, toy.tokenizer, asked) == [1.0, 1.0]  # the control
    editor.remove()


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="threshold must lie between"):
        Horen(threshold=2.0)
