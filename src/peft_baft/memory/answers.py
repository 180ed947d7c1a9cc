"""The hidden vectors that say a token: what the last block's output is set to where a taught answer goes on.

For a token y let

    u_y = C⁻¹ (g ⊙ w_y - m)        w_y the head's row, g the final norm's gain, m and C mean and covariance of all g ⊙ w

Logits are products with the rows of the head. u_y is the direction in which the product with y's own row is largest against
those with all others, if these were normally distributed: linear discriminant analysis with one class a token. It is a start. The
model's own tail says what the logits are, and a few steps against the strongest rivals follow where the margin is small.

The output is *set* to such a vector, and not moved towards it. What the model then says depends on no prompt, cache or batch, and
is known before: it was computed when the answer was taught.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_baft.memory.tail import AT_ONCE, Tail

SAMPLE = 8192  # tokens whose rows tell how rows are spread; at least four for each dimension
RIDGE = 1e-2  # of the mean variance, added to each
LENGTH = 3.0  # of a vector, in lengths of usual outputs; a norm takes it out again
LARGEST = 3e4  # number in a vector: float16 ends at 65,504
# Nats, and a factor (a repetition penalty divides logits), that no rival may be within.
MARGIN, FACTOR = 8.0, 1.35
STEPS, STEP = 60, 0.2  # against rivals, and the length of one
KEPT = 8192  # vectors that are kept to be used again


class Answers:
    """The vectors that say tokens, for one model; made when they are asked for, and not saved.

    tail: what the model computes after its last block.
    """

    def __init__(self, tail: Tail) -> None:
        self.tail = tail
        self._head = tail.head()
        self._gain = tail.gain() if self._head is not None else None
        size = tail.logits(tail.typical[None]).shape[-1]
        count = min(size, max(SAMPLE, 4 * len(tail.typical)))
        sample = torch.arange(count) * size // count
        rows = self._rows(sample.tolist())
        self._mean = rows.mean(0)
        covariance = (rows - self._mean).mT @ (rows - self._mean) / len(rows)
        ridge = RIDGE * covariance.diagonal().mean().clamp(min=1e-12)
        self._factor = torch.linalg.cholesky(
            covariance + ridge * torch.eye(len(covariance)).to(covariance)
        )
        self._known: dict[int, tuple[Tensor, float]] = {}

    def _rows(self, tokens: Sequence[int]) -> Tensor:
        """Return g ⊙ w of some tokens, (n, d) float32."""
        if self._head is None or self._gain is None:
            return self.tail.gradients(tokens)
        index = torch.tensor(list(tokens), device=self._head.device)
        return self._head[index].float() * self._gain.to(self._head.device)

    def vectors(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return vectors (n, d) float32 that say tokens, and the probability (n,) that each is said with.

        Raises:
            ValueError: a token cannot be made the likeliest.
        """
        new = [token for token in dict.fromkeys(tokens) if token not in self._known]
        with torch.inference_mode(False), torch.no_grad():
            for start in range(0, len(new), AT_ONCE):
                self._learn(new[start : start + AT_ONCE])
        vectors, likely = zip(*(self._known[token] for token in tokens), strict=True)
        while len(self._known) > max(KEPT, len(new)):
            self._known.pop(next(iter(self._known)))
        return torch.stack(vectors), torch.tensor(likely, dtype=torch.float32)

    def _learn(self, tokens: Sequence[int]) -> None:
        """Find vectors of some tokens, all at once."""
        rows = self._rows(tokens)
        directions = self._whitened(rows - self._mean)
        best = torch.full_like(directions[:, 0], -torch.inf)
        likely = torch.zeros_like(best)
        own_index = torch.tensor(list(tokens), device=rows.device)
        todo = torch.arange(len(tokens), device=rows.device)
        rivals: list[list[int]] = [[] for _ in tokens]
        chosen = [0] * len(tokens)  # after how many steps each was best
        for _ in range(STEPS):
            logits = self.tail.logits(self._scaled(directions[todo])).to(rows.device)
            own = logits.gather(1, own_index[todo][:, None])[:, 0]
            chance = (own - logits.logsumexp(1)).exp()
            rival, which = logits.scatter(1, own_index[todo][:, None], -torch.inf).max(1)
            margin = own - rival
            better = margin > best[todo]
            improved = todo[better]
            best[improved], likely[improved] = margin[better], chance[better]
            for place in improved.tolist():
                chosen[place] = len(rivals[place])
            short = own <= FACTOR * rival.clamp(min=0) + MARGIN
            if not short.any():
                break
            todo, against = todo[short], which[short].tolist()
            for place, other in zip(todo.tolist(), against, strict=True):
                rivals[place].append(other)
            away = self._whitened(rows[todo] - self._rows(against))
            directions[todo] = torch.nn.functional.normalize(directions[todo] + STEP * away, dim=1)
        beaten = [token for token, most in zip(tokens, best.tolist(), strict=True) if not most > 0]
        if beaten:
            raise Unsayable(beaten[0])
        for place, token in enumerate(tokens):
            vector = self._vector(token, rivals[place][: chosen[place]])
            self._known[token] = vector, float(likely[place])

    def _vector(self, token: int, rivals: Sequence[int]) -> Tensor:
        """Compute a token's vector after steps against rivals, by itself: other tokens change no bit of it."""
        row = self._rows([token])
        direction = self._whitened(row - self._mean)
        for rival in rivals:
            away = self._whitened(row - self._rows([rival]))
            direction = torch.nn.functional.normalize(direction + STEP * away, dim=1)
        return self._scaled(direction)[0]

    def _whitened(self, rows: Tensor) -> Tensor:
        solved = torch.cholesky_solve(rows.mT, self._factor).mT
        return torch.nn.functional.normalize(solved, dim=1)

    def _scaled(self, directions: Tensor) -> Tensor:
        vectors = directions * LENGTH * self.tail.typical.norm().to(directions.device)
        largest = vectors.abs().amax(1, keepdim=True).clamp(min=1e-30)
        return vectors * (LARGEST / largest).clamp(max=1)


class Unsayable(ValueError):
    """Say that a model cannot be made to say a token: whatever its last hidden vector is, another one is likelier."""

    def __init__(self, token: int, what: Any = None) -> None:
        self.token = token
        name = "" if what is None else f" ({what!r})"
        super().__init__(
            f"Token {token}{name} cannot be made the likeliest by any output of the last block that was tried; tokens that a "
            "model never saw in training are such. Write the answer in other words, or teach it to a plain adapter."
        )
