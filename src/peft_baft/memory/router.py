"""Find the edit that a prompt asks for, or none.

Prompts are compared by their words (tf-idf) and by late interaction of their tokens' states: each token of one looks for the
most similar token of the other. The likeliest edit is found by both. It answers if the prompt is about the same subject, which
rare tokens tell, and asks the same of it, which common tokens tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_baft.data.word_index import WordIndex
from peft_baft.memory.statistics import KeyStatistics

INT8 = 127.0
COMMON = (
    0.7  # a token counts to the relation if its rarity is below this part of the largest there is
)
NONE = -1


@dataclass(frozen=True)
class Key:
    """A prompt as the router knows it. text; ids: (n,); states: (n, k) of length 1, in int8."""

    text: str
    ids: Tensor
    states: Tensor


@dataclass(frozen=True)
class Match:
    """What the router found. edit: its number, or -1; best, runner_up: numbers of the likeliest two, -1 where there is none.

    subject, relation: how much the prompt is about the same as the best edit's, and asks the same, both at most 1.
    """

    edit: int
    best: int = NONE
    runner_up: int = NONE
    subject: float = 0.0
    relation: float = 0.0


class Router:
    """Routes prompts to edits.

    Args:
        least_subject, strictness: what `Match.subject` and `Match.relation` must be above for the best edit to answer.
    """

    def __init__(self, statistics: KeyStatistics, least_subject: float, strictness: float) -> None:
        self.statistics = statistics
        self.least_subject, self.strictness = least_subject, strictness
        self.keys: list[Key] = []
        self._ready: _SideBySide | None = None

    def key(self, text: str, ids: Tensor, states: Tensor) -> Key:
        """Make the key of a prompt. ids: (n,); states: (n, d) of the key block. The first token is left out."""
        keys = self.statistics.keys(states[1:])
        return Key(text, ids[1:].clone(), (keys * INT8).round().to(torch.int8))

    def replace(self, keys: Sequence[Key]) -> None:
        """Take these keys, and forget the former ones."""
        self.keys, self._ready = list(keys), None

    def match(self, query: Key) -> Match:
        """Find the edit that a prompt asks for."""
        if not self.keys or not len(query.ids):
            return Match(NONE)
        if self._ready is None:
            self._ready = _SideBySide(self.keys, self.statistics)
        best, runner_up, subject, relation = self._ready.compare(query)
        found = subject > self.least_subject and relation > self.strictness
        return Match(best if found else NONE, best, runner_up, subject, relation)


class _SideBySide:
    """The keys of all edits in one tensor, and how rare their tokens are."""

    def __init__(self, keys: Sequence[Key], statistics: KeyStatistics) -> None:
        self._words = WordIndex(key.text for key in keys)
        width, device = max(len(key.ids) for key in keys), keys[0].states.device
        count, documents = statistics.count + len(keys), statistics.documents.clone()
        for key in keys:
            documents[key.ids.unique()] += 1
        self._rarity = 1 + torch.log((1 + count) / (1 + documents))
        self._common = COMMON * (1 + math.log(1 + count))
        self._states = torch.zeros(len(keys), width, keys[0].states.shape[1], device=device)
        self._rarities = torch.zeros(len(keys), width, device=device)  # 0 where a prompt has ended
        for number, key in enumerate(keys):
            self._states[number, : len(key.ids)] = key.states.float() / INT8
            self._rarities[number, : len(key.ids)] = self._rarity[key.ids]

    def compare(self, query: Key) -> tuple[int, int, float, float]:
        """Find the two likeliest edits, and how like the best one's prompt is in its subject and in its relation."""
        states, rarity = query.states.float() / INT8, self._rarity[query.ids]
        similar = torch.einsum("tld,qd->tlq", self._states, states)
        stored = similar.amax(
            2
        )  # (edits, longest): of each stored token, its most similar one of the query
        real = self._rarities > 0
        asked = similar.masked_fill(~real[..., None], -1.0).amax(1)  # (edits, n): and the reverse
        words = torch.tensor(self._words.cosines(query.text), device=states.device)
        ranking = words + (_mean(stored, self._rarities) + _mean(asked, rarity)) / 2
        top = ranking.topk(min(2, len(ranking))).indices.tolist()
        best, runner_up = top[0], top[1] if len(top) > 1 else NONE
        rarities, rare = self._rarities[best], rarity >= self._common
        of_subject = (
            _mean(stored[best], (rarities >= self._common).float(), 1.0)
            + _mean(asked[best], rare.float(), 1.0)
        ) / 2
        is_common = real[best] & (rarities < self._common)
        relation = _mean(stored[best], is_common.float(), 1.0)
        return best, runner_up, of_subject.item(), relation.item()


def _mean(values: Tensor, weights: Tensor, otherwise: float = 0.0) -> Tensor:
    """Average over the last dimension; `otherwise` where no weight is above 0: a prompt without such tokens tells nothing."""
    total = (values * weights).sum(-1)
    divisor = weights.expand_as(values).sum(-1)
    return torch.where(divisor > 0, total / divisor.clamp(min=1e-6), otherwise)
