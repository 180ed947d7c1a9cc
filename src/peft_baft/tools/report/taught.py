"""The facts of an adapter, as its journal and the user's edit file know them, before anything is asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from peft_baft.data.cases import Case, Edit, Prompt
from peft_baft.editing.journal import EditLine, Journal, RunLine

FORMS = ("raw", "chat")
FIRST_FORMS = ("raw",)  # of journals from before facts were taught in forms


@dataclass(frozen=True)
class TaughtFact:
    """One fact that an adapter was taught.

    Attributes:
        key: the edit's number, with the fact's place in its batch where that holds several: `7` or `7.2`; a number in the edit
            file where there is no journal.
        prompt, target, subject: the fact. The subject is None where nobody has named it.
        forms: `raw` and `chat`, those in which it was taught; empty where that is not known.
        rephrasings: its question in other words. nearby: questions whose answers should stay. old: the answer before the edit;
            each from the edit file.
        batch: how many facts were learned with it at once, itself included. steps, seconds, loss: what that batch cost.
        learned: whether it was learned when it was made; None where there is no journal.
        problem: why the edit was not good. kept: whether it is in the adapter.
        replaced_by: the key of a later edit of the same question.
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
        """Whether the adapter should know it: it was kept, and no later edit changed the same answer."""
        return self.kept and self.replaced_by is None


def facts_of_journal(journal: Journal) -> list[TaughtFact]:
    """List the facts of a journal that count, in the order in which they were taught.

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
    """List the facts of an edit file, for an adapter that has no journal."""
    facts = [
        TaughtFact(str(number), case.edit.prompt, case.edit.target)
        for number, case in enumerate(cases, start=1)
    ]
    return with_cases(_with_replaced(facts), cases)


def with_cases(facts: Sequence[TaughtFact], cases: Sequence[Case]) -> list[TaughtFact]:
    """Add what an edit file says about the facts: subjects, rephrasings, questions nearby and old answers."""
    of_edit = {_identity(case.edit.prompt, case.edit.target): case for case in cases}
    completed = []
    for fact in facts:
        case = of_edit.get(_identity(fact.prompt, fact.target))
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
        edit = Edit(prompt, target)  # checks both, and makes messages of what JSON has
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
    """Read from the settings of a run in which forms it taught a prompt; messages are a chat in any."""
    if not isinstance(prompt, str):
        return ("chat",)
    described = settings.get("templates")
    if described is None:
        return FIRST_FORMS
    return tuple(form for form in FORMS if f"chat={form == 'chat'}" in str(described))


def _with_replaced(facts: Sequence[TaughtFact]) -> list[TaughtFact]:
    """Note which facts a later one of the same question has replaced."""
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
