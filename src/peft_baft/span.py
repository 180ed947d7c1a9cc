"""Compute which tokens an adapter edits. All position arithmetic is in this file. Torch only.

Every token gets one integer, its position relative to the end of the prompt: its index in its own sequence minus the length
of that sequence's prompt. -1 is the last prompt token, 0 the first answer token; padding gets `OUTSIDE`. An adapter that edits
the last P prompt tokens and every answer token edits the tokens whose relative position is at least -P.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

OUTSIDE = -(2**62)  # the relative position of padding: below every -P
IGNORED_LABEL = -100


def edited(
    relative_positions: Tensor, prompt_positions: int, answer_positions: int | None = None
) -> Tensor:
    """Return the mask (batch, tokens) of the tokens that an adapter edits.

    These are the last `prompt_positions` prompt tokens and the first `answer_positions` answer tokens (None: all of them).
    """
    mask = relative_positions >= -prompt_positions
    return mask if answer_positions is None else mask & (relative_positions < answer_positions)


def integer_lengths(lengths: Sequence[int] | Tensor) -> Tensor:
    """Convert prompt lengths given by a caller to a tensor, (sequences,) long.

    Raises:
        TypeError: they are not integers. ValueError: one is negative.
    """
    stated = torch.as_tensor(lengths).reshape(-1)
    if stated.is_floating_point() or stated.is_complex() or stated.dtype == torch.bool:
        raise TypeError(f"prompt_lengths must be integers, one per sequence, not {lengths!r:.80}.")
    # The values of a tensor are not checked: reading them from a GPU would synchronise with it.
    if not isinstance(lengths, Tensor) and (stated < 0).any():
        raise ValueError(f"prompt_lengths must be 0 or more, not {lengths!r:.80}.")
    return stated.long()


def relative_positions_of_input(
    real: Tensor,
    past: int | Tensor = 0,
    *,
    positions: Tensor | None = None,
    labels: Tensor | None = None,
    prompt_lengths: Tensor | None = None,
) -> Tensor:
    """Return the position of each token relative to the end of its prompt, for one forward outside `generate`.

    The prompt length of a sequence is the first of these that is known: `prompt_lengths`; the number of tokens before its first
    label; 0 if the cache is not empty (it holds the prompt, so every new token is an answer token); the length of the input.

    Args:
        real: (batch, tokens) bool, False for padding.
        past: the number of real tokens in the cache: one integer, or (batch, 1).
        positions: (batch, tokens) position ids. Where they decrease, the next sequence of a packed row begins. If the first one
            is above 0, the row is a slice of a longer sequence, and `prompt_lengths` refer to the whole sequence.
        labels: (batch, tokens), -100 before the answer.
        prompt_lengths: the number of prompt tokens of each sequence, without padding: (batch,), or (sequences,) for one packed
            row. Its length may also be a divisor of the batch, as before beam expansion.

    Returns:
        (batch, tokens) long.

    Raises:
        ValueError: `prompt_lengths` has none of these lengths.
    """
    index = real.cumsum(1) - 1
    sequence, first = _sequences(index, real, positions)
    index = index - first + past
    if positions is not None:
        index = index + torch.where(sequence == 0, tokens_before_slice(real, positions), 0)
    if prompt_lengths is not None:
        prompt = _stated_prompt(prompt_lengths.to(index.device), sequence)
    else:
        prompt = _lengths(real, sequence) * (past == 0)
        if labels is not None:
            prompt = _before_first_label(index, real & (labels != IGNORED_LABEL), sequence, prompt)
    return torch.where(real, index - prompt, OUTSIDE)


def tokens_before_slice(real: Tensor, positions: Tensor) -> Tensor:
    """Return how many tokens of its sequence precede each row, (batch, 1): above 0 for a slice of a longer sequence.

    A row that starts its sequence has position 0 at its first real token, or that token's column if positions count padding.
    """
    columns = torch.arange(real.shape[1], device=real.device).expand_as(real)
    first = real & (real.cumsum(1) == 1)
    before = torch.where(first, positions - columns, 0).sum(1, keepdim=True)
    return before.clamp(min=0)


def _sequences(index: Tensor, real: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return each token's sequence number in its row and the index of that sequence's first token, both (batch, tokens)."""
    if positions is None:
        return torch.zeros_like(index), torch.zeros_like(index)
    # Within a sequence, position ids and indices rise together. A new sequence restarts its ids, so the difference falls.
    shift = torch.where(real, positions - index, torch.iinfo(index.dtype).max).cummin(1).values
    begins = torch.zeros_like(real)
    begins[:, 1:] = shift[:, 1:] < shift[:, :-1]
    # The first real token of a row belongs to sequence 0, however much padding precedes it.
    begins &= index > 0
    return begins.cumsum(1), torch.where(begins, index, 0).cummax(1).values


def _lengths(real: Tensor, sequence: Tensor) -> Tensor:
    """Return the number of real tokens in each token's sequence, (batch, tokens)."""
    return torch.zeros_like(sequence).scatter_add(1, sequence, real.long()).gather(1, sequence)


def _before_first_label(
    index: Tensor, labelled: Tensor, sequence: Tensor, otherwise: Tensor
) -> Tensor:
    """Return the index of the first labelled token in each token's sequence, or `otherwise` without one: (batch, tokens)."""
    none = torch.iinfo(index.dtype).max
    first = torch.full_like(sequence, none).scatter_reduce(
        1, sequence, torch.where(labelled, index, none), "amin"
    )
    first = first.gather(1, sequence)
    return torch.where(first == none, otherwise, first)


def _stated_prompt(lengths: Tensor, sequence: Tensor) -> Tensor:
    """Return the caller's prompt length for each token's sequence, (batch, tokens) or (batch, 1)."""
    rows, count = sequence.shape[0], lengths.shape[0]
    if rows == 1 and count > 1 and count == int(sequence.max()) + 1:  # one packed row
        return lengths[sequence]
    if count == 0 or rows % count:
        raise ValueError(
            f"prompt_lengths needs one integer per sequence, but {rows} rows came with {count} of them."
        )
    beams = rows // count
    return lengths.repeat_interleave(beams)[:, None]


@dataclass(frozen=True)
class GenerationSpan:
    """The columns of the prompt in one `generate` call; they do not depend on the cache, on chunked prefill or on beams.

    Attributes:
        start: (batch,) column of the first real token.
        end: (batch,) column after the last prompt token.
        width: () number of columns of the prompt, with padding. Later columns were generated.
        gap: (batch,) number of padding columns at the right end of the prompt.
    """

    start: Tensor
    end: Tensor
    width: Tensor
    gap: Tensor

    @classmethod
    def from_prompt(
        cls, real: Tensor, cached: int = 0, prompt_lengths: Tensor | None = None
    ) -> GenerationSpan:
        """Find the span of a prompt that is passed to `generate`.

        Args:
            real: (batch, width) bool, False for padding.
            cached: number of columns already in the cache. They hold an earlier turn, and all columns after them count as
                answer tokens, as in one forward over all turns with the first turn's prompt length.
            prompt_lengths: (batch,) prompt lengths if the caller states them.

        Raises:
            ValueError: `prompt_lengths` does not have one entry per row.
        """
        if prompt_lengths is not None and len(prompt_lengths) != len(real):
            raise ValueError(
                f"prompt_lengths needs one integer per sequence, but generate() got {len(real)} rows and {len(prompt_lengths)} "
                "of them."
            )
        width = torch.tensor(real.shape[1], device=real.device)
        columns = torch.arange(real.shape[1], device=real.device)
        start = torch.where(real, columns, width).amin(1)
        stop = torch.where(real, columns, -1).amax(1) + 1
        end = stop if prompt_lengths is None else start + prompt_lengths.to(real.device)
        if cached and prompt_lengths is None:
            end = end.clamp(max=cached)
        return cls(start, end, width, width - stop)

    def relative_positions(self, past: int | Tensor, rows: int, tokens: int) -> Tensor:
        """Return the relative positions of the `tokens` columns after `past`, (rows, tokens).

        Args:
            rows: the number of rows that the model is called on: the batch size, or a multiple of it with beams.

        Raises:
            ValueError: `rows` is not a multiple of the batch size that was passed to `generate`.
        """
        if rows % len(self.start):
            raise ValueError(
                f"generate was given {len(self.start)} prompts, but the model was called on {rows} rows."
            )
        beams = rows // len(self.start)
        start, end, gap = (
            x.repeat_interleave(beams)[:, None] for x in (self.start, self.end, self.gap)
        )
        columns = past + torch.arange(tokens, device=start.device)[None]
        generated = columns >= self.width
        padding = (columns < start) | (~generated & (columns >= self.width - gap))
        # Generated tokens come after the prompt's right padding, which does not count as tokens of the sequence.
        padding_before = torch.where(generated, gap, 0)
        return torch.where(padding, OUTSIDE, columns - end - padding_before)
