"""Ask a model the questions of a benchmark: teacher forced and freely, before and after it is edited."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from peft_baft.data.cases import Case, Prompt
from peft_baft.data.templates import RAW, Template
from peft_baft.evaluation.forward import Batched, one_model
from peft_baft.evaluation.scoring import (
    exact_match,
    free_answers,
    free_length,
    predicted_tokens,
    prefix_match,
)


@dataclass(frozen=True)
class Question:
    """One thing to ask about a row of a benchmark.

    kind: `reliability` (the edit itself), or a probe's kind. topic: the benchmark's name for its sub-type, or empty.
    """

    row: int
    kind: str
    topic: str
    prompt: Prompt
    answer: str


@dataclass(frozen=True)
class Reply:
    """said, wanted: (answer tokens,) the model's and the answer's tokens, teacher forced. text: its free answer."""

    said: Tensor
    wanted: Tensor
    text: str

    def match(self, other: Tensor) -> float:
        """Compute the share of the answer tokens at which the model says what stands in `other`."""
        return (self.said == other).float().mean().item()


def questions_of(row: int, case: Case) -> list[Question]:
    """List what to ask about a row: the edit, then its probes in their order."""
    probes = [
        Question(row, probe.kind, probe.topic, probe.prompt, probe.answer) for probe in case.probes
    ]
    return [Question(row, "reliability", "", case.edit.prompt, case.edit.target), *probes]


def ask(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    template: Template = RAW,
    batched: Batched = one_model,
) -> list[Reply]:
    """Ask every question twice: given the answer so far (teacher forcing), and freely.

    Args:
        template: the form in which every question is put to the model, locality included.
        batched: given the numbers of the questions of a batch, a context to ask it in.
    """
    if batched is not one_model:
        return _ask_each(model, tokenizer, questions, template, batched)
    # One model answers equal questions alike, so each is asked once, whichever rows, kinds and topics it belongs to.
    different: dict[tuple[Prompt, str], Question] = {}
    for question in questions:
        different.setdefault((question.prompt, question.answer), question)
    replies = _ask_each(model, tokenizer, list(different.values()), template, batched)
    reply_to = dict(zip(different, replies, strict=True))
    return [reply_to[question.prompt, question.answer] for question in questions]


def _ask_each(
    model: Any, tokenizer: Any, questions: Sequence[Question], template: Template, batched: Batched
) -> list[Reply]:
    pairs = [(question.prompt, question.answer) for question in questions]
    prompts = [prompt for prompt, _ in pairs]
    lengths = [free_length(tokenizer, answer) for _, answer in pairs]
    tokens = predicted_tokens(model, tokenizer, pairs, template=template, batched=batched)
    texts = free_answers(model, tokenizer, prompts, lengths, template=template, batched=batched)
    return [Reply(said, wanted, text) for (said, wanted), text in zip(tokens, texts, strict=True)]


def judged(question: Question, reply: Reply, before: Reply | None) -> dict[str, Any]:
    """Judge one reply, as it stands in a result line.

    before: what the unedited model replied; needed for locality, which asks whether the reply is still the same.
    """
    entry: dict[str, Any] = {"kind": question.kind, "topic": question.topic}
    if question.kind == "locality":
        assert before is not None, "locality compares with the unedited model"
        entry |= {"match": reply.match(before.said), "unchanged": reply.text == before.text}
    else:
        entry["match"] = reply.match(reply.wanted)
        entry["exact"] = exact_match(reply.text, question.answer)
        entry["prefix"] = prefix_match(reply.text, question.answer)
    return entry | {"said": reply.text}


class Unedited:
    """Keep the unedited model's replies, each asked for once, however many runs compare with it."""

    def __init__(self, tokenizer: Any, template: Template = RAW) -> None:
        self.tokenizer, self.template = tokenizer, template
        self._replies: dict[tuple[Prompt, str], Reply] = {}

    def ask(self, base: Any, questions: Iterable[Question]) -> None:
        """Ask `base`, which must be without edits now, those of `questions` that are about locality and new."""
        new = {(q.prompt, q.answer): q for q in questions if q.kind == "locality"}
        missing = [question for key, question in new.items() if key not in self._replies]
        replies = ask(base, self.tokenizer, missing, self.template)
        self._replies |= {
            (q.prompt, q.answer): reply for q, reply in zip(missing, replies, strict=True)
        }

    def reply(self, question: Question) -> Reply | None:
        """Give what it said, None where it was not asked."""
        return self._replies.get((question.prompt, question.answer))
