"""How sequences are packed into the rows of a batch, if callers state it by arguments other than position ids. Torch only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """What a call states about sequences packed into rows; None for what it does not state.

    Attributes:
        boundaries: (sequences + 1,) the columns where the sequences of a single row begin, and where the last one ends.
        numbers: (rows, tokens) the number of the sequence that each token belongs to.
        mask: (rows, heads or 1, tokens, tokens) attention mask: True, or at least 0, where a token attends to another. A
            sequence begins at a token that does not attend to the one before it.
    """

    boundaries: Tensor | None = None
    numbers: Tensor | None = None
    mask: Tensor | None = None

    def or_else(self, other: Packing) -> Packing:
        """Return a copy in which whatever is None here comes from `other`."""
        return Packing(
            other.boundaries if self.boundaries is None else self.boundaries,
            other.numbers if self.numbers is None else self.numbers,
            other.mask if self.mask is None else self.mask,
        )

    def positions(self, rows: int, tokens: int) -> Tensor | None:
        """Compute the index of each token in its own sequence, (rows, tokens) long; None if nothing states it."""
        begins = self._begins(rows, tokens)
        if begins is None:
            return None
        columns = torch.arange(tokens, device=begins.device).expand(rows, tokens)
        return columns - torch.where(begins, columns, 0).cummax(1).values

    def _begins(self, rows: int, tokens: int) -> Tensor | None:
        """Return the tokens at which a sequence begins, (rows, tokens) bool."""
        if self.boundaries is not None and rows == 1:
            columns = torch.arange(tokens, device=self.boundaries.device)
            return torch.isin(columns, self.boundaries)[None]
        if self.numbers is not None and self.numbers.shape == (rows, tokens):
            changes = self.numbers[:, 1:] != self.numbers[:, :-1]
        elif self.mask is not None and self.mask.shape[-2:] == (tokens, tokens):
            attends = self.mask[:, 0] if self.mask.dtype == torch.bool else self.mask[:, 0] >= 0
            changes = ~attends.diagonal(offset=-1, dim1=1, dim2=2).expand(rows, tokens - 1)
        else:
            return None
        first = torch.ones(rows, 1, dtype=torch.bool, device=changes.device)
        return torch.cat([first, changes], dim=1)
