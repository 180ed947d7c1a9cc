"""The scope of an edit: the prompts that it should affect and those that it should not, both generated from the fact.

A fact is in scope in any context and in any wording. Similar prompts are out of scope: the same question about another subject,
or another question about the same subject. The term is used in the literature, for example by SERAC.
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

# In batches of up to this size each fact is trained in all contexts and wordings; in larger ones each in one of them, in turn.
FEW = 8
# The maximum number of contrast texts of a batch, but at least one per fact.
MOST_CONTRASTS = 256


@dataclass(frozen=True)
class Scope:
    """The numbers of contexts, wordings and contrast texts with which a fact is trained.

    Contrast texts are answered by the unedited model. The edit should not move the hidden vectors of the unedited model at
    their edited tokens (`editing/contrasts.py`).

    Args:
        contexts: number of texts around the prompt: a system prompt, sentences before and after it, earlier turns. There are
            four for raw text.
        wordings: number of rephrasings, each with only the prompt's content words in another order.
        subjects: number of contrast texts with another subject. questions: number of contrast texts with another question
            about the subject.
        answer_tokens: number of tokens of the unedited model's answer to each contrast text.
        weight, weight_in_text: weight of the contrast term in a chat and in raw text. The term is the mean of
            |Φ(h) - Φ₀(h)|² / |h|² over vectors and blocks, where Φ₀ is the adapter before the edit. Unlike the paper's
            regularisers it is not rescaled to the teacher-forcing loss, so it is as strong at the end of an edit as at the
            start. A chat needs a larger weight because all its questions end in the same tokens.
        bound: an edit stops once the answer is learned and the weighted contrast term is at most this.
        names: other subjects for contrast texts. Names from the user's domain are better neighbours than the defaults.

    Raises:
        ValueError: a number is out of range.
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
        """Return the settings as written to a result line or a journal, with the names as a hash."""
        names = hashlib.sha256("\n".join(self.names).encode()).hexdigest()[:16]
        return asdict(self) | {"names": names}

    @property
    def needs_subject(self) -> bool:
        """Whether the subject of the fact must be known."""
        return bool(self.wordings or self.has_contrasts)

    @property
    def has_contrasts(self) -> bool:
        """Whether there are contrast texts."""
        return bool(self.subjects or self.questions)

    def training_prompts(self, edit: Edit, chat: bool, turn: int | None = None) -> list[Prompt]:
        """List the prompts with which a fact is trained; the first is its bare prompt.

        Args:
            turn: selects one of the other prompts, for a fact of a large batch; by default all of them are listed.
        """
        bare, *others = in_contexts(edit.prompt, chat, self.contexts)
        if edit.subject is not None:
            others += terse_wordings(edit.prompt, edit.subject)[: self.wordings]
        if turn is not None and others:
            others = [others[turn % len(others)]]
        return [bare, *others]

    def contrasts(self, edit: Edit, chat: bool) -> list[Sequence[Prompt]]:
        """List the prompts of a fact's contrast texts; empty if its subject is not known.

        Like the fact itself, they are bare, in contexts and in other wordings.

        Returns:
            For each contrast text, its prompt; a prompt in a context is followed by the bare one, for templates that reject it.
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
            # Every second one is bare, which is cheaper since a context is longer than a question.
            context = contexts[i // 2 % len(contexts)] if contexts and i % 2 else None
            placed.append((prompt,) if context is None else (context.around(prompt), prompt))
        # The two kinds are interleaved, since a large batch uses only the first few.
        order = sorted(range(len(placed)), key=lambda i: _share_before(i, len(others), len(placed)))
        return [placed[i] for i in order]


def _share_before(i: int, first_kind: int, total: int) -> float:
    """Return the position of a text within its kind, from 0 to 1."""
    begin, count = (0, first_kind) if i < first_kind else (first_kind, total - first_kind)
    return (i - begin) / count


# Only the fact as it is written, as in the paper.
NARROW = Scope(contexts=0, wordings=0, subjects=0, questions=0)
