"""Find the common relations that a question asks for, by comparing it with the package's wordings of them.

Two questions about one subject may share most words and ask for different things: "The place of birth of X is", "The gender of
X is". Others share no words and ask for the same. The wordings of a relation distinguish the two cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_baft.memory.english import ANY_ANSWER

LEAST_SCORE = 0.6  # below this, a question does not ask for a relation
TIE_MARGIN = 0.05  # relations this close to the highest score are asked for as well
SAME_WORD = (
    0.95  # the least similarity of two tokens that stand for the same word in different contexts
)


@dataclass(frozen=True)
class RelationScores:
    """How similar a question is to each relation.

    Attributes:
        per_token: (n, relations), the similarity of each of the question's tokens to the most similar one of the relation.
        per_question: (relations,), the similarity of the whole question, in both directions, to the relation's most similar
            wording; -1 if the relation has another kind of answer than the question asks for.
    """

    per_token: Tensor
    per_question: Tensor

    @property
    def is_asked(self) -> Tensor:
        """(relations,) bool, which relations the question asks for; none if it is similar to none."""
        return self.per_question >= max(LEAST_SCORE, float(self.per_question.max()) - TIE_MARGIN)


class Relations:
    """Common relations, each in several wordings.

    Args:
        keys: (tokens, k) of length 1, of the wordings' tokens, one wording after another. Only tokens that express the relation
            are included.
        wordings: (wordings, 3): how many tokens each has (at least one), the number of its relation, and the kind of answer it
            asks for, which may be `ANY_ANSWER`.
        names: the relations' names.
    """

    def __init__(self, keys: Tensor, wordings: Tensor, names: Sequence[str]) -> None:
        self.names, self._keys = names, keys
        self._lengths, self._relation_of_wording, answer_kinds = wordings.long().cpu().unbind(1)
        self._wording_of_token = torch.arange(len(wordings)).repeat_interleave(self._lengths)
        kinds: list[set[int]] = [set() for _ in names]
        pairs = zip(self._relation_of_wording.tolist(), answer_kinds.tolist(), strict=True)
        for relation, kind in pairs:
            kinds[relation] |= {kind} - {ANY_ANSWER}
        # A relation whose wordings ask for different kinds of answers has none.
        self._answer_kinds = torch.tensor([min(k) if len(k) == 1 else ANY_ANSWER for k in kinds])

    def score(self, keys: Tensor, answer_kind: int) -> RelationScores | None:
        """Compare a question with all wordings.

        Args:
            keys: (n, k), of the question's tokens that express what it asks for.
            answer_kind: the kind of answer it asks for, or `ANY_ANSWER`.

        Returns:
            None if there are no such tokens.
        """
        if not len(keys) or not len(self._keys):
            return None
        similarity = (keys.to(self._keys.device) @ self._keys.mT).cpu()
        per_wording = group_max(similarity, self._wording_of_token, len(self._lengths))
        question_to_wording = per_wording.mean(0)
        wording_to_question = torch.zeros(len(self._lengths), dtype=torch.float32).index_add_(
            0, self._wording_of_token, similarity.amax(0)
        )
        wording_scores = (question_to_wording + wording_to_question / self._lengths) / 2
        count = len(self.names)
        per_question = group_max(wording_scores[None], self._relation_of_wording, count)[0]
        if answer_kind != ANY_ANSWER:
            is_other = (self._answer_kinds != ANY_ANSWER) & (self._answer_kinds != answer_kind)
            per_question[is_other] = -1.0
        per_token = group_max(per_wording, self._relation_of_wording, count)
        return RelationScores(per_token, per_question)

    def contains(self, keys: Tensor) -> Tensor:
        """Return which tokens (n,) with keys (n, k) are words of a relation."""
        if not len(keys) or not len(self._keys):
            return torch.zeros(len(keys), dtype=torch.bool)
        return ((keys.to(self._keys.device) @ self._keys.mT).amax(1) > SAME_WORD).cpu()

    def answer_kind(self, scores: RelationScores | None) -> int:
        """Return the kind of answer that all relations have for which a question asks, else `ANY_ANSWER`."""
        kinds = set() if scores is None else set(self._answer_kinds[scores.is_asked].tolist())
        return kinds.pop() if len(kinds) == 1 else ANY_ANSWER

    def likeliest(self, scores: RelationScores) -> str | None:
        """Return the name of the relation that a question is most similar to; None if it is similar to none."""
        score, number = scores.per_question.max(0)
        return self.names[int(number)] if score >= LEAST_SCORE else None


def group_max(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Return the maximum of each group, (rows, count); -1 for empty groups.

    Args:
        values: (rows, n), none below -1.
        groups: (n,), the group of each column.
        count: of groups.
    """
    smallest = values.new_full((len(values), count), -1.0)
    return smallest.scatter_reduce(1, groups.expand(len(values), -1), values, "amax")
