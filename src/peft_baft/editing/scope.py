"""What an edit shall reach and what it shall leave alone, both made from the fact itself.

A fact is in scope in whatever surroundings and in whichever words it is asked for. Out of scope is what only looks like it: its
question of another subject, another question about its subject. The names are those of the field (SERAC and others speak of an
edit's scope).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from peft_baft.data.cases import Edit, Prompt
from peft_baft.data.contexts import CHAT_CONTEXTS, RAW_CONTEXTS, contexts_for, in_contexts
from peft_baft.data.neighbours import (
    CHAT_QUESTIONS,
    SUBJECTS,
    WORDINGS,
    other_questions,
    other_subjects,
    terse_wordings,
    with_other_subject,
)

# Up to so many facts of a batch are each taught in all surroundings; of a larger one each is in one of them, in turn.
FEW = 8
# Of a batch so many contrast texts are made in all, at least one a fact.
MOST_CONTRASTS = 256


@dataclass(frozen=True)
class Scope:
    """In how many surroundings a fact is taught, and beside how many contrast texts.

    Contrast texts are answered by the unedited model. The hidden vectors that it has at their edited tokens shall not be moved
    by the edit (`editing/contrasts.py`).

    Args:
        contexts: texts around the prompt: a system prompt, sentences before and behind it, earlier turns. Raw text has four
            of them.
        wordings: the prompt in its content words alone, differently ordered, which stand for its rephrasings.
        subjects: contrast texts with another subject. questions: contrast texts that ask something else about the subject.
        answer_tokens: how much of the unedited model's answer to each is held.
        weight, weight_in_text: of the term that holds them in a chat, and in raw text: the mean of |Φ(h) - Φ₀(h)|² / |h|² over
            vectors and blocks, where Φ₀ is the adapter before the edit. It is not rescaled to the teacher forcing as the paper's
            regularisers are: it asks as much when the answer is learned as before. A chat needs more, because every question
            ends in the same tokens there.
        bound: an edit ends once the answer is learned and the weighted term is below this.
        names: what other subjects are chosen from; names of a user's own field are better neighbours than the package's.

    Raises:
        ValueError: a number is out of its range.
    """

    contexts: int = 6
    wordings: int = 2
    subjects: int = 20
    questions: int = 4
    answer_tokens: int = 8
    weight: float = 1e3
    weight_in_text: float = 300.0
    bound: float = 0.05
    names: tuple[str, ...] = SUBJECTS

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", tuple(self.names))
        largest = {
            "contexts": max(len(CHAT_CONTEXTS), len(RAW_CONTEXTS)),
            "wordings": len(WORDINGS),
            "subjects": len(self.names),
            "questions": len(CHAT_QUESTIONS),
        }
        for name, limit in largest.items():
            if not 0 <= getattr(self, name) <= limit:
                raise ValueError(f"Scope.{name} must be 0 to {limit}, not {getattr(self, name)!r}.")
        if self.answer_tokens < 1:
            raise ValueError(f"Scope.answer_tokens must be at least 1, not {self.answer_tokens!r}.")
        for name in ("weight", "weight_in_text", "bound"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"Scope.{name} must be above 0, not {getattr(self, name)!r}.")

    def described(self) -> dict[str, Any]:
        """Give the settings as they stand in a result line or a journal; the names as a hash."""
        names = hashlib.sha256("\n".join(self.names).encode()).hexdigest()[:16]
        return asdict(self) | {"names": names}

    @property
    def needs_subject(self) -> bool:
        """Whether the fact's subject must be known."""
        return bool(self.wordings or self.has_contrasts)

    @property
    def has_contrasts(self) -> bool:
        """Whether there are contrast texts."""
        return bool(self.subjects or self.questions)

    def training_prompts(self, edit: Edit, chat: bool, turn: int | None = None) -> list[Prompt]:
        """List the prompts in which a fact is taught; the first is its own.

        Args:
            turn: which one of the others a fact of a large batch is taught in; by default in all of them.
        """
        bare, *others = in_contexts(edit.prompt, chat, self.contexts)
        if edit.subject is not None:
            others += terse_wordings(edit.prompt, edit.subject)[: self.wordings]
        if turn is not None and others:
            others = [others[turn % len(others)]]
        return [bare, *others]

    def contrasts(self, edit: Edit, chat: bool) -> list[Sequence[Prompt]]:
        """List the prompts of a fact's contrast texts; none where its subject is not known.

        They stand bare, in the contexts and in the wordings, as the fact itself does.

        Returns:
            For each, the prompt as it shall stand, and bare for a model that cannot take it so.
        """
        if edit.subject is None:
            return []
        worded = [edit.prompt, *terse_wordings(edit.prompt, edit.subject)[: self.wordings]]
        others = other_subjects(edit.prompt, edit.subject, self.subjects, self.names)
        bare = [
            with_other_subject(worded[i % len(worded)], edit.subject, other)
            for i, other in enumerate(others)
        ]
        bare += other_questions(edit.prompt, edit.subject, chat, self.questions)
        contexts = contexts_for(chat, self.contexts)
        placed: list[Sequence[Prompt]] = []
        for i, prompt in enumerate(bare):
            # Every second one is bare, which costs less: a context is longer than a question.
            context = contexts[i // 2 % len(contexts)] if contexts and i % 2 else None
            placed.append((prompt,) if context is None else (context.around(prompt), prompt))
        # Both kinds are among the first, of which a large batch takes no more.
        order = sorted(range(len(placed)), key=lambda i: _share_before(i, len(others), len(placed)))
        return [placed[i] for i in order]


def _share_before(i: int, first_kind: int, total: int) -> float:
    """Say where in its kind a text stands, from 0 to 1."""
    begin, count = (0, first_kind) if i < first_kind else (first_kind, total - first_kind)
    return (i - begin) / count


# The fact as it is written, and nothing beside it, as in the paper.
NARROW = Scope(contexts=0, wordings=0, subjects=0, questions=0)
