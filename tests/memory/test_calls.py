"""A memory of edits in the situations that are tested of plain adapters in `tests/situations`."""

# mypy: disable-error-code="attr-defined, operator, union-attr, arg-type"
from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tr
from torch import Tensor
from toy import editor_of

import facts
from facts import FactModel, edits

fact_model = facts.fact_model


@pytest.fixture
def memory(fact_model: FactModel) -> Any:
    editor = editor_of(fact_model)
    assert editor.edit(edits(0, 5)).learned
    return editor


def prompt(memory: Any, number: int) -> Tensor:
    (edit,) = edits(number)
    return memory.tokenizer(str(edit.prompt), return_tensors="pt")["input_ids"]


def generate(memory: Any, ids: Tensor, **settings: Any) -> Tensor:
    settings = {"attention_mask": torch.ones_like(ids), **settings}
    settings |= {"max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    return memory.model.generate(ids, **settings)[:, ids.shape[1] :]


def test_a_padded_batch_without_a_mask(memory: Any) -> None:
    """`generate` infers the mask from the pad token, and the question must not hold the padding."""
    short = prompt(memory, 0)
    wanted = generate(memory, short)
    padding = torch.zeros(1, 4, dtype=torch.long)
    batch = torch.cat([torch.cat([padding, short], 1), torch.cat([short, short[:, -4:]], 1)])
    assert torch.equal(generate(memory, batch, attention_mask=None)[:1], wanted)
    with memory.model.disable_adapter():  # the control
        assert not torch.equal(generate(memory, batch, attention_mask=None)[:1], wanted)


def test_a_forward_inside_generate_finds_its_own_edit(memory: Any) -> None:
    one, other = prompt(memory, 0), prompt(memory, 5)

    def call() -> Tensor:
        with torch.no_grad():
            return memory.model(other, attention_mask=torch.ones_like(other)).logits

    class Processor(tr.LogitsProcessor):
        seen: list[Tensor] = []

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self.seen.append(call())
            return scores

    alone, wanted, processor = call(), generate(memory, one), Processor()
    got = generate(memory, one, logits_processor=tr.LogitsProcessorList([processor]))
    assert torch.equal(got, wanted)
    assert processor.seen and not torch.equal(alone[0, -1], memory.model(one).logits[0, -1])
    for seen in processor.seen:
        torch.testing.assert_close(seen, alone)
