"""Collect the facts of an adapter from its journal and the user's edit file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft_baft.data.cases import Case, Edit, Prompt
from peft_baft.editing.journal import EditLine, Journal, RunLine

FORMS = ("raw", "chat")
FIRST_FORMS = ("raw",)  # the format of all edits in journals that do not record formats


@dataclass(frozen=True)
class TaughtFact:
    """A fact that an adapter was trained on.

    Attributes:
        key: the number of the edit, and the fact's place if the edit has several facts: `7` or `7.2`. Without a journal, the
            fact's number in the edit file.
        prompt, target, subject: the fact. The subject is None if it was not given.
        forms: the formats in which it was trained, of `raw` and `chat`; empty if unknown.
        rephrasings: rephrased prompts, from the edit file.
        nearby: questions whose answers should not change, from the edit file.
        old: the answer before the edit, from the edit file.
        batch: number of facts that were trained together, including this one.
        steps, seconds, loss: steps, duration and final loss of that batch.
        learned: whether the edit was learned when it was made; None if there is no journal.
        problem: why the edit was rejected, or None. kept: whether it is in the adapter nevertheless.
        replaced_by: key of a later edit of the same prompt, or None.
    """

    key: str
    prompt: Prompt
    target: str
    subject: str | None = None
    forms: tuple[str, ...] = ()
    rephrasings: tuple[Prompt, ...] = ()
    nearby: tuple[Prompt, ...] = ()
    old: str | None = None
    batch: int = 1
    steps: int | None = None
    seconds: float | None = None
    loss: float | None = None
    learned: bool | None = None
    problem: str | None = None
    kept: bool = True
    replaced_by: str | None = None

    @property
    def in_adapter(self) -> bool:
        """Whether the adapter should know the fact: it was kept, and no later edit changed its answer."""
        return self.kept and self.replaced_by is None


def facts_of_journal(journal: Journal) -> list[TaughtFact]:
    """List the facts of a journal that were not undone, in the order of their edits.

    Raises:
        ValueError: a line is damaged.
    """
    facts: list[TaughtFact] = []
    state = journal.state()
    for line, run in zip(state.edits, state.edit_runs, strict=True):
        if line.edit in state.forgotten:
            continue
        several = len(line.facts) > 1
        for place, pair in enumerate(line.facts, start=1):
            key = f"{line.edit}.{place}" if several else str(line.edit)
            facts.append(_fact(key, line, pair, run, journal))
    return _with_replaced(facts)


def facts_of_cases(cases: Sequence[Case]) -> list[TaughtFact]:
    """List the facts of an edit file, for an adapter without a journal."""
    facts = [
        TaughtFact(str(number), case.edit.prompt, case.edit.target)
        for number, case in enumerate(cases, start=1)
    ]
    return with_cases(_with_replaced(facts), cases)


def with_cases(facts: Sequence[TaughtFact], cases: Sequence[Case]) -> list[TaughtFact]:
    """Add subjects, rephrasings, nearby questions and old answers from an edit file to the facts."""
    cases_by_edit = {_identity(case.edit.prompt, case.edit.target): case for case in cases}
    completed = []
    for fact in facts:
        case = cases_by_edit.get(_identity(fact.prompt, fact.target))
        if case is not None:
            fact = replace(
                fact,
                subject=case.edit.subject,
                rephrasings=tuple(probe.prompt for probe in case.of_kind("generality")),
                nearby=tuple(probe.prompt for probe in case.of_kind("locality")),
                old=case.old_answer,
            )
        completed.append(fact)
    return completed


def unknown_cases(facts: Sequence[TaughtFact], cases: Sequence[Case]) -> int:
    """Count the records of an edit file that are not among the facts."""
    known = {_identity(fact.prompt, fact.target) for fact in facts}
    return sum(_identity(case.edit.prompt, case.edit.target) not in known for case in cases)


def _fact(
    key: str, line: EditLine, pair: Sequence[Any], run: RunLine | None, journal: Journal
) -> TaughtFact:
    try:
        prompt, target = pair
        edit = Edit(prompt, target)  # validates both, and converts JSON messages
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"The journal of {journal.folder}, edit {line.edit}, is damaged: {error}"
        ) from None
    return TaughtFact(
        key,
        edit.prompt,
        edit.target,
        forms=_forms(edit.prompt, {} if run is None else run.settings),
        batch=len(line.facts),
        steps=line.steps,
        seconds=line.seconds,
        loss=line.loss,
        learned=line.learned,
        problem=line.problem,
        kept=line.kept,
    )


def _forms(prompt: Prompt, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the formats in which a run trained a prompt, from its settings. Messages are a chat in every format."""
    if not isinstance(prompt, str):
        return ("chat",)
    described = settings.get("templates")
    if described is None:
        return FIRST_FORMS
    return tuple(form for form in FORMS if f"chat={form == 'chat'}" in str(described))


def _with_replaced(facts: Sequence[TaughtFact]) -> list[TaughtFact]:
    """Set `replaced_by` of the facts whose prompt was edited again later."""
    last = {_question(fact.prompt): fact for fact in facts if fact.kept}
    marked = []
    for fact in facts:
        later = last.get(_question(fact.prompt))
        replaced = fact.kept and later is not None and later.key != fact.key
        marked.append(replace(fact, replaced_by=later.key) if replaced and later else fact)
    return marked


def _question(prompt: Prompt) -> Any:
    return prompt.strip() if isinstance(prompt, str) else tuple(prompt)


def _identity(prompt: Prompt, target: str) -> tuple[Any, str]:
    return _question(prompt), target.strip()
