"""Which questions a benchmark asks about each row: its own, and further kinds that are made from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peft_baft.data.cases import Case, asked_words
from peft_baft.data.templates import RAW, Template
from peft_baft.evaluation.frames import described_frames, framed, frames_that_render
from peft_baft.evaluation.scoring import FREE_RULE, STATEMENT_TOKENS
from peft_baft_bench.questions.asking import NEIGHBOUR, Question, questions_of
from peft_baft_bench.questions.neighbour_questions import (
    OTHER_RELATION,
    OTHER_SUBJECT,
    Neighbours,
)

IN_CONTEXT = "in_context"
FURTHER_KINDS = {
    IN_CONTEXT: "Ask for the edit in contexts that it was not taught in, by tokens and by what is freely said.",
    NEIGHBOUR: "Ask the edit's question of other subjects, and other rows' questions of its subject: what moved?",
}


@dataclass(frozen=True)
class Probing:
    """What is asked about each row.

    Attributes:
        template: the form in which everything is asked.
        frames: the names of the frames in which the edit is asked; none without the kind `in_context`.
        neighbours: what makes the questions of the kind `neighbour`; None without it.
        statement_tokens: the length of the free answers in which the wanted one may stand anywhere; 0 asks for none.
    """

    template: Template = RAW
    frames: Sequence[str] = ()
    neighbours: Neighbours | None = None
    statement_tokens: int = 0

    @classmethod
    def of_kinds(
        cls,
        kinds: Sequence[str],
        cases: Sequence[Case],
        tokenizer: Any,
        template: Template = RAW,
    ) -> Probing:
        """Ask what the data asks, and some of `FURTHER_KINDS`.

        Whole sentences are asked for where there is a further kind, and in a chat, where models answer in sentences.

        Raises:
            ValueError: there is no such kind; or it cannot be asked of this model or made from this data.
        """
        unknown = [kind for kind in kinds if kind not in FURTHER_KINDS]
        if unknown:
            raise ValueError(
                f"Unknown kind of probe {unknown[0]!r}; known are {', '.join(FURTHER_KINDS)}."
            )
        frames: Sequence[str] = ()
        if IN_CONTEXT in kinds:
            prompts = [case.edit.prompt for case in cases]
            frames = frames_that_render(tokenizer, template, prompts)
        return cls(
            template,
            frames,
            Neighbours(cases) if NEIGHBOUR in kinds else None,
            STATEMENT_TOKENS if kinds or template.chat else 0,
        )

    def questions(
        self, rows: Sequence[int], cases: Sequence[Case], edited: Sequence[int] = ()
    ) -> list[Question]:
        """List everything that is asked about some rows of the data, `cases`.

        Args:
            edited: the rows that one editor is given; what they teach is no neighbour then.
        """
        taught = self.neighbours.taught_by(edited) if self.neighbours is not None else set()
        questions: list[Question] = []
        for row in rows:
            questions += questions_of(row, cases[row])
            questions += self._in_frames(row, cases[row])
            questions += self._about_neighbours(row, cases[row], taught)
        return questions

    def _in_frames(self, row: int, case: Case) -> list[Question]:
        edit, old = case.edit, case.old_answer
        prompts = framed(edit.prompt, self.template, self.frames)
        return [
            Question(row, IN_CONTEXT, name, prompt, edit.target, old)
            for name, prompt in prompts.items()
        ]

    def _about_neighbours(self, row: int, case: Case, taught: set[str]) -> list[Question]:
        if self.neighbours is None:
            return []
        return [
            Question(row, NEIGHBOUR, neighbour.topic, neighbour.prompt, case.edit.target)
            for neighbour in self.neighbours.of(row)
            if asked_words(neighbour.prompt) not in taught
        ]

    def described(self) -> dict[str, Any]:
        """Say what is asked beyond the data's own questions, and how, as it stands in a result line's protocol."""
        described: dict[str, Any] = {}
        if self.statement_tokens:
            described["free_rule"] = {
                "contains": FREE_RULE,
                "tokens": self.statement_tokens,
                "stop": "end of turn" if self.template.chat else "first line break",
            }
        kinds: dict[str, Any] = {}
        if self.frames:
            kinds[IN_CONTEXT] = described_frames(self.frames)
        if self.neighbours is not None:
            kinds[NEIGHBOUR] = {
                OTHER_SUBJECT: self.neighbours.subjects,
                OTHER_RELATION: self.neighbours.questions,
            }
        return described | ({"probes": kinds} if kinds else {})
