"""What a memory of edits keeps between two forwards."""

from __future__ import annotations

from copy import deepcopy

import torch
from toy import editor_of

import facts
from facts import FactModel, edits
from peft_baft import MemoryEditor
from peft_baft.evaluation.scoring import token_match

fact_model = facts.fact_model


def test_a_memory_whose_tensors_are_overwritten_answers_as_the_one_that_they_are_from(
    fact_model: FactModel,
) -> None:
    memory, other = editor_of(fact_model), editor_of(fact_model)
    memory.edit(edits(0, 5))
    other.edit(edits(5, 0))
    asked = [(edit.prompt, edit.target) for edit in edits(0, 5)]

    def right(editor: MemoryEditor) -> list[float]:
        return token_match(editor.model, fact_model.tokenizer, asked)

    assert right(memory) == right(other) == [1.0, 1.0]
    for tensor, new in zip(memory.state_dict().values(), other.state_dict().values(), strict=True):
        tensor.data.copy_(new)
    assert right(memory) == [1.0, 1.0]
    assert memory.matches(edits(0)[0].prompt).edit == 2  # the control: it was number 1


def test_a_memory_learns_after_it_has_answered_in_inference_mode(fact_model: FactModel) -> None:
    memory = editor_of(fact_model)
    memory.edit(edits(0))
    ids = torch.tensor([fact_model.tokenizer(str(edits(0)[0].prompt))["input_ids"]])
    fresh = deepcopy(memory.model)  # has made nothing ready
    with torch.inference_mode():
        fresh(input_ids=ids)
    again = MemoryEditor(fresh, fact_model.tokenizer)
    again.edit(edits(5))
    assert again.numbers == [1, 2]
    pairs = [(edit.prompt, edit.target) for edit in edits(0, 5)]
    assert token_match(fresh, fact_model.tokenizer, pairs) == [1.0] * 2
