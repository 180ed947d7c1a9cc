"""The data of a report on an adapter, which the page and `--json` show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peft_baft.data.cases import Prompt
from peft_baft.tools.report.folder import AdapterFolder
from peft_baft.tools.report.taught import TaughtFact


@dataclass(frozen=True)
class Comparison:
    """A question in one format, with the answers without (`before`) and with (`after`) the edits.

    Attributes:
        form: `raw` or `chat`. before, after: the first line of each answer.
        problem: why the question was not asked, or None.
    """

    form: str
    prompt: Prompt
    before: str
    after: str
    problem: str | None

    @property
    def moved(self) -> bool:
        """Whether the answers differ at all; False if the question was not asked."""
        return self.before != self.after

    @property
    def shared_words(self) -> int:
        """Number of words in the common prefix of both answers."""
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
        asked_as: `question`, `rephrasing`, or the name of the context of the question.
        holds: whether the edited model says the new answer, as whole words, and not the old one; None if it was not asked.
    """

    asked_as: str
    holds: bool | None


@dataclass(frozen=True)
class Neighbour(Comparison):
    """A question that is similar to the fact's, and whose answer should not change.

    Attributes:
        subject: the subject that replaces the fact's; None for a question from the edit file.
        source: `fact` (the subject of another fact), `name` (a well-known name) or `file` (the edit file).
        says_new: whether the edited model says the fact's new answer here, and the unedited model does not.
        taught_by: key of another fact about this subject whose new answer the edited model says, or None.
    """

    subject: str | None
    source: str
    says_new: bool
    taught_by: str | None


@dataclass(frozen=True)
class FactReport:
    """A fact with all answers to questions about it.

    Attributes:
        subject: the span of the prompt that was replaced to make neighbours; None if nothing in the prompt can be its subject.
        subject_found: whether the subject was not given, but found as the span whose replacement changes the unedited model's
            answer most.
        answers: answers to the fact's own question, one per format. rephrasings, contexts: likewise.
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
        """The answers in the formats that the fact was trained in, or all answers if none of those was asked."""
        trained = tuple(answer for answer in self.answers if answer.form in self.fact.forms)
        return trained or self.answers

    @property
    def holds(self) -> bool | None:
        """Whether the fact holds in every format that it was trained in; None if one of them could not be asked."""
        verdicts = [answer.holds for answer in self.judged]
        if False in verdicts:
            return False
        return None if None in verdicts else True

    @property
    def moved(self) -> tuple[Neighbour, ...]:
        """The neighbours whose answers changed."""
        return tuple(neighbour for neighbour in self.neighbours if neighbour.moved)


@dataclass(frozen=True)
class AdapterReport:
    """An adapter and the present answers to its facts.

    Attributes:
        folder: the adapter's files. base: name of the base model; its dtype and device are in `versions`.
        forms: the formats that were asked, of `raw` and `chat`. facts: the facts that were asked.
        not_in_adapter: facts that were undone or replaced by later ones.
        left_out: number of further facts in the adapter, which were not asked.
        canaries: general questions that are not about any fact.
        notes: further notes for the reader. versions: versions of the packages.
        created: time of the report in ISO 8601.
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
        """The neighbours that changed, with their facts: first those that say the fact's new answer, then the most changed."""
        moved = [(fact, neighbour) for fact in self.facts for neighbour in fact.moved]
        return sorted(moved, key=lambda pair: (not pair[1].says_new, pair[1].shared_words))

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of facts, neighbours and canaries, and of those that hold or changed."""
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

    def count_holding(self, kind: str, form: str) -> tuple[int, int]:
        """Count the answers of a kind (`answers`, `rephrasings` or `contexts`) in a format: those that hold, and all."""
        verdicts: list[bool] = []
        for fact in self.facts:
            answers: tuple[Answer, ...] = getattr(fact, kind)
            verdicts += [a.holds for a in answers if a.form == form and a.holds is not None]
        return sum(verdicts), len(verdicts)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as a JSON-serialisable dict, with the derived values."""
        data = asdict(self)
        for shown, fact in zip(data["facts"], self.facts, strict=True):
            shown["holds"] = fact.holds
            for entry, neighbour in zip(shown["neighbours"], fact.neighbours, strict=True):
                entry["moved"] = neighbour.moved
        for shown, canary in zip(data["canaries"], self.canaries, strict=True):
            shown["moved"] = canary.moved
        return {"counts": self.counts, **data}


def _asked(comparisons: Sequence[Comparison]) -> int:
    return sum(comparison.problem is None for comparison in comparisons)
