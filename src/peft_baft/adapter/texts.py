"""The texts of a forward: of each sequence, the tokens of its prompt and of the reply so far, wherever these lie.

A forward gets the tokens that are new to the model. What came before them is in the running `generate`, in a request of a
continuous batch, or was read by an earlier forward, which leaves a note on the cache that it gives back. Kinds of adapters whose
change depends on what a text says read it here (`EditContext.read_texts`); plain BaFT needs positions only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_baft.adapter.call import equal
from peft_baft.adapter.model_call import Request, cached_columns, row_marks
from peft_baft.span import OUTSIDE

if TYPE_CHECKING:
    from peft_baft.adapter.generation import Generation

NOTE = "_baft_texts"  # an attribute of a cache: of each row, what has been read of it
NO_TOKENS = (
    "An adapter on this model reads the tokens of prompts: call the model with input_ids (rows, tokens), not with embeddings "
    "only."
)
UNKNOWN_PROMPT = (
    "An adapter on this model reads the tokens of prompts, and this forward goes on from a cache whose texts it has not seen "
    "with the same rows. Pass the cache of the forward that read the prompt, use generate(), or pass the whole text."
)
UNKNOWN_REPLY = (
    "An adapter on this model reads the tokens of prompts and replies, and this step of generate() does not tell what its rows "
    "said before: prepare_inputs_for_generation was replaced, or gave other tokens than the step has. Generate without a cache."
)


@dataclass(frozen=True)
class Text:
    """One sequence of a forward.

    Attributes:
        row: its row. columns: of its tokens in this forward, in order.
        prompt: ids of the prompt's tokens. reply: ids of the reply's tokens, up to those of this forward.
        first: position of the token in the first of these columns, relative to the prompt's end: -1 is the last prompt token.
        notes: kept as long as the sequence goes on, for what a reader found out about it; keys belong to readers.
    """

    row: int
    columns: Sequence[int]
    prompt: tuple[int, ...]
    reply: tuple[int, ...]
    first: int
    notes: dict[Any, Any] = field(default_factory=dict)

    def column(self, position: int) -> int | None:
        """Return the column of the token at a position relative to the prompt's end; None if it is not in this forward."""
        number = position - self.first
        return self.columns[number] if 0 <= number < len(self.columns) else None


@dataclass(frozen=True, eq=False)
class Texts:
    """The texts of one forward; of one that does not tell them, why."""

    known: tuple[Text, ...] = ()
    problem: str = ""

    def __iter__(self) -> Iterator[Text]:
        """Iterate over the texts.

        Raises:
            ValueError: they are not known.
        """
        if self.problem:
            raise ValueError(self.problem)
        return iter(self.known)

    def leave_notes(self, caches: Sequence[Any], rows: int) -> None:
        """Write on the caches that a forward gives back what each row holds now, for forwards that go on from them."""
        if self.problem or len(self.known) != rows:  # of packed rows, a cache is of no use
            return
        for cache in caches:
            setattr(cache, NOTE, (cached_columns(cache), row_marks(cache), self.known))


def texts_of_input(ids: Tensor | None, relative: Tensor) -> Texts:
    """Read the texts of a forward that holds all of them.

    Args:
        ids: (rows, tokens); None where the model got embeddings only. relative: (rows, tokens) positions relative to the prompts'
            ends, which begin anew with a sequence.
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
    """Yield the first and last + 1 column of each sequence in a row of positions."""
    start = None
    for column, position in enumerate([*positions, OUTSIDE]):
        if start is not None and position != positions[column - 1] + 1:
            yield start, column
            start = None
        if start is None and position != OUTSIDE:
            start = column


def texts_after_cache(ids: Tensor | None, relative: Tensor, cache: Any, *, is_told: bool) -> Texts:
    """Read the texts of a forward outside `generate` that goes on from a cache.

    Args:
        ids: (rows, new tokens). relative: their positions, which tell the prompts' ends if those are told (`is_told`); else the
            prompts end where they ended when they were read.
    """
    if ids is None:
        return Texts(problem=NO_TOKENS)
    columns_noted, marks, notes = getattr(cache, NOTE, (None, None, ()))
    # One that was cropped, reordered, or read in between by another model holds something else.
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
        first = int(relative[row, columns[0]]) if is_told else len(before) - len(note.prompt)
        length = len(before) - first  # of the prompt
        if not length >= 0:
            return Texts(problem=UNKNOWN_PROMPT)
        notes_of_row = note.notes if length == len(note.prompt) else {}
        found.append(Text(row, columns, whole[:length], whole[length:], first, notes_of_row))
    return Texts(tuple(found))


def texts_of_step(generation: Generation, tokens: Tensor, past: int, relative: Tensor) -> Texts:
    """Read the texts of a step of `generate`.

    Args:
        tokens: (rows, new columns) ids, or embeddings. past: columns before these. relative: their positions.
    """
    prompt, real = generation.prompt, generation.real
    if prompt.ndim != 2:
        return Texts(problem=NO_TOKENS)
    rows, width = relative.shape
    stop, columns = past + width, prompt.shape[1]
    if columns != real.shape[1]:  # the cache holds more of the prompt than was passed
        return Texts(problem=UNKNOWN_PROMPT)
    said: list[tuple[int, ...]] = [()] * rows
    if stop > columns:
        whole = tokens if past == 0 else generation.whole
        if whole is None or whole.shape != (rows, stop):
            return Texts(problem=UNKNOWN_REPLY)
        if tokens.ndim == 2 and not torch.equal(whole[:, past:].to(tokens.device), tokens):
            return Texts(problem=UNKNOWN_REPLY)
        said = [tuple(ids) for ids in whole[:, columns:].tolist()]
    beams, found = rows // len(prompt), []
    for row, positions in enumerate(relative.tolist()):
        own = [column for column, position in enumerate(positions) if position != OUTSIDE]
        if not own:
            continue
        read, begun, notes = generation.prompt_texts()[row // beams]
        reply = (*begun, *said[row])
        found.append(Text(row, own, read, reply, positions[own[0]], notes))
    return Texts(tuple(found))


def texts_of_requests(
    requests: Sequence[Request], relative: Tensor, notes: dict[Any, dict[Any, Any]]
) -> Texts:
    """Read the texts of one continuous batch, whose one row holds pieces of requests.

    Args:
        relative: (1, tokens) positions. notes: of each request, by its name, those of its text; further ones are added.
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
