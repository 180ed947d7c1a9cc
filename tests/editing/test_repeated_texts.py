"""Texts put to a model again and again: a cache gives what whole texts give, and one that does not is not used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import facts
from facts import CAPITALS, MEALS, FactModel
from peft_baft.data.batching import Tokens, encode
from peft_baft.editing import repeated_texts
from peft_baft.editing.acceleration import cached_prefix
from peft_baft.editing.fast_paths import repeated_texts as open_texts
from peft_baft.editing.repeated_texts import RepeatedTexts

fact_model = facts.fact_model


def texts_of(toy: FactModel, cuts: list[int]) -> tuple[list[Tokens], RepeatedTexts]:
    rows = [encode(toy.tokenizer, f.prompt, f.answer) for f in (*CAPITALS[2:5], *MEALS[:2])]
    numbers = torch.tensor([0, 0, 1, 2, 3, 4, 4])
    columns = torch.tensor([4, 3, 4, 4, 4, 3, 4])
    blocks = list(toy.base.model.layers)[:2]
    return rows, open_texts(toy.base, toy.tokenizer, rows, cuts, (numbers, columns), blocks)


def plain(toy: FactModel, rows: list[Tokens], texts: RepeatedTexts) -> Tensor:
    """The logits that are read, text by text."""
    places = zip(texts.read[0].tolist(), texts.read[1].tolist(), strict=True)
    return torch.stack(
        [
            toy.base(torch.tensor([rows[row].ids])).logits[0, column + texts.cuts[row]]
            for row, column in places
        ]
    )


def test_cached_and_whole_texts_give_the_same_logits(fact_model: FactModel) -> None:
    with torch.no_grad():
        rows, cached = texts_of(fact_model, [3, 2, 3, 1, 2])
        assert cached.cache is not None and cached.cuts == (3, 2, 3, 1, 2)
        expected = plain(fact_model, rows, cached)
        for _ in range(2):  # the second time with the blocks' outputs of the first
            torch.testing.assert_close(cached.logits(), expected, atol=1e-4, rtol=1e-4)
        some = cached.select([4, 1])
        found = plain(fact_model, [rows[4], rows[1]], some)
        torch.testing.assert_close(some.logits(), found, atol=1e-4, rtol=1e-4)
        # Where nothing of a row stays, all rows are whole.
        rows, whole = texts_of(fact_model, [3, 2, 0, 1, 2])
        assert whole.cache is None and whole.cuts == (0,) * 5
        torch.testing.assert_close(
            whole.logits(), plain(fact_model, rows, whole), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("how", ["differs", "fails"])
def test_a_cache_that_gives_something_else_is_not_used_and_that_is_told(
    fact_model: FactModel,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    call = repeated_texts.call_with_cache

    def broken(*given: Any) -> tuple[Tensor, Any]:
        if how == "fails":
            raise TypeError("unexpected keyword")
        logits, cache = call(*given)
        return logits + 0.5, cache

    for module in (cached_prefix, repeated_texts):
        monkeypatch.setattr(module, "call_with_cache", broken)
    with torch.no_grad():
        rows, texts = texts_of(fact_model, [3, 2, 3, 1, 2])
        assert texts.cache is None
        torch.testing.assert_close(
            texts.logits(), plain(fact_model, rows, texts), atol=1e-4, rtol=1e-4
        )
    assert "LlamaForCausalLM is edited without a cache, which is slower but right" in caplog.text
    assert ("unexpected keyword" if how == "fails" else "its logits are off by") in caplog.text
