"""Ask a model the questions of a benchmark: teacher forced and freely, before and after it is edited."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
COMPARED = ("locality", NEIGHBOUR)  # with what the unedited model says, right or wrong


@dataclass(frozen=True)
class Question:
    """One thing to ask about a row of a benchmark.

    Attributes:
        kind: `reliability` (the edit itself), a probe's kind, or a kind of `peft_baft_bench/questions/probing.py`.
        topic: the benchmark's name for its sub-type, or empty.
        answer: what is wanted; of a neighbour, the edit's answer, which is not wanted there.
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
        """What one model's reply depends on: of a neighbour, on the prompt alone."""
        return self.prompt, None if self.kind == NEIGHBOUR else self.answer, self.kind in COMPARED


@dataclass(frozen=True)
class Reply:
    """What a model replies to a question.

    Attributes:
        said, wanted: (answer tokens,) the model's and the answer's tokens, teacher forced. The answer to a neighbour is the
            unedited model's own; where that one says nothing, there are no tokens.
        text: its free answer, as long as the answer and a few tokens more.
        statement: its free answer up to its end, or to as many tokens as were asked for; None where none were.
        tokens: those of the statement, of a neighbour's reply alone.
    """

    said: Tensor
    wanted: Tensor
    text: str
    statement: str | None = None
    tokens: tuple[int, ...] = ()

    def match(self, other: Tensor) -> float:
        """Compute the share of the answer tokens at which the model says what stands in `other`."""
        return (self.said == other).float().mean().item()


def questions_of(row: int, case: Case) -> list[Question]:
    """List what to ask about a row: the edit, then its probes in their order."""
    edit, old = case.edit, case.old_answer
    questions = [Question(row, "reliability", "", edit.prompt, edit.target, old)]
    for probe in case.probes:
        # The old answer is wrong where the new one is asked for; a consequence of the edit has another answer.
        replaced = old if probe.kind == "generality" else None
        questions.append(
            Question(row, probe.kind, probe.topic, probe.prompt, probe.answer, replaced)
        )
    return questions


def ask(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    template: Template = RAW,
    batched: Batched = one_model,
    *,
    statement_tokens: int = 0,
    unedited: Callable[[Question], Reply | None] = lambda question: None,
) -> list[Reply]:
    """Ask every question twice: freely, and given the answer so far (teacher forcing).

    Args:
        template: the form in which every question is put to the model, locality included.
        batched: given the numbers of the questions of a batch, a context to ask it in.
        statement_tokens: how long a free answer may be in which the wanted one is searched; 0 asks for none. Neighbours are
            always asked for one.
        unedited: what the unedited model replied to a neighbour, whose tokens are those of the teacher forcing; None where
            this is the unedited model.
    """
    asking = _Asking(model, tokenizer, template, statement_tokens, unedited)
    if batched is not one_model:
        return asking.each(questions, batched)
    # One model answers equal questions alike, so each is asked once, whichever rows, kinds and topics it belongs to.
    different: dict[tuple[Prompt, str | None, bool], Question] = {}
    for question in questions:
        different.setdefault(question.key, question)
    replies = asking.each(list(different.values()), batched)
    reply_to = dict(zip(different, replies, strict=True))
    return [reply_to[question.key] for question in questions]


@dataclass(frozen=True)
class _Asking:
    model: Any
    tokenizer: Any
    template: Template
    statement_tokens: int
    unedited: Callable[[Question], Reply | None]

    def each(self, questions: Sequence[Question], batched: Batched) -> list[Reply]:
        """Ask each of the questions, in common batches."""
        model, tokenizer = self.model, self.tokenizer
        prompts = [encode_prompt(tokenizer, q.prompt, template=self.template) for q in questions]
        limits = [self._limit(question) for question in questions]
        free = greedy_tokens(model, tokenizer, prompts, limits, batched=batched)
        freely = [self._free(question, ids) for question, ids in zip(questions, free, strict=True)]
        rows = [
            self._with_answer(question, prompt, tokens)
            for question, prompt, (_, _, tokens) in zip(questions, prompts, freely, strict=True)
        ]
        # An adapter finds a prompt's end by where the answer begins, so a row without an answer is none.
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
            said, wanted = forced.get(number, (nothing, nothing))
            replies.append(Reply(said, wanted, text, statement, tokens))
        return replies

    def _limit(self, question: Question) -> int:
        """Count the tokens that the model may say."""
        if question.kind == NEIGHBOUR:
            return self.statement_tokens or STATEMENT_TOKENS
        length = free_length(self.tokenizer, question.answer)
        return length if question.kind == "locality" else max(length, self.statement_tokens)

    def _free(self, question: Question, ids: Tensor) -> tuple[str, str | None, tuple[int, ...]]:
        """Read a short text, the statement, and a neighbour's tokens off what the model said."""
        chat = is_chat(question.prompt, self.template)
        if question.kind == NEIGHBOUR:
            reply = reply_tokens(self.tokenizer, ids, chat)
            statement = reply_text(self.tokenizer, reply, chat)
            return statement, statement, tuple(reply.tolist()) if statement else ()
        # The short text is what the model would have said had it been asked for no statement.
        text = first_line(self.tokenizer, ids[: free_length(self.tokenizer, question.answer)])
        if not self.statement_tokens or question.kind in COMPARED:
            return text, None, ()
        reply = reply_tokens(self.tokenizer, ids, chat)
        return text, reply_text(self.tokenizer, reply, chat), ()

    def _with_answer(self, question: Question, prompt: Tokens, tokens: tuple[int, ...]) -> Tokens:
        """Put behind a prompt what the teacher forcing reads: the wanted answer, or what the unedited model said."""
        if question.kind != NEIGHBOUR:
            return encode_fitting(
                self.model,
                self.tokenizer,
                question.prompt,
                question.answer,
                template=self.template,
            )
        before = self.unedited(question)
        own = tokens if before is None else before.tokens
        return Tokens((*prompt.ids, *own), prompt.prompt_length)


def judged(question: Question, reply: Reply, before: Reply | None) -> dict[str, Any]:
    """Judge one reply, as it stands in a result line.

    before: what the unedited model replied; needed for locality and neighbours, which ask whether the reply is still the same.
    """
    entry: dict[str, Any] = {"kind": question.kind, "topic": question.topic}
    if question.kind in COMPARED:
        assert before is not None, f"{question.kind} compares with the unedited model"
        entry["unchanged"] = reply.text == before.text
        if question.kind == NEIGHBOUR:
            entry |= _judged_neighbour(question, reply, before)
        else:
            entry["match"] = reply.match(before.said)
        return entry | {"said": reply.text}
    entry["match"] = reply.match(reply.wanted)
    entry["exact"] = exact_match(reply.text, question.answer)
    entry["prefix"] = prefix_match(reply.text, question.answer)
    if reply.statement is not None:
        entry["contains"] = contains_new_not_old(reply.statement, question.answer, question.old)
        entry["statement"] = reply.statement
    return entry | {"said": reply.text}


def _judged_neighbour(question: Question, reply: Reply, before: Reply) -> dict[str, Any]:
    """Judge whether a neighbour is as it was: by tokens, and whether it says what it was not taught.

    A neighbour that said the new answer before the edit is spared whatever it says: no edit can have made it say that. Where
    the unedited model says nothing, there are no tokens, and the match is whether the edited one says nothing either.
    """
    assert reply.statement is not None and before.statement is not None
    match = reply.match(before.said) if len(before.said) else float(not reply.statement)
    said_before = says(before.statement, question.answer)
    return {
        "match": match,
        "spared": said_before or not says(reply.statement, question.answer),
        "asked": prompt_words(question.prompt),
        "before": before.statement,
    }


class Unedited:
    """Keep the unedited model's replies, each asked for once, however many runs compare with it."""

    def __init__(self, tokenizer: Any, template: Template = RAW, statement_tokens: int = 0) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.statement_tokens = statement_tokens
        self._replies: dict[tuple[Prompt, str | None, bool], Reply] = {}

    def ask(self, base: Any, questions: Iterable[Question]) -> None:
        """Ask `base`, which must be without edits now, those of `questions` that are compared with it and new."""
        new = {question.key: question for question in questions if question.kind in COMPARED}
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
        """Give what it said, None where it was not asked."""
        return self._replies.get(question.key)
