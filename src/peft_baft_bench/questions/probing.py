"""Which questions are asked about each row: the benchmark's own, and further kinds generated from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from peft_baft.data.cases import Case, asked_words
from peft_baft.data.templates import RAW, Template
from peft_baft.evaluation.frames import described_frames, framed, frames_that_render
from peft_baft.evaluation.scoring import FREE_RULE, STATEMENT_TOKENS
from peft_baft_bench.questions.asking import NEIGHBOUR, Question, data_questions
from peft_baft_bench.questions.neighbour_questions import (
    OTHER_RELATION,
    OTHER_SUBJECT,
    Neighbours,
)

IN_CONTEXT = "in_context"
FURTHER_KINDS = {
    IN_CONTEXT: "Ask for the edit in contexts that it was not taught in, teacher-forced and freely generated.",
    NEIGHBOUR: "Ask the edit's question about other subjects, and other rows' questions about its subject: what changed?",
}


@dataclass(frozen=True)
class Probing:
    """Which questions are asked about each row.

    Attributes:
        template: the prompt format of all questions.
        frames: the names of the frames in which the edit is asked; empty without the kind `in_context`.
        neighbours: generates the questions of the kind `neighbour`; None without it.
        statement_tokens: maximum length of the free answers that are searched for the expected one; 0
            requests no statements.
    """

    template: Template = RAW
    frames: Sequence[str] = ()
    neighbours: Neighbours | None = None
    statement_tokens: int = 0

    @classmethod
    def for_kinds(
        cls,
        kinds: Sequence[str],
        cases: Sequence[Case],
        tokenizer: PreTrainedTokenizerBase,
        template: Template = RAW,
    ) -> Probing:
        """Ask the questions of the data, and the given kinds from `FURTHER_KINDS`.

        Whole sentences are requested if there is a further kind, and in a chat, where models answer in
        sentences.

        Raises:
            ValueError: a kind is unknown, does not work with this model, or cannot be generated from this
                data.
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
        """List all questions about some rows of the data, `cases`.

        Args:
            edited: the rows that the same editor learns; their own questions are not used as neighbours.
        """
        taught = self.neighbours.taught_by(edited) if self.neighbours is not None else set()
        questions: list[Question] = []
        for row in rows:
            questions += data_questions(row, cases[row])
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
            for neighbour in self.neighbours.for_row(row)
            if asked_words(neighbour.prompt) not in taught
        ]

    def describe(self) -> dict[str, Any]:
        """Describe for the protocol of a result line which questions are asked beyond the data's own, and how."""
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
