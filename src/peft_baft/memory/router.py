"""Find the edit that a prompt asks for, or none.

Prompts are compared by their words (tf-idf) and by late interaction of their tokens' states: each token of one looks for the
most similar token of the other, and the similarities are averaged with the tokens' rarity as weights, with equal weights, or over
common tokens alone, which carry the relation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peft_baft.baselines.in_context import Index
from peft_baft.memory.statistics import KeyStatistics

INT8 = 127.0
COMMON = (
    0.7  # a token counts to the relation if its rarity is below this part of the largest there is
)
QUANTILE = 0.95  # of what edits score with each other, above which a prompt asks for an edit
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

    identity, relation: how much the prompt is like the best edit's, as a question about it, and as the same question.
    """

    edit: int
    best: int
    runner_up: int
    identity: float
    relation: float


class Router:
    """Routes prompts to edits.

    Args:
        least_identity, least_relation: what a match must reach besides what edits score with each other.
    """

    def __init__(
        self, statistics: KeyStatistics, least_identity: float, least_relation: float
    ) -> None:
        self.statistics = statistics
        self.least_identity, self.least_relation = least_identity, least_relation
        self.keys: list[Key] = []
        self._prepared: _Prepared | None = None

    def key(self, text: str, ids: Tensor, states: Tensor) -> Key:
        """Make the key of a prompt. ids: (n,); states: (n, d) of the key block. The first token is left out."""
        keys = self.statistics.keys(states[1:])
        return Key(text, ids[1:].clone(), (keys * INT8).round().to(torch.int8))

    def replace(self, keys: Sequence[Key]) -> None:
        """Take these keys, and forget what was known of the former ones."""
        self.keys, self._prepared = list(keys), None

    @property
    def _ready(self) -> _Prepared:
        if self._prepared is None:
            self._prepared = _Prepared(self.keys, self.statistics, self.least_relation)
        return self._prepared

    def identity_threshold(self) -> float:
        """What a match must reach: what edits score with each other does not match, nor what is below a constant."""
        return max(self.least_identity, self._ready.among_themselves)

    def match(self, query: Key) -> Match:
        """Find the edit that a prompt asks for."""
        if not self.keys:
            return Match(NONE, NONE, NONE, 0.0, 0.0)
        best, runner_up, identity, relation = self._ready.scores(query)
        found = identity > self.identity_threshold() and relation > self.least_relation
        return Match(best if found else NONE, best, runner_up, identity, relation)


class _Prepared:
    """The keys of all edits side by side, their weights, and what they score with each other."""

    def __init__(
        self, keys: Sequence[Key], statistics: KeyStatistics, same_question: float
    ) -> None:
        self.index = Index({key.text: "" for key in keys})
        self.texts = [key.text for key in keys]
        places = {text: place for place, text in enumerate(self.index.facts)}
        self._places = [places[text] for text in self.texts]
        width, device = max(len(key.ids) for key in keys), keys[0].states.device
        count = statistics.count + len(keys)
        documents = statistics.documents.clone()
        for key in keys:
            documents[key.ids.unique()] += 1
        self._rarity = 1 + torch.log((1 + count) / (1 + documents))
        self._common = COMMON * (1 + math.log(1 + count))
        self._states = torch.zeros(len(keys), width, keys[0].states.shape[1], device=device)
        self._flat = torch.zeros(len(keys), width, device=device)
        self._rare, self._relation = self._flat.clone(), self._flat.clone()
        for number, key in enumerate(keys):
            n = len(key.ids)
            rarity = self._rarity[key.ids]
            self._states[number, :n] = key.states.float() / INT8
            self._flat[number, :n] = 1.0
            self._rare[number, :n] = rarity
            self._relation[number, :n] = (rarity < self._common).float()
        compared = [self._compared(*self._stored(number)) for number in range(len(keys))]
        alike = torch.stack([relation > same_question for _, _, relation in compared])
        # (edits, edits): which ask the same question, and so are no rivals of each other; each is its own.
        self._siblings = alike | alike.mT | torch.eye(len(keys), dtype=torch.bool, device=device)
        # What each edit's prompt scores with the nearest other question; nothing where there is no other.
        with_others = []
        for number, (ranking, identity, _) in enumerate(compared):
            rivals = ranking.masked_fill(self._siblings[number], -math.inf)
            best = int(rivals.argmax())
            if rivals[best] > -math.inf:
                with_others.append(identity[best] + self._margin(rivals, best) / 2)
        self.among_themselves = (
            float(torch.stack(with_others).quantile(QUANTILE)) if with_others else -math.inf
        )

    def _stored(self, number: int) -> tuple[str, Tensor, Tensor]:
        n = int(self._flat[number].sum())
        return self.texts[number], self._states[number, :n], self._rare[number, :n]

    def _margin(self, ranking: Tensor, best: int) -> Tensor:
        """How far the best edit is ahead of the next one that asks another question."""
        others = ranking.masked_fill(self._siblings[best], -math.inf)
        return ranking[best] - others.max().clamp(min=0.0)

    def scores(self, query: Key) -> tuple[int, int, float, float]:
        """Find the two likeliest edits, and how like the best is by the two measures."""
        states = query.states.float() / INT8
        ranking, identity, relation = self._compared(query.text, states, self._rarity[query.ids])
        top = ranking.topk(min(2, len(ranking))).indices.tolist()
        best, runner_up = top[0], top[1] if len(top) > 1 else NONE
        margin = self._margin(ranking, best)
        return best, runner_up, (identity[best] + margin / 2).item(), relation[best].item()

    def _compared(self, text: str, states: Tensor, rarity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compare a prompt with every edit's, (edits,) each: to rank them; as a question about it; as the same question."""
        similar = torch.einsum("tld,qd->tlq", self._states, states)
        stored = similar.amax(2)  # of each stored token, its most similar one of the query
        asked = similar.masked_fill(self._flat[..., None] == 0, -1.0).amax(1)  # and the reverse
        a_rare, a_flat, a_common = (
            (stored * weights).sum(1) / weights.sum(1).clamp(min=1e-6)
            for weights in (self._rare, self._flat, self._relation)
        )
        b_rare, b_flat = (asked * rarity).sum(1) / rarity.sum(), asked.mean(1)
        words = torch.tensor(self.index.cosines(text), device=states.device)[self._places]
        # A prompt without a common token has no relation to compare.
        a_common = torch.where(self._relation.any(1), a_common, a_flat)
        ranking = words + (a_rare + b_rare) / 2
        identity = (a_rare + b_rare + a_flat + b_flat) / 4
        return ranking, identity, (a_rare + b_rare + a_flat + a_common) / 4
