"""Answers of many kinds, such as numbers, code, tables and other scripts, are said exactly, and so is their end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kinds_of_answers import KINDS
from peft import get_peft_model

import peft_baft
from peft_baft import BaftConfig, Edit, MemoryEditor
from peft_baft.data.batching import encode_prompt
from peft_baft.data.templates import RAW, Template

CHAT = Template(True, {})
BATCH_SIZE = 11


@pytest.fixture(scope="module")
def smollm2() -> Any:
    return peft_baft.load_model("smollm2", torch.float32)


@pytest.fixture(scope="module")
def taught(smollm2: Any) -> MemoryEditor:
    base, tokenizer = smollm2
    model = get_peft_model(base, BaftConfig(memory=True, task_type="CAUSAL_LM")).eval()
    editor = MemoryEditor(model, tokenizer)
    results = editor.edit_independently([Edit(question, answer) for question, answer in KINDS])
    assert all(result.learned and result.steps == 0 for result in results)
    return editor


def said(editor: MemoryEditor, template: Template) -> list[str]:
    """Greedy replies up to the end of the text, without the tokens that end one."""
    tokenizer = editor.tokenizer
    prompts = [encode_prompt(tokenizer, question, template=template).ids for question, _ in KINDS]
    lengths = [len(tokenizer(answer)["input_ids"]) for _, answer in KINDS]
    order = sorted(range(len(KINDS)), key=lambda number: lengths[number])
    replies = [""] * len(KINDS)
    for start in range(0, len(order), BATCH_SIZE):
        chosen = order[start : start + BATCH_SIZE]
        batch = tokenizer.pad(
            {"input_ids": [list(prompts[number]) for number in chosen]},
            padding_side="left",
            return_tensors="pt",
        )
        out = editor.model.generate(
            **batch,
            max_new_tokens=max(lengths[number] for number in chosen) + 4,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        for number, ids in zip(chosen, out[:, batch["input_ids"].shape[1] :], strict=True):
            replies[number] = tokenizer.decode(ids, skip_special_tokens=True)
    return replies


def test_the_facts_are_about_different_things_and_their_answers_have_no_space_around() -> None:
    questions, answers = zip(*KINDS, strict=True)
    assert len(set(questions)) == len(set(answers)) == len(KINDS) > 60
    assert all(answer == answer.strip() for answer in answers)


@pytest.mark.slow
def test_every_kind_of_answer_is_said_exactly_in_a_chat(taught: MemoryEditor) -> None:
    wrong = {
        answer: reply
        for (_, answer), reply in zip(KINDS, said(taught, CHAT), strict=True)
        if reply != answer
    }
    assert not wrong


@pytest.mark.slow
def test_every_kind_of_answer_is_said_exactly_in_raw_text(taught: MemoryEditor) -> None:
    replies = said(taught, RAW)
    wrong = {
        answer: reply
        for (_, answer), reply in zip(KINDS, replies, strict=True)
        if reply != f" {answer}\n"
    }
    assert not wrong
    # The control: without the memory, none is said.
    question, answer = KINDS[0]
    with taught.model.disable_adapter():
        ids = torch.tensor([encode_prompt(taught.tokenizer, question).ids])
        out = taught.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
    assert answer not in taught.tokenizer.decode(out[0, ids.shape[1] :])
