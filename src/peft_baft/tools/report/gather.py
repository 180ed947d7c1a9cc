"""Plan and ask the questions of a report: each fact's own question, rephrased, in contexts, and its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import chain, islice

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

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
LONGER_SUBJECT = 16  # number of tokens by which another subject may be longer than the fact's
QUESTION, REPHRASING = "question", "rephrasing"
# Pairs of QUESTION, REPHRASING or the name of a context, and a question.
NamedQuestions = tuple[tuple[str, Question], ...]


@dataclass(frozen=True)
class PlannedNeighbour:
    """A neighbour that has not been asked yet. See `Neighbour` for its attributes."""

    question: Question
    subject: str | None
    source: str


@dataclass(frozen=True)
class Plan:
    """All questions about one fact."""

    fact: TaughtFact
    subject: str | None
    answers: NamedQuestions
    rephrasings: NamedQuestions
    contexts: NamedQuestions
    neighbours: tuple[PlannedNeighbour, ...]

    def questions(self) -> Iterable[Question]:
        """Yield every question."""
        for _, question in (*self.answers, *self.rephrasings, *self.contexts):
            yield question
        for neighbour in self.neighbours:
            yield neighbour.question


def gather(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
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
    """Ask the unedited and the edited model about the facts of an adapter, and report the answers.

    Args:
        model: the base model with the adapter.
        forms: the prompt formats to ask in.
        folder, base: the adapter's files and the base model's name, for the report.
        limit: maximum number of facts to ask: the first, the last, and others evenly between them.
        neighbours, contexts: maximum number of neighbours with another subject, and of contexts, per fact and format.
        notes: further notes for the reader of the report.
        begin: called with the total number of answers; returns a function that is called with the number of each new batch.

    Raises:
        ValueError: limit is below 1, neighbours or contexts is negative, or there are no formats.
    """
    if limit < 1 or neighbours < 0 or contexts < 0 or not forms:
        raise ValueError(
            f"A report needs a prompt format, limit of 1 or more, and neighbours and contexts of 0 or more, not {limit}, "
            f"{neighbours} and {contexts}."
        )
    current = [fact for fact in facts if fact.in_adapter]
    asked = evenly_spread(current, limit)
    plans = _plans(model, tokenizer, asked, current, forms, neighbours, contexts)
    canaries = [Question(form.name, canary.prompt) for form in forms for canary in CANARIES]
    questions = list(dict.fromkeys(chain(canaries, *(plan.questions() for plan in plans))))
    replies = ask_both(model, tokenizer, questions, forms, begin(2 * len(questions)))
    facts_by_subject = _facts_by_subject(plans)
    return AdapterReport(
        folder=folder,
        base=base,
        forms=tuple(form.name for form in forms),
        facts=tuple(_report_fact(plan, replies, facts_by_subject) for plan in plans),
        not_in_adapter=tuple(fact for fact in facts if not fact.in_adapter),
        left_out=len(current) - len(asked),
        canaries=tuple(_comparison(question, replies[question]) for question in canaries),
        notes=tuple(notes),
        versions=installed_versions() | {"weights": str(model.dtype), "device": str(model.device)},
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def evenly_spread(facts: Sequence[TaughtFact], limit: int) -> list[TaughtFact]:
    """Choose at most `limit` facts: the first, the last, and others evenly between them.

    In an adapter that was edited many times, the first facts are the most likely to be forgotten and the last ones the least
    likely, so taking only one end would not be a fair sample.
    """
    if len(facts) <= limit:
        return list(facts)
    if limit == 1:
        return [facts[-1]]
    return [facts[i * (len(facts) - 1) // (limit - 1)] for i in range(limit)]


def _plans(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
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
    # The answer to another fact's question is meant to change.
    trained = {asked_words(p) for fact in current for p in (fact.prompt, *fact.rephrasings)}
    plans = []
    for fact, subject in zip(asked, subjects, strict=True):
        nearby = _neighbours(fact, subject, pool, trained, neighbours)
        answers, rephrasings, in_contexts = _questions_of_fact(tokenizer, fact, forms, contexts)
        planned = [
            PlannedNeighbour(question_for(tokenizer, form, prompt, fact.target), other, source)
            for prompt, other, source in nearby
            for form in _form_names(prompt, forms)
        ]
        plans.append(Plan(fact, subject, answers, rephrasings, in_contexts, tuple(planned)))
    return plans


def _questions_of_fact(
    tokenizer: PreTrainedTokenizerBase, fact: TaughtFact, forms: Sequence[Template], contexts: int
) -> tuple[NamedQuestions, NamedQuestions, NamedQuestions]:
    """Return the questions for a fact itself: its own question, its rephrasings, and its question in contexts."""

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
    rephrased = chain.from_iterable(questions(p, REPHRASING) for p in fact.rephrasings)
    return tuple(questions(fact.prompt, QUESTION)), tuple(rephrased), tuple(in_contexts)


def _form_names(prompt: Prompt, forms: Sequence[Template]) -> list[str]:
    """List the formats that differ for a prompt: messages are a chat in every format."""
    if isinstance(prompt, str):
        return [form.name for form in forms]
    return ["chat" if any(form.chat for form in forms) else forms[0].name]


def _subject(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    fact: TaughtFact,
    forms: Sequence[Template],
) -> str | None:
    """Return a fact's subject, searching for it if it was not given; None if there is none or the prompt is too long."""
    if fact.subject is not None:
        return fact.subject
    form = next((form for form in forms if form.name in fact.forms), forms[0])
    try:
        length = len(encode_prompt(tokenizer, fact.prompt, template=form).ids)
    except ValueError:  # the report shows this error at the fact's own question
        return None
    window = context_window(model)
    if window is not None and length + LONGER_SUBJECT > window:
        return None
    return find_subject(model, tokenizer, fact.prompt, form)


def _neighbours(
    fact: TaughtFact,
    subject: str | None,
    pool: Mapping[str, str | None],
    trained: set[str],
    count: int,
) -> list[tuple[Prompt, str | None, str]]:
    """List a fact's neighbours: those in the edit file, then ones with other subjects; each with its subject and source."""
    found: list[tuple[Prompt, str | None, str]] = [(p, None, "file") for p in fact.nearby]
    if subject is None:
        return found
    wanted = len(found) + count
    for other, is_of_fact in neighbouring_subjects(fact.prompt, subject, pool.items()):
        if len(found) == wanted:
            break
        prompt = with_other_subject(fact.prompt, subject, other)
        if asked_words(prompt) not in trained:
            found.append((prompt, other, "fact" if is_of_fact else "name"))
    return found


def _facts_by_subject(plans: Sequence[Plan]) -> dict[str, list[TaughtFact]]:
    """Group the facts by subject."""
    facts: dict[str, list[TaughtFact]] = {}
    for plan in plans:
        if plan.subject is not None:
            facts.setdefault(plan.subject, []).append(plan.fact)
    return facts


def _report_fact(
    plan: Plan, replies: Mapping[Question, Replies], by_subject: Mapping[str, Sequence[TaughtFact]]
) -> FactReport:
    """Judge the replies to the questions about one fact."""
    fact = plan.fact

    def judged(questions: NamedQuestions) -> tuple[Answer, ...]:
        return tuple(_answer(fact, name, asked, replies[asked]) for name, asked in questions)

    neighbours = [
        _neighbour(fact, planned, replies[planned.question], by_subject)
        for planned in plan.neighbours
    ]
    return FactReport(
        fact=fact,
        subject=plan.subject,
        subject_found=plan.subject is not None and fact.subject is None,
        answers=judged(plan.answers),
        rephrasings=judged(plan.rephrasings),
        contexts=judged(plan.contexts),
        neighbours=tuple(neighbours),
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
    """Return the answer that the edit should replace: the one in the edit file, or else what the unedited model says.

    It is None if the unedited model already says the new answer.
    """
    if fact.old is not None:
        return fact.old
    return reply.before if reply.before and not says(reply.before, fact.target) else None


def _neighbour(
    fact: TaughtFact,
    planned: PlannedNeighbour,
    reply: Replies,
    by_subject: Mapping[str, Sequence[TaughtFact]],
) -> Neighbour:
    question = planned.question
    taught_by = None
    for other in by_subject.get(planned.subject or "", ()):
        if says(reply.after, other.target) and not says(reply.before, other.target):
            taught_by = other.key
    return Neighbour(
        form=question.form,
        prompt=question.prompt,
        before=reply.before,
        after=reply.after,
        problem=reply.problem,
        subject=planned.subject,
        source=planned.source,
        says_new=says(reply.after, fact.target) and not says(reply.before, fact.target),
        taught_by=taught_by,
    )
