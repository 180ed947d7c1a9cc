"""Ask about every fact of an adapter: itself, in other words, in contexts, and what stands beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import islice
from typing import Any

from peft import PeftModel

from peft_baft.data.batching import context_window, encode_prompt
from peft_baft.data.cases import Prompt, asked_words
from peft_baft.data.neighbours import with_other_subject
from peft_baft.data.templates import CHAT, RAW, Template
from peft_baft.data.unrelated import CANARIES
from peft_baft.editing.contrasts import find_subject
from peft_baft.evaluation.frames import framed
from peft_baft.evaluation.scoring import contains_new_not_old, says
from peft_baft.tools.check.findings import installed_versions
from peft_baft.tools.report.folder import AdapterFolder
from peft_baft.tools.report.questions import Question, Replies, ask_both, question_for
from peft_baft.tools.report.report import AdapterReport, Answer, Comparison, FactReport, Neighbour
from peft_baft.tools.report.subjects import kind_of, neighbouring_subjects
from peft_baft.tools.report.taught import TaughtFact

LIMIT, NEIGHBOURS, CONTEXTS = 50, 4, 3
LONGER_SUBJECT = 16  # tokens by which another subject may be longer than the fact's own
QUESTION, REPHRASING = "question", "rephrasing"
Asked = tuple[tuple[str, Question], ...]  # questions, each with what it is asked as


@dataclass(frozen=True)
class PlannedNeighbour:
    """A neighbour before it is asked."""

    question: Question
    subject: str | None
    source: str


@dataclass(frozen=True)
class Plan:
    """All questions about one fact; each of `answers`, `rephrasings` and `contexts` with what it is asked as."""

    fact: TaughtFact
    subject: str | None
    answers: Asked
    rephrasings: Asked
    contexts: Asked
    neighbours: tuple[PlannedNeighbour, ...]

    def questions(self) -> Iterable[Question]:
        """Give every question."""
        for _, question in (*self.answers, *self.rephrasings, *self.contexts):
            yield question
        for neighbour in self.neighbours:
            yield neighbour.question


def gather(
    model: PeftModel,
    tokenizer: Any,
    facts: Sequence[TaughtFact],
    forms: Sequence[Template],
    folder: AdapterFolder,
    base: str,
    *,
    limit: int = LIMIT,
    neighbours: int = NEIGHBOURS,
    contexts: int = CONTEXTS,
    notes: Sequence[str] = (),
    begin: Callable[[int], Callable[[int], object]] = lambda total: lambda asked: None,
) -> AdapterReport:
    """Ask the unedited and the edited model about the facts of an adapter.

    Args:
        model: the base model with the adapter on it. forms: the templates in which everything is asked.
        folder, base: what the report says of the adapter's files and of the base model's name.
        limit: about so many facts is asked, at most: the first, the last, and others evenly between them.
        neighbours, contexts: for each fact and form at most so many neighbours with another subject, and contexts.
        notes: what else a reader of the report must know.
        begin: called with the number of answers to come; gives what is called with the number of those just made.

    Raises:
        ValueError: limit is below 1, or no form is given.
    """
    if limit < 1 or neighbours < 0 or contexts < 0 or not forms:
        raise ValueError(
            f"A report needs a form, limit of 1 or more, and neighbours and contexts of 0 or more, not {limit}, {neighbours} "
            f"and {contexts}."
        )
    current = [fact for fact in facts if fact.in_adapter]
    asked = evenly_spread(current, limit)
    plans = _plans(model, tokenizer, asked, current, forms, neighbours, contexts)
    canaries = [Question(form.name, canary.prompt) for form in forms for canary in CANARIES]
    questions = list(dict.fromkeys([*canaries, *(q for plan in plans for q in plan.questions())]))
    replies = ask_both(model, tokenizer, questions, forms, begin(2 * len(questions)))
    targets = _targets_by_subject(plans)
    return AdapterReport(
        folder,
        base,
        tuple(form.name for form in forms),
        tuple(_reported(plan, replies, targets) for plan in plans),
        tuple(fact for fact in facts if not fact.in_adapter),
        len(current) - len(asked),
        tuple(_comparison(question, replies[question]) for question in canaries),
        tuple(notes),
        installed_versions() | {"weights": str(model.dtype), "device": str(model.device)},
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def evenly_spread(facts: Sequence[TaughtFact], limit: int) -> list[TaughtFact]:
    """Choose at most so many facts: the first, the last, and others evenly between them.

    In an adapter that was edited many times the first facts are the likeliest to be forgotten, and the last ones the least, so
    neither end alone would be a fair sample.
    """
    if len(facts) <= limit:
        return list(facts)
    if limit == 1:
        return [facts[-1]]
    return [facts[i * (len(facts) - 1) // (limit - 1)] for i in range(limit)]


def _plans(
    model: PeftModel,
    tokenizer: Any,
    asked: Sequence[TaughtFact],
    current: Sequence[TaughtFact],
    forms: Sequence[Template],
    neighbours: int,
    contexts: int,
) -> list[Plan]:
    """Choose the questions about each fact."""
    subjects = [_subject(model, tokenizer, fact, forms) for fact in asked]
    pool: dict[str, str | None] = {}
    for fact, subject in zip(asked, subjects, strict=True):
        if subject is not None:
            pool.setdefault(subject, kind_of(fact.prompt, subject))
    # A question that another fact was taught for is meant to change.
    taught = {asked_words(p) for fact in current for p in (fact.prompt, *fact.rephrasings)}
    plans = []
    for fact, subject in zip(asked, subjects, strict=True):
        beside = _neighbours(fact, subject, pool, taught, neighbours)
        answers, rephrasings, in_contexts = _asked_of_fact(tokenizer, fact, forms, contexts)
        planned = [
            PlannedNeighbour(question_for(tokenizer, form, prompt, fact.target), other, source)
            for prompt, other, source in beside
            for form in _form_names(prompt, forms)
        ]
        plans.append(Plan(fact, subject, answers, rephrasings, in_contexts, tuple(planned)))
    return plans


def _asked_of_fact(
    tokenizer: Any, fact: TaughtFact, forms: Sequence[Template], contexts: int
) -> tuple[Asked, Asked, Asked]:
    """List what a fact itself is asked as: its question, its rephrasings, and it in contexts."""

    def questions(prompt: Prompt, name: str) -> list[tuple[str, Question]]:
        return [
            (name, question_for(tokenizer, form, prompt, fact.target))
            for form in _form_names(prompt, forms)
        ]

    in_contexts = []
    for form in _form_names(fact.prompt, forms):
        frames = framed(fact.prompt, CHAT if form == "chat" else RAW)
        for name, prompt in islice(frames.items(), contexts):
            in_contexts.append((name, question_for(tokenizer, form, prompt, fact.target)))
    rephrased = [pair for prompt in fact.rephrasings for pair in questions(prompt, REPHRASING)]
    return tuple(questions(fact.prompt, QUESTION)), tuple(rephrased), tuple(in_contexts)


def _form_names(prompt: Prompt, forms: Sequence[Template]) -> list[str]:
    """List the forms that differ for a prompt: messages are a chat in any."""
    if isinstance(prompt, str):
        return [form.name for form in forms]
    return ["chat" if any(form.chat for form in forms) else forms[0].name]


def _subject(
    model: PeftModel, tokenizer: Any, fact: TaughtFact, forms: Sequence[Template]
) -> str | None:
    """Give a fact's subject, found where nobody has named it; None where there is none or the prompt is too long."""
    if fact.subject is not None:
        return fact.subject
    form = next((form for form in forms if form.name in fact.forms), forms[0])
    try:
        length = len(encode_prompt(tokenizer, fact.prompt, template=form).ids)
    except ValueError:  # the same is said of the question itself
        return None
    window = context_window(model)
    if window is not None and length + LONGER_SUBJECT > window:
        return None
    return find_subject(model, tokenizer, fact.prompt, form)


def _neighbours(
    fact: TaughtFact,
    subject: str | None,
    pool: Mapping[str, str | None],
    taught: set[str],
    count: int,
) -> list[tuple[Prompt, str | None, str]]:
    """List questions beside a fact's: those of the edit file, then with other subjects, each with its subject and source."""
    found: list[tuple[Prompt, str | None, str]] = [(p, None, "file") for p in fact.nearby]
    if subject is None:
        return found
    exchanged = (
        (with_other_subject(fact.prompt, subject, other), other, "fact" if of_fact else "name")
        for other, of_fact in neighbouring_subjects(fact.prompt, subject, pool.items())
    )
    return found + list(islice((n for n in exchanged if asked_words(n[0]) not in taught), count))


def _targets_by_subject(plans: Sequence[Plan]) -> dict[str, list[TaughtFact]]:
    """List the facts about each subject."""
    facts: dict[str, list[TaughtFact]] = {}
    for plan in plans:
        if plan.subject is not None:
            facts.setdefault(plan.subject, []).append(plan.fact)
    return facts


def _reported(
    plan: Plan, replies: Mapping[Question, Replies], about: Mapping[str, Sequence[TaughtFact]]
) -> FactReport:
    fact = plan.fact
    answers, rephrasings, contexts = (
        tuple(_answer(fact, name, question, replies[question]) for name, question in part)
        for part in (plan.answers, plan.rephrasings, plan.contexts)
    )
    return FactReport(
        fact,
        plan.subject,
        plan.subject is not None and fact.subject is None,
        answers,
        rephrasings,
        contexts,
        tuple(
            _neighbour(fact, planned, replies[planned.question], about)
            for planned in plan.neighbours
        ),
    )


def _comparison(question: Question, reply: Replies) -> Comparison:
    return Comparison(question.form, question.prompt, reply.before, reply.after, reply.problem)


def _answer(fact: TaughtFact, asked_as: str, question: Question, reply: Replies) -> Answer:
    holds = None
    if reply.problem is None:
        holds = contains_new_not_old(reply.after, fact.target, _old_answer(fact, reply))
    return Answer(
        question.form, question.prompt, reply.before, reply.after, reply.problem, asked_as, holds
    )


def _old_answer(fact: TaughtFact, reply: Replies) -> str | None:
    """Give the answer that should be gone: what the edit file names, else all that the unedited model says.

    An unedited model that says the new answer already has none that should be gone.
    """
    if fact.old is not None:
        return fact.old
    return reply.before if reply.before and not says(reply.before, fact.target) else None


def _neighbour(
    fact: TaughtFact,
    planned: PlannedNeighbour,
    reply: Replies,
    about: Mapping[str, Sequence[TaughtFact]],
) -> Neighbour:
    question = planned.question
    taught_by = None
    for other in about.get(planned.subject or "", ()):
        if says(reply.after, other.target) and not says(reply.before, other.target):
            taught_by = other.key
    return Neighbour(
        question.form,
        question.prompt,
        reply.before,
        reply.after,
        reply.problem,
        planned.subject,
        planned.source,
        says(reply.after, fact.target) and not says(reply.before, fact.target),
        taught_by,
    )
