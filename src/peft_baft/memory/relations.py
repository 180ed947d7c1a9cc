"""Tell which common relations a question asks for, by the wordings of them that the package brings.

Two questions about one subject may share most of their words and ask for different things: "The place of birth of X is", "The
gender of X is". Others share none and ask for the same. What tells them apart is that each is like the wordings of a relation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ANYTHING = 0  # the kind of answer that is wanted where words do not tell
OWN = 0.6  # how alike a question must be to a relation's wordings to ask for it
NEARLY = 0.05  # relations that a question is like by so much less than by most are its own as well
SAME = 0.95  # how alike two tokens are that stand for the same word in other words' company


@dataclass(frozen=True)
class AskedFor:
    """Which relations a question asks for.

    Attributes:
        of_tokens: (n, relations), how much each of some of its tokens is like a relation's most similar one.
        of_question: (relations,), how much they are altogether, in both directions, like the relation's most similar wording; -1
            for relations to which another kind of answer belongs than the question wants.
    """

    of_tokens: Tensor
    of_question: Tensor

    @property
    def own(self) -> Tensor:
        """(relations,) bool, which relations it asks for; none where it is like none."""
        return self.of_question >= max(OWN, float(self.of_question.max()) - NEARLY)


class Relations:
    """Common relations, each in several wordings.

    Args:
        keys: (tokens, k) of the wordings' tokens, of length 1, wording by wording; those alone that tell the relation.
        wordings: (wordings, 3), how many tokens each has, at least one, the number of its relation, and the kind of answer it
            wants, `ANYTHING` where it does not say.
        names: of the relations.
    """

    def __init__(self, keys: Tensor, wordings: Tensor, names: Sequence[str]) -> None:
        self.names, self._keys = names, keys
        self._lengths, self._of_wordings, kinds = wordings.long().cpu().unbind(1)
        wanted: list[set[int]] = [set() for _ in names]
        for relation, kind in zip(self._of_wordings.tolist(), kinds.tolist(), strict=True):
            wanted[relation] |= {kind} - {ANYTHING}
        # The kind that a relation's wordings want, if they agree.
        self._kinds = torch.tensor([min(of) if len(of) == 1 else ANYTHING for of in wanted])
        self._wording = torch.arange(len(wordings)).repeat_interleave(self._lengths)

    def asked_for(self, keys: Tensor, kind: int) -> AskedFor | None:
        """Compare a question with all wordings.

        Args:
            keys: (n, k) of its tokens that tell the relation. kind: of answer that it wants, or `ANYTHING`.

        Returns:
            None where there are no such tokens.
        """
        if not len(keys) or not len(self._keys):
            return None
        similar = (keys.to(self._keys.device) @ self._keys.mT).cpu()
        of_wordings = largest(similar, self._wording, len(self._lengths))
        to_wordings = of_wordings.mean(0)
        from_wordings = torch.zeros(len(self._lengths), dtype=torch.float32).index_add_(
            0, self._wording, similar.amax(0)
        )
        alike = (to_wordings + from_wordings / self._lengths) / 2
        relations = len(self.names)
        of_question = largest(alike[None], self._of_wordings, relations)[0]
        if kind != ANYTHING:
            of_question[(self._kinds != ANYTHING) & (self._kinds != kind)] = -1.0
        return AskedFor(largest(of_wordings, self._of_wordings, relations), of_question)

    def knows(self, keys: Tensor) -> Tensor:
        """Tell which tokens (n,) with keys (n, k) are words of a relation."""
        if not len(keys) or not len(self._keys):
            return torch.zeros(len(keys), dtype=torch.bool)
        return ((keys.to(self._keys.device) @ self._keys.mT).amax(1) > SAME).cpu()

    def kind(self, asked_for: AskedFor | None) -> int:
        """Give the kind of answer that all relations want for which a question asks, else `ANYTHING`."""
        kinds = set() if asked_for is None else set(self._kinds[asked_for.own].tolist())
        return kinds.pop() if len(kinds) == 1 else ANYTHING

    def likeliest(self, asked_for: AskedFor) -> str | None:
        """Give the name of the relation that a question is most like, None where it is like none."""
        alike, number = asked_for.of_question.max(0)
        return self.names[int(number)] if alike >= OWN else None


def largest(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """Take the largest value (rows, n) of each group, (rows, count), -1 of empty ones; groups: (n,)."""
    smallest = values.new_full((len(values), count), -1.0)
    return smallest.scatter_reduce(1, groups.expand(len(values), -1), values, "amax")
