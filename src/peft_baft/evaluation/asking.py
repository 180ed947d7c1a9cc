"""Putting the questions of a benchmark to a model: teacher forced and free, before and after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peft_baft.data.cases import Case
from peft_baft.evaluation.forward import Batched, one_model
from peft_baft.evaluation.scoring import exact_match, free_answers, free_length, predicted_tokens, prefix_match

TEMPLATES = ("raw", "chat")


@dataclass(frozen=True)
class Question:
    """One thing to ask about a row of a benchmark.

    kind: `reliability` (the edit itself), or a probe's kind. topic: the benchmark's name for its sub-type, or empty.
    """

    row: int
    kind: str
    topic: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Reply:
    """said, wanted: (answer tokens,) the model's and the answer's tokens, teacher forced. text: its free answer."""

    said: Tensor
    wanted: Tensor
    text: str

    def match(self, other: Tensor) -> float:
        """Share of the answer tokens at which the model says what stands in `other`."""
        return (self.said == other).float().mean().item()


def questions_of(row: int, case: Case) -> list[Question]:
    """The edit, then its probes in their order."""
    asked = [Question(row, probe.kind, probe.topic, probe.prompt, probe.answer) for probe in case.probes]
    return [Question(row, "reliability", "", case.edit.prompt, case.edit.target), *asked]


def ask(
    model: Any, tokenizer: Any, questions: Sequence[Question], template: str = "raw", batched: Batched = one_model
) -> list[Reply]:
    """Every question asked twice: given the answer so far (teacher forcing), and freely.

    Args:
        template: `raw` text, or `chat`: the tokenizer's chat template for everything but locality, as EasyEdit has it.
        batched: given the numbers of the questions of a batch, a context to ask it in.
    """
    if batched is one_model and len(once := list(dict.fromkeys(map(_what, questions)))) < len(questions):
        places = {what: i for i, what in enumerate(once)}  # one model answers equal questions alike
        replies = ask(model, tokenizer, [Question(0, kind, "", *texts) for kind, *texts in once], template)
        return [replies[places[_what(question)]] for question in questions]
    return _ask_each(model, tokenizer, questions, template, batched)


def _what(question: Question) -> tuple[str, str, str]:
    return question.kind, question.prompt, question.answer


def _ask_each(
    model: Any, tokenizer: Any, questions: Sequence[Question], template: str, batched: Batched
) -> list[Reply]:
    replies: dict[int, Reply] = {}
    for chat in (False, True):
        chosen = [i for i, q in enumerate(questions) if (template == "chat" and q.kind != "locality") is chat]
        pairs = [(questions[i].prompt, questions[i].answer) for i in chosen]
        lengths = [free_length(tokenizer, answer) for _, answer in pairs]

        def context(batch: Sequence[int], chosen: list[int] = chosen) -> AbstractContextManager[Any]:
            return batched([chosen[i] for i in batch])

        tokens = predicted_tokens(model, tokenizer, pairs, chat=chat, batched=context)
        texts = free_answers(model, tokenizer, [prompt for prompt, _ in pairs], lengths, chat=chat, batched=context)
        replies |= {i: Reply(*found, text) for i, found, text in zip(chosen, tokens, texts, strict=True)}
    return [replies[i] for i in range(len(questions))]


def judged(question: Question, reply: Reply, before: Reply | None) -> dict[str, Any]:
    """One reply as it stands in a result line.

    before: what the unedited model replied; needed for locality, which asks whether the reply is still the same.
    """
    known = {"kind": question.kind, "topic": question.topic}
    if question.kind == "locality":
        assert before is not None, "locality compares with the unedited model"
        found = {"match": reply.match(before.said), "unchanged": reply.text == before.text}
    else:
        exact, prefix = exact_match(reply.text, question.answer), prefix_match(reply.text, question.answer)
        found = {"match": reply.match(reply.wanted), "exact": exact, "prefix": prefix}
    return known | found | {"said": reply.text}


class Unedited:
    """The unedited model's replies, each asked for once, however many runs compare with it."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._replies: dict[tuple[str, str], Reply] = {}

    def ask(self, base: Any, questions: Iterable[Question]) -> None:
        """Ask `base`, which must be without edits now, those of `questions` that are about locality and new."""
        new = {(q.prompt, q.answer): q for q in questions if q.kind == "locality"}
        missing = [question for key, question in new.items() if key not in self._replies]
        replies = ask(base, self.tokenizer, missing)
        self._replies |= {(q.prompt, q.answer): reply for q, reply in zip(missing, replies, strict=True)}

    def reply(self, question: Question) -> Reply | None:
        """What it said, None where it was not asked."""
        return self._replies.get((question.prompt, question.answer))
