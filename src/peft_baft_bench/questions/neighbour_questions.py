"""Questions beside an edit, made from the data's own rows: what moves wrongly when an edit reaches too far.

    other subject   the edit's prompt, with its subject exchanged for those of the next rows
    other relation  another question about the edit's subject: the record's own where it brings some, else the prompts of the next
                    rows with their subjects exchanged for this one

What the right answer is nobody knows, and nobody needs to: the reply is compared with the unedited model's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice

from peft_baft.data.cases import Case, Prompt, asked_words, prompt_words
from peft_baft.data.neighbours import NOT_NAMES, with_other_subject
from peft_baft.data.neighbours import SUBJECTS as TRAINED_SUBJECTS

OTHER_SUBJECT, OTHER_RELATION = "subject", "relation"  # what of a neighbour differs from the edit
SUBJECTS, QUESTIONS = 4, 2  # how many of each are asked about a row
STEM = 5  # words that share so many first letters count as one: "discovered", "discovery"
TIME = {"when", "year", "date", "day", "month", "time", "inception"}


@dataclass(frozen=True)
class Neighbour:
    """A question beside an edit. topic: `OTHER_SUBJECT` or `OTHER_RELATION`."""

    topic: str
    prompt: Prompt


class Neighbours:
    """Makes the neighbours of each row from the other rows; always the same ones."""

    def __init__(
        self, cases: Sequence[Case], subjects: int = SUBJECTS, questions: int = QUESTIONS
    ) -> None:
        """Take the rows of a benchmark, and how many questions of each topic to ask.

        Raises:
            ValueError: no edit names its subject.
        """
        if not any(case.edit.subject for case in cases):
            raise ValueError(
                "Neighbours are made by exchanging subjects, and no record of the data names one that stands in its prompt. "
                "Add 'subject' to the records, or ask without neighbours."
            )
        self.cases, self.subjects, self.questions = cases, subjects, questions
        self._taught = self.taught_by(range(len(cases)))

    def taught_by(self, rows: Sequence[int]) -> set[str]:
        """List what is no neighbour of anything once some rows are edited: what they teach, and ask about as taught."""
        prompts: list[Prompt] = []
        for row in rows:
            prompts += [self.cases[row].edit.prompt, *_rephrasings(self.cases[row])]
        return set(map(asked_words, prompts))

    def of(self, row: int) -> list[Neighbour]:
        """List the neighbours of a row; fewer where the data has no more, none where the edit names no subject."""
        if self.cases[row].edit.subject is None:
            return []
        subjects = islice(self._other_subjects(row), self.subjects)
        relations = islice(self._other_relations(row), self.questions)
        return [
            *(Neighbour(OTHER_SUBJECT, prompt) for prompt in subjects),
            *(Neighbour(OTHER_RELATION, prompt) for prompt in relations),
        ]

    def _next_rows(self, row: int) -> Iterator[Case]:
        """Go through the other rows with a subject, from the next one on, beginning again at the end."""
        for distance in range(1, len(self.cases)):
            other = self.cases[(row + distance) % len(self.cases)]
            if other.edit.subject is not None:
                yield other

    def _other_subjects(self, row: int) -> Iterator[Prompt]:
        """Exchange the subject; what another row teaches comes last, since it may be edited at the same time."""
        edit = self.cases[row].edit
        assert edit.subject is not None
        # Contrast texts are made with names of their own, which training knows.
        seen = {edit.subject.casefold(), *map(str.casefold, TRAINED_SUBJECTS)}
        taught_elsewhere = []
        for other in self._next_rows(row):
            assert other.edit.subject is not None
            name = other.edit.subject.casefold()
            if name in seen:
                continue
            seen.add(name)
            prompt = with_other_subject(edit.prompt, edit.subject, other.edit.subject)
            if asked_words(prompt) in self._taught:
                taught_elsewhere.append(prompt)
            else:
                yield prompt
        yield from taught_elsewhere

    def _other_relations(self, row: int) -> Iterator[Prompt]:
        """Ask about a row's subject what it does not teach.

        A question may ask for the same in other words, and then the new answer is right. So none is taken that shares a word
        with the edit or a rephrasing, nor one of a row about the same subject or with an answer in common.
        """
        case = self.cases[row]
        words = _asked_words([case.edit.prompt, *_rephrasings(case)], case.edit.subject)
        seen = set(self._taught)
        for prompt in chain(_own_questions(case), self._borrowed_questions(row)):
            asks_the_same = words & _asked_words([prompt], case.edit.subject)
            if not asks_the_same and asked_words(prompt) not in seen:
                seen.add(asked_words(prompt))
                yield prompt

    def _borrowed_questions(self, row: int) -> Iterator[Prompt]:
        case = self.cases[row]
        subject = case.edit.subject
        assert subject is not None
        answers = _answers(case)
        for other in self._next_rows(row):
            theirs = other.edit.subject
            assert theirs is not None
            if theirs.casefold() != subject.casefold() and not answers & _answers(other):
                yield with_other_subject(other.edit.prompt, theirs, subject)


def _own_questions(case: Case) -> list[Prompt]:
    """List the locality questions of a record that are about the edit's subject, as KnowEdit's are."""
    subject = case.edit.subject
    assert subject is not None
    return [p.prompt for p in case.of_kind("locality") if subject in prompt_words(p.prompt)]


def _rephrasings(case: Case) -> list[Prompt]:
    return [probe.prompt for probe in case.of_kind("generality")]


def _answers(case: Case) -> set[str]:
    """Give the new and the old answer of a row, in lower case."""
    answers = [case.edit.target] if case.old_answer is None else [case.edit.target, case.old_answer]
    return {" ".join(answer.casefold().split()) for answer in answers}


def _asked_words(prompts: Sequence[Prompt], subject: str | None) -> set[str]:
    """List the beginnings of the words by which prompts ask for something about a subject."""
    words = set()
    for prompt in prompts:
        text = prompt_words(prompt).casefold()
        if subject is not None:
            text = text.replace(subject.casefold(), " ")
        for word in re.findall(r"\w+", text):
            if word in TIME:
                words.add("when")
            elif len(word) > 2 and word not in NOT_NAMES:
                words.add(word[:STEM])
    return words
