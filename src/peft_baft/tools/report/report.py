"""What a report of an adapter holds, as data. The page and `--json` show the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peft_baft.data.cases import Prompt
from peft_baft.tools.report.folder import AdapterFolder
from peft_baft.tools.report.taught import TaughtFact


@dataclass(frozen=True)
class Comparison:
    """One question, asked without (`before`) and with (`after`) the edits in one form.

    Attributes:
        form: `raw` or `chat`. before, after: the first line of each answer. problem: why it was not asked, or None.
    """

    form: str
    prompt: Prompt
    before: str
    after: str
    problem: str | None

    @property
    def moved(self) -> bool:
        """Whether the answers differ in any letter; a question that was not asked has not moved."""
        return self.before != self.after

    @property
    def shared_words(self) -> int:
        """With how many words both answers begin."""
        count = 0
        for one, other in zip(self.before.split(), self.after.split(), strict=False):
            if one != other:
                break
            count += 1
        return count


@dataclass(frozen=True)
class Answer(Comparison):
    """An answer that should be the fact's new one.

    Attributes:
        asked_as: `question`, `rephrasing`, or the name of what stands around the question.
        holds: whether the edited model says the new answer, as whole words, and not the old one; None where it was not asked.
    """

    asked_as: str
    holds: bool | None


@dataclass(frozen=True)
class Neighbour(Comparison):
    """A question that looks like the fact's, whose answer should stay.

    Attributes:
        subject: what stands in the place of the fact's own; None for a question of the edit file.
        source: `fact` (the subject of another fact), `name` (a well-known name) or `file`.
        says_new: the edited model says the fact's new answer here, and the unedited did not.
        taught_by: the key of another fact about this subject whose new answer it says, or None.
    """

    subject: str | None
    source: str
    says_new: bool
    taught_by: str | None


@dataclass(frozen=True)
class FactReport:
    """A fact, and all that was asked about it.

    Attributes:
        subject: what was exchanged for the neighbours, None where the prompt has nothing that could be one.
        subject_found: nobody has named it; it is the span whose exchange changes the unedited model's answer most.
        answers: the question itself, once in each form; `rephrasings` and `contexts` likewise.
    """

    fact: TaughtFact
    subject: str | None
    subject_found: bool
    answers: tuple[Answer, ...]
    rephrasings: tuple[Answer, ...]
    contexts: tuple[Answer, ...]
    neighbours: tuple[Neighbour, ...]

    @property
    def judged(self) -> tuple[Answer, ...]:
        """The answers in the forms in which the fact was taught; in every form where none of those was asked."""
        taught = tuple(answer for answer in self.answers if answer.form in self.fact.forms)
        return taught or self.answers

    @property
    def holds(self) -> bool | None:
        """Whether the fact holds in each form in which it was taught; None where one could not be asked."""
        verdicts = [answer.holds for answer in self.judged]
        if False in verdicts:
            return False
        return None if None in verdicts else True

    @property
    def moved(self) -> tuple[Neighbour, ...]:
        """The neighbours that moved."""
        return tuple(neighbour for neighbour in self.neighbours if neighbour.moved)


@dataclass(frozen=True)
class AdapterReport:
    """An adapter with its facts, as they are now.

    Attributes:
        folder: the adapter's own files. base: the name of the base model, with its dtype and device in `versions`.
        forms: `raw` and `chat`, those in which was asked. facts: those that were asked.
        not_in_adapter: facts that were taken back or replaced by later ones. left_out: how many more are in the adapter and
            were not asked.
        canaries: general questions that no fact is about.
        notes: what else a reader must know. versions: of the packages. created: when, as ISO 8601 has it.
    """

    folder: AdapterFolder
    base: str
    forms: tuple[str, ...]
    facts: tuple[FactReport, ...]
    not_in_adapter: tuple[TaughtFact, ...]
    left_out: int
    canaries: tuple[Comparison, ...]
    notes: tuple[str, ...]
    versions: dict[str, str]
    created: str

    @property
    def moved(self) -> list[tuple[FactReport, Neighbour]]:
        """The neighbours that moved, each with its fact: first those that say the fact's new answer, then the most changed."""
        moved = [(fact, neighbour) for fact in self.facts for neighbour in fact.moved]
        return sorted(moved, key=lambda pair: (not pair[1].says_new, pair[1].shared_words))

    @property
    def counts(self) -> dict[str, int]:
        """How many facts, neighbours and canaries were asked, and what became of them."""
        neighbours = [neighbour for fact in self.facts for neighbour in fact.neighbours]
        return {
            "facts": len(self.facts),
            "hold": sum(fact.holds is True for fact in self.facts),
            "could_not_be_asked": sum(fact.holds is None for fact in self.facts),
            "left_out": self.left_out,
            "not_in_adapter": len(self.not_in_adapter),
            "neighbours": _asked(neighbours),
            "neighbours_moved": sum(neighbour.moved for neighbour in neighbours),
            "neighbours_say_new": sum(neighbour.says_new for neighbour in neighbours),
            "canaries": _asked(self.canaries),
            "canaries_moved": sum(canary.moved for canary in self.canaries),
        }

    def held_in(self, kind: str, form: str) -> tuple[int, int]:
        """Count what holds, and what was asked, of one kind (`answers`, `rephrasings` or `contexts`) in one form."""
        answers = [
            answer
            for fact in self.facts
            for answer in getattr(fact, kind)
            if answer.form == form and answer.holds is not None
        ]
        return sum(answer.holds is True for answer in answers), len(answers)

    def to_dict(self) -> dict[str, Any]:
        """Give the report as JSON takes it, with what follows from its parts."""
        data = asdict(self)
        for shown, fact in zip(data["facts"], self.facts, strict=True):
            shown["holds"] = fact.holds
            for neighbour, of in zip(shown["neighbours"], fact.neighbours, strict=True):
                neighbour["moved"] = of.moved
        for shown, canary in zip(data["canaries"], self.canaries, strict=True):
            shown["moved"] = canary.moved
        return {"counts": self.counts, **data}


def _asked(comparisons: Sequence[Comparison]) -> int:
    return sum(comparison.problem is None for comparison in comparisons)
