"""Ask a model the questions of a benchmark, teacher-forced and freely generated, before and after it is edited."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peft_baft.data.batching import Tokens, encode_fitting, encode_prompt
from peft_baft.data.cases import Case, Prompt, prompt_words
from peft_baft.data.templates import RAW, Template, is_chat
from peft_baft.evaluation.forward import Batched, greedy_tokens, one_model
from peft_baft.evaluation.scoring import (
    STATEMENT_TOKENS,
    contains_new_not_old,
    exact_match,
    first_line,
    free_length,
    predicted_in_rows,
    prefix_match,
    reply_text,
    reply_tokens,
    says,
)

NEIGHBOUR = "neighbour"
COMPARED_KINDS = ("locality", NEIGHBOUR)  # compared with the unedited model's reply, right or wrong


@dataclass(frozen=True)
class Question:
    """One question about a row of a benchmark.

    Attributes:
        row: the number of the row.
        kind: `reliability` (the edit itself), the kind of a probe, or a kind defined in
            `peft_baft_bench/questions/probing.py`.
        topic: the benchmark's name for its sub-type, or empty.
        prompt: the text or chat to reply to.
        answer: the right answer; for a neighbour, the edit's answer, which would be wrong there.
        old: the answer that the edit replaces, where it is known and matters.
    """

    row: int
    kind: str
    topic: str
    prompt: Prompt
    answer: str
    old: str | None = None

    @property
    def key(self) -> tuple[Prompt, str | None, bool]:
        """Everything that a model's reply depends on; for a neighbour, only the prompt."""
        return (
            self.prompt,
            None if self.kind == NEIGHBOUR else self.answer,
            self.kind in COMPARED_KINDS,
        )


@dataclass(frozen=True)
class Reply:
    """A model's reply to a question.

    Attributes:
        predicted: tokens that the model predicts at the answer's positions, teacher-forced, (answer tokens,).
        expected: the answer's tokens, (answer tokens,). A neighbour's answer is the unedited model's own
            reply; if that is empty, there are no tokens.
        text: the freely generated answer, a few tokens longer than the expected one.
        statement: the freely generated answer up to its end or up to the requested number of tokens; None if
            no statement was requested.
        tokens: the tokens of the statement; only for neighbours.
    """

    predicted: Tensor
    expected: Tensor
    text: str
    statement: str | None = None
    tokens: tuple[int, ...] = ()

    def match(self, other: Tensor) -> float:
        """Compute the share of answer tokens at which the prediction equals `other`."""
        return (self.predicted == other).float().mean().item()


def data_questions(row: int, case: Case) -> list[Question]:
    """List the questions that the data asks about a row: the edit, then its probes in order."""
    edit, old = case.edit, case.old_answer
    questions = [Question(row, "reliability", "", edit.prompt, edit.target, old)]
    for probe in case.probes:
        # The old answer is only wrong where the new one is expected; consequences of the edit have other answers.
        replaced = old if probe.kind == "generality" else None
        questions.append(
            Question(row, probe.kind, probe.topic, probe.prompt, probe.answer, replaced)
        )
    return questions


def ask(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    template: Template = RAW,
    batched: Batched = one_model,
    *,
    statement_tokens: int = 0,
    unedited: Callable[[Question], Reply | None] = lambda question: None,
) -> list[Reply]:
    """Ask every question twice: freely generated, and teacher-forced.

    Args:
        template: the prompt format of every question, locality included.
        batched: returns a context for asking a batch, given the indices of its questions.
        statement_tokens: maximum length of the free answers that are searched for the expected one; 0
            requests no statements. Neighbours are always asked for a statement.
        unedited: returns the unedited model's reply to a neighbour, whose tokens are used for teacher
            forcing; None if this model is the unedited one.
    """
    asking = _Asking(model, tokenizer, template, statement_tokens, unedited)
    if batched is not one_model:
        return asking.ask_each(questions, batched)
    # A single model gives equal replies to equal questions, so ask each once for all rows, kinds and topics.
    distinct: dict[tuple[Prompt, str | None, bool], Question] = {}
    for question in questions:
        distinct.setdefault(question.key, question)
    replies = asking.ask_each(list(distinct.values()), batched)
    reply_to = dict(zip(distinct, replies, strict=True))
    return [reply_to[question.key] for question in questions]


@dataclass(frozen=True)
class _Asking:
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    template: Template
    statement_tokens: int
    unedited: Callable[[Question], Reply | None]

    def ask_each(self, questions: Sequence[Question], batched: Batched) -> list[Reply]:
        """Ask each of the questions, in shared batches."""
        model, tokenizer = self.model, self.tokenizer
        prompts = [encode_prompt(tokenizer, q.prompt, template=self.template) for q in questions]
        limits = [self._limit(question) for question in questions]
        free = greedy_tokens(model, tokenizer, prompts, limits, batched=batched)
        freely = [self._free(question, ids) for question, ids in zip(questions, free, strict=True)]
        rows = [
            self._with_answer(question, prompt, tokens)
            for question, prompt, (_, _, tokens) in zip(questions, prompts, freely, strict=True)
        ]
        # An adapter locates the end of a prompt by the start of the answer, so leave out rows without an answer.
        present = [number for number, row in enumerate(rows) if len(row.ids) > row.prompt_length]

        def batched_present(numbers: Sequence[int]) -> AbstractContextManager[Any]:
            return batched([present[number] for number in numbers])

        predicted = predicted_in_rows(
            model, tokenizer, [rows[number] for number in present], batched=batched_present
        )
        forced = dict(zip(present, predicted, strict=True))
        nothing = torch.empty(0, dtype=torch.long)
        replies = []
        for number, (text, statement, tokens) in enumerate(freely):
            predicted_ids, expected_ids = forced.get(number, (nothing, nothing))
            replies.append(Reply(predicted_ids, expected_ids, text, statement, tokens))
        return replies

    def _limit(self, question: Question) -> int:
        """Return how many tokens the model may generate."""
        if question.kind == NEIGHBOUR:
            return self.statement_tokens or STATEMENT_TOKENS
        length = free_length(self.tokenizer, question.answer)
        return length if question.kind == "locality" else max(length, self.statement_tokens)

    def _free(self, question: Question, ids: Tensor) -> tuple[str, str | None, tuple[int, ...]]:
        """Return the short text, the statement, and a neighbour's tokens from the generated ids."""
        chat = is_chat(question.prompt, self.template)
        if question.kind == NEIGHBOUR:
            reply = reply_tokens(self.tokenizer, ids, chat)
            statement = reply_text(self.tokenizer, reply, chat)
            return statement, statement, tuple(reply.tolist()) if statement else ()
        # The short text is the reply as it would be without a statement.
        text = first_line(self.tokenizer, ids[: free_length(self.tokenizer, question.answer)])
        if not self.statement_tokens or question.kind in COMPARED_KINDS:
            return text, None, ()
        reply = reply_tokens(self.tokenizer, ids, chat)
        return text, reply_text(self.tokenizer, reply, chat), ()

    def _with_answer(self, question: Question, prompt: Tokens, tokens: tuple[int, ...]) -> Tokens:
        """Append the tokens for teacher forcing to a prompt.

        These are the expected answer, or for a neighbour the unedited model's reply.
        """
        if question.kind != NEIGHBOUR:
            return encode_fitting(
                self.model,
                self.tokenizer,
                question.prompt,
                question.answer,
                template=self.template,
            )
        before = self.unedited(question)
        answer = tokens if before is None else before.tokens
        return Tokens((*prompt.ids, *answer), prompt.prompt_length)


def judge(question: Question, reply: Reply, before: Reply | None) -> dict[str, Any]:
    """Judge one reply; returns the probe's entry in a result line.

    Args:
        before: the unedited model's reply; required for locality and neighbours, which check whether the
            reply has changed.
    """
    entry: dict[str, Any] = {"kind": question.kind, "topic": question.topic}
    if question.kind in COMPARED_KINDS:
        assert before is not None, f"{question.kind} compares with the unedited model"
        entry["unchanged"] = reply.text == before.text
        if question.kind == NEIGHBOUR:
            entry |= _judge_neighbour(question, reply, before)
        else:
            entry["match"] = reply.match(before.predicted)
        return entry | {"said": reply.text}
    entry["match"] = reply.match(reply.expected)
    entry["exact"] = exact_match(reply.text, question.answer)
    entry["prefix"] = prefix_match(reply.text, question.answer)
    if reply.statement is not None:
        entry["contains"] = contains_new_not_old(reply.statement, question.answer, question.old)
        entry["statement"] = reply.statement
    return entry | {"said": reply.text}


def _judge_neighbour(question: Question, reply: Reply, before: Reply) -> dict[str, Any]:
    """Judge whether the reply to a neighbour is unchanged, and whether it contains the new answer.

    A neighbour whose reply contained the new answer already before the edit always counts as spared, since
    the edit cannot be the cause. If the unedited model's reply is empty, there are no tokens, and the match
    is whether the edited model's reply is empty too.
    """
    assert reply.statement is not None and before.statement is not None
    match = reply.match(before.predicted) if len(before.predicted) else float(not reply.statement)
    said_before = says(before.statement, question.answer)
    return {
        "match": match,
        "spared": said_before or not says(reply.statement, question.answer),
        "asked": prompt_words(question.prompt),
        "before": before.statement,
    }


class UneditedReplies:
    """Caches the unedited model's replies, so that each question is asked only once for all runs that compare with it."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template = RAW,
        statement_tokens: int = 0,
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.statement_tokens = statement_tokens
        self._replies: dict[tuple[Prompt, str | None, bool], Reply] = {}

    def ask(self, base: nn.Module, questions: Iterable[Question]) -> None:
        """Ask `base`, which must have no edits at this point, those of `questions` that need a comparison and are new."""
        new = {question.key: question for question in questions if question.kind in COMPARED_KINDS}
        missing = [question for key, question in new.items() if key not in self._replies]
        replies = ask(
            base,
            self.tokenizer,
            missing,
            self.template,
            statement_tokens=self.statement_tokens,
        )
        self._replies |= {q.key: reply for q, reply in zip(missing, replies, strict=True)}

    def reply(self, question: Question) -> Reply | None:
        """Return the unedited model's reply; None if it was not asked."""
        return self._replies.get(question.key)
