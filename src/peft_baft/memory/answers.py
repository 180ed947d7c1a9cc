"""Hidden vectors that produce tokens: what the last block's output is set to while a stored answer is generated.

For a token y let

    u_y = C⁻¹ (g ⊙ w_y - m)        w_y: its row of the head, g: the final norm's gain, m and C: mean and covariance of all g ⊙ w

Logits are products with the rows of the head. u_y is the direction in which the product with y's row exceeds the products with
other rows the most, assuming these are normally distributed (linear discriminant analysis with one class per token). It is the
starting point. The model's own final modules compute the actual logits, and where the margin is small, a few steps against the
strongest rivals follow.

The output is *set* to such a vector, not moved towards it. The resulting logits therefore do not depend on the prompt, cache or
batch, and are known when the answer is stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peft_baft.memory.tail import AT_ONCE, Tail

SAMPLE = 8192  # tokens from which the covariance of rows is estimated; at least four per dimension
RIDGE = 1e-2  # times the mean variance is added to the diagonal of the covariance
LENGTH = 3.0  # of a vector, relative to typical outputs; the final norm removes it again
LARGEST = 3e4  # number in a vector; the largest float16 is 65,504
# A token's logit must exceed FACTOR times the rival's, since a repetition penalty divides logits, by MARGIN nats.
MARGIN, FACTOR = 8.0, 1.35
STEPS, STEP = 60, 0.2  # the most steps against rivals, and the length of one
CACHED = 8192  # vectors that are cached


class Answers:
    """The vectors that produce tokens with one model. They are computed on request and not saved.

    Args:
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
        self._cache: dict[int, tuple[Tensor, float]] = {}

    def _rows(self, tokens: Sequence[int]) -> Tensor:
        """Return g ⊙ w of tokens, (n, d) float32."""
        if self._head is None or self._gain is None:
            return self.tail.gradients(tokens)
        index = torch.tensor(list(tokens), device=self._head.device)
        return self._head[index].float() * self._gain.to(self._head.device)

    def vectors(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return vectors (n, d) float32 that produce tokens, and the probability (n,) that each gives to its token.

        Raises:
            UnreachableTokenError: a token cannot be made the most probable one.
        """
        new = [token for token in dict.fromkeys(tokens) if token not in self._cache]
        with torch.inference_mode(False), torch.no_grad():
            for start in range(0, len(new), AT_ONCE):
                self._optimise(new[start : start + AT_ONCE])
        vectors, probabilities = zip(*(self._cache[token] for token in tokens), strict=True)
        while len(self._cache) > max(CACHED, len(new)):
            self._cache.pop(next(iter(self._cache)))
        return torch.stack(vectors), torch.tensor(probabilities, dtype=torch.float32)

    def _optimise(self, tokens: Sequence[int]) -> None:
        """Compute and cache the vectors of tokens, all at once."""
        rows = self._rows(tokens)
        directions = self._whitened(rows - self._mean)
        best_margin = torch.full_like(directions[:, 0], -torch.inf)
        probability = torch.zeros_like(best_margin)
        ids = torch.tensor(list(tokens), device=rows.device)
        todo = torch.arange(len(tokens), device=rows.device)
        rivals: list[list[int]] = [[] for _ in tokens]
        best_step = [0] * len(tokens)
        for _ in range(STEPS):
            logits = self.tail.logits(self._scaled(directions[todo])).to(rows.device)
            logit = logits.gather(1, ids[todo][:, None])[:, 0]
            rival_logit, rival = logits.scatter(1, ids[todo][:, None], -torch.inf).max(1)
            margin = logit - rival_logit
            is_better = margin > best_margin[todo]
            improved = todo[is_better]
            best_margin[improved] = margin[is_better]
            probability[improved] = (logit - logits.logsumexp(1)).exp()[is_better]
            for place in improved.tolist():
                best_step[place] = len(rivals[place])
            is_close = logit <= FACTOR * rival_logit.clamp(min=0) + MARGIN
            if not is_close.any():
                break
            todo, against = todo[is_close], rival[is_close].tolist()
            for place, other in zip(todo.tolist(), against, strict=True):
                rivals[place].append(other)
            away = self._whitened(rows[todo] - self._rows(against))
            directions[todo] = torch.nn.functional.normalize(directions[todo] + STEP * away, dim=1)
        for token, margin in zip(tokens, best_margin.tolist(), strict=True):
            if not margin > 0:
                raise UnreachableTokenError(token)
        for place, token in enumerate(tokens):
            vector = self._vector(token, rivals[place][: best_step[place]])
            self._cache[token] = vector, float(probability[place])

    def _vector(self, token: int, rivals: Sequence[int]) -> Tensor:
        """Compute a token's vector after steps against rivals. Each is computed by itself: other tokens do not affect it."""
        row = self._rows([token])
        direction = self._whitened(row - self._mean)
        for rival in rivals:
            away = self._whitened(row - self._rows([rival]))
            direction = torch.nn.functional.normalize(direction + STEP * away, dim=1)
        return self._scaled(direction)[0]

    def _whitened(self, rows: Tensor) -> Tensor:
        solved: Tensor = torch.cholesky_solve(rows.mT, self._factor).mT
        return torch.nn.functional.normalize(solved, dim=1)

    def _scaled(self, directions: Tensor) -> Tensor:
        vectors = directions * LENGTH * self.tail.typical.norm().to(directions.device)
        largest = vectors.abs().amax(1, keepdim=True).clamp(min=1e-30)
        scaled: Tensor = vectors * (LARGEST / largest).clamp(max=1)
        return scaled


class UnreachableTokenError(ValueError):
    """Raised if no output of the last block makes a token the most probable one: another token is always more probable.

    Args:
        text: the token's text, for the message.
    """

    def __init__(self, token: int, text: str | None = None) -> None:
        self.token = token
        name = "" if text is None else f" ({text!r})"
        super().__init__(
            f"No output of the last block was found that makes token {token}{name} the most probable one. This happens with "
            "tokens that the model never saw in training. Write the answer in other words, or use a plain adapter."
        )
