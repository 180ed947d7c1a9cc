"""The texts of a forward: for each sequence, all tokens of its prompt and of the reply so far.

A forward receives only the tokens that are new to the model. Earlier ones are in the running `generate`, in a request of a
continuous batch, or in a note that an earlier forward left on the cache that it returned. Kinds of adapters whose change depends
on the words of a text use this (`EditContext.read_texts`); plain BaFT needs positions only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_baft.adapter.model_call import Request, cached_columns, row_marks
from peft_baft.span import OUTSIDE

if TYPE_CHECKING:
    from peft_baft.adapter.generation import Generation

NOTE = "_baft_texts"  # an attribute of a cache: the text of each row so far
NO_TOKENS = (
    "An adapter on this model reads the tokens of prompts: call the model with input_ids (rows, tokens), not with embeddings "
    "only."
)
UNKNOWN_PROMPT = (
    "An adapter on this model reads the tokens of prompts, and this forward continues from a cache whose texts are not known for "
    "these rows. Pass the cache of the forward that read the prompt, use generate(), or pass the whole text."
)
UNKNOWN_REPLY = (
    "An adapter on this model reads the tokens of prompts and replies, and the earlier tokens of this step of generate() are not "
    "known: prepare_inputs_for_generation was replaced, or returned tokens that the step does not have. Generate without a cache."
)


@dataclass(frozen=True)
class Text:
    """One sequence of a forward.

    Attributes:
        row: its row. columns: the columns of its tokens in this forward, in order.
        prompt: ids of the prompt. reply: ids of the reply, up to and including those of this forward.
        first: relative position of the token in the first of these columns; -1 is the last prompt token.
        notes: whatever readers want to remember as long as the sequence continues, each under its own key.
    """

    row: int
    columns: Sequence[int]
    prompt: tuple[int, ...]
    reply: tuple[int, ...]
    first: int
    notes: dict[Any, Any] = field(default_factory=dict)

    def column(self, position: int) -> int | None:
        """Return the column of the token at a relative position; None if it is not in this forward."""
        number = position - self.first
        return self.columns[number] if 0 <= number < len(self.columns) else None


@dataclass(frozen=True, eq=False)
class Texts:
    """The texts of one forward, or the reason why they are unknown."""

    known: tuple[Text, ...] = ()
    problem: str = ""

    def __iter__(self) -> Iterator[Text]:
        """Iterate over the texts.

        Raises:
            ValueError: they are unknown.
        """
        if self.problem:
            raise ValueError(self.problem)
        return iter(self.known)

    def leave_notes(self, caches: Sequence[Any], rows: int) -> None:
        """Store each row's text on the caches that a forward returns, for forwards that continue from them."""
        if self.problem or len(self.known) != rows:  # packed rows cannot be continued from a cache
            return
        for cache in caches:
            setattr(cache, NOTE, (cached_columns(cache), row_marks(cache), self.known))


def texts_of_input(ids: Tensor | None, relative: Tensor) -> Texts:
    """Read the texts of a forward that has all of their tokens.

    Args:
        ids: (rows, tokens); None if the model received embeddings only. relative: (rows, tokens) relative positions, which
            start again at each sequence of a row.
    """
    if ids is None:
        return Texts(problem=NO_TOKENS)
    found = []
    for row, (tokens, positions) in enumerate(zip(ids.tolist(), relative.tolist(), strict=True)):
        for start, stop in _sequences(positions):
            end = next((c for c in range(start, stop) if positions[c] >= 0), stop)
            prompt, reply = tuple(tokens[start:end]), tuple(tokens[end:stop])
            found.append(Text(row, range(start, stop), prompt, reply, positions[start]))
    return Texts(tuple(found))


def _sequences(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and the last + 1 column of each sequence in a row of relative positions."""
    start = None
    for column, position in enumerate([*positions, OUTSIDE]):
        if start is not None and position != positions[column - 1] + 1:
            yield start, column
            start = None
        if start is None and position != OUTSIDE:
            start = column


def texts_after_cache(
    ids: Tensor | None, relative: Tensor, cache: Any, *, ends_known: bool
) -> Texts:
    """Read the texts of a forward outside `generate` that continues from a cache.

    Args:
        ids: (rows, new tokens). relative: their relative positions.
        ends_known: whether this call stated where prompts end; otherwise they end where they did when they were read.
    """
    if ids is None:
        return Texts(problem=NO_TOKENS)
    columns_noted, marks, notes = getattr(cache, NOTE, (None, None, ()))
    # A cache that was cropped, reordered, or used by another model in between has other contents.
    is_same = columns_noted == cached_columns(cache) and equal(marks, row_marks(cache))
    if len(notes) != len(ids) or not is_same:
        return Texts(problem=UNKNOWN_PROMPT)
    found = []
    for row, note in enumerate(notes):
        columns = [c for c, position in enumerate(relative[row].tolist()) if position != OUTSIDE]
        if not columns:
            continue
        before = (*note.prompt, *note.reply)
        whole = (*before, *ids[row, columns].tolist())
        first = int(relative[row, columns[0]]) if ends_known else len(before) - len(note.prompt)
        length = len(before) - first  # of the prompt
        if length < 0:
            return Texts(problem=UNKNOWN_PROMPT)
        notes_of_row = note.notes if length == len(note.prompt) else {}
        found.append(Text(row, columns, whole[:length], whole[length:], first, notes_of_row))
    return Texts(tuple(found))


def texts_of_step(generation: Generation, tokens: Tensor, past: int, relative: Tensor) -> Texts:
    """Read the texts of a step of `generate`.

    Args:
        tokens: (rows, new columns) ids, or embeddings. past: the number of columns before these.
        relative: (rows, new columns) relative positions.
    """
    prompt, real = generation.prompt, generation.real
    if prompt.ndim != 2:
        return Texts(problem=NO_TOKENS)
    rows, width = relative.shape
    stop, columns = past + width, prompt.shape[1]
    if columns != real.shape[1]:  # the cache has more of the prompt than was passed
        return Texts(problem=UNKNOWN_PROMPT)
    generated: list[tuple[int, ...]] = [()] * rows
    if stop > columns:
        ids = tokens if past == 0 else generation.ids_so_far
        if ids is None or ids.shape != (rows, stop):
            return Texts(problem=UNKNOWN_REPLY)
        if tokens.ndim == 2 and not torch.equal(ids[:, past:].to(tokens.device), tokens):
            return Texts(problem=UNKNOWN_REPLY)
        generated = [tuple(row) for row in ids[:, columns:].tolist()]
    beams, found = rows // len(prompt), []
    for row, positions in enumerate(relative.tolist()):
        own = [column for column, position in enumerate(positions) if position != OUTSIDE]
        if not own:
            continue
        own_prompt, begun, notes = generation.prompt_texts()[row // beams]
        reply = (*begun, *generated[row])
        found.append(Text(row, own, own_prompt, reply, positions[own[0]], notes))
    return Texts(tuple(found))


def texts_of_requests(
    requests: Sequence[Request], relative: Tensor, notes: dict[Any, dict[Any, Any]]
) -> Texts:
    """Read the texts of one continuous batch, a single row of pieces of requests.

    Args:
        relative: (1, tokens) relative positions. notes: the notes on each request, by its name; missing ones are added.
    """
    found, start = [], 0
    positions = relative[0].tolist()
    for request in requests:
        stop = start + request.length
        reply = request.reply[: max(0, positions[stop - 1] + 1)]
        known = notes.setdefault(request.name, {})
        columns = range(start, stop)
        found.append(Text(0, columns, request.prompt, reply, positions[start], known))
        start = stop
    return Texts(tuple(found))


def equal(one: Tensor | None, two: Tensor | None) -> bool:
    """Return whether both are None, or tensors of the same shape and values."""
    if one is None or two is None:
        return one is two
    return one.shape == two.shape and torch.equal(one, two)
