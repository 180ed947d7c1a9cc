"""Find, in a forward, which edit of a memory each token belongs to, and keep it while the answer is decoded.

The edit of a prompt is found when the memory's key block has run over the whole prompt. It belongs to the row: to a running
`generate`, to a request of a continuous batch, or to the cache that a forward gives back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from peft_baft.adapter import model_call
from peft_baft.adapter.matching import NOWHERE
from peft_baft.adapter.memory import EditCodes, EditRouter
from peft_baft.span import OUTSIDE

if TYPE_CHECKING:
    from peft_baft.adapter.call import Call
    from peft_baft.adapter.context import EditContext
    from peft_baft.adapter.generation import Generation

NO_TOKENS = "A memory of edits tells prompts apart by their tokens: call the model with input_ids (rows, tokens), not embeddings."
PROMPT_IN_PIECES = (
    "A memory of edits finds the edit that a prompt asks for when it has read the whole prompt, and continuous batching gave a "
    "part of one. Let a batch take more tokens (max_batch_tokens), or use generate()."
)
UNKNOWN_ROUTE = (
    "A memory of edits answers by what the prompt asks for, and this forward goes on from a cache whose prompt it has not seen "
    "with the same rows. Pass the cache of the forward that read the prompt, use generate(), or pass the whole text."
)
ROUTES_OF_CACHE = "_baft_routes"  # an attribute of a cache: of each memory, the edit of each row


@dataclass(frozen=True)
class Routes:
    """Which edit each token of a forward belongs to.

    Attributes:
        of_tokens: (rows, tokens) long, places of edits, `NOWHERE` for none; None where no token belongs to any.
    """

    of_tokens: Tensor | None

    def change(self, codes: EditCodes, mask: Tensor, hidden: Tensor) -> Tensor | None:
        """Compute what is added to hidden vectors (rows, tokens, d); mask: (rows, tokens), those that may be edited."""
        if self.of_tokens is None:
            return None
        of_tokens = self.of_tokens.to(hidden.device)
        places, inverse = of_tokens.clamp(min=0).unique(return_inverse=True)
        change = codes.change(places, hidden.device)[inverse]
        edited = mask & (of_tokens != NOWHERE)
        return torch.where(edited[..., None], change, 0).to(hidden.dtype)


def routes_of(of_rows: Sequence[int], rows: int, tokens: int) -> Routes:
    """Give every token of a row the edit of its prompt. of_rows: places, of as many prompts as divide the rows (beams)."""
    if all(place == NOWHERE for place in of_rows):
        return Routes(None)
    every = torch.tensor(list(of_rows)).repeat_interleave(rows // len(of_rows))
    return Routes(every[:, None].expand(rows, tokens))


@dataclass(frozen=True)
class Sequences:
    """The sequences in the rows of a forward: first and last + 1 column of each, where its prompt ends, and its row."""

    places: list[tuple[int, int, int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, relative: Tensor, outside: int) -> Sequences:
        """Find them. relative: (rows, tokens) positions relative to the prompts' ends, which begin anew with a sequence."""
        found = cls()
        for row, positions in enumerate(relative.tolist()):
            start = None
            for column, position in enumerate([*positions, outside]):
                if start is not None and position != positions[column - 1] + 1:
                    end = next((c for c in range(start, column) if positions[c] >= 0), column)
                    found.places.append((row, start, end, column))
                    start = None
                if start is None and position != outside:
                    start = column
        return found


class _KeyBlockHasRun(Exception):
    """Ends a forward of which the states of the key block alone are wanted."""


class Routing:
    """Finds the edits of the forwards of one base model.

    context: knows the running forward, of which this reads the tokens and where prompts end.
    """

    def __init__(self, context: EditContext) -> None:
        self._context = context
        # Of each memory and request of a manager: which edit its prompt asks for.
        self._of_requests: dict[tuple[str, Any], int] = {}
        self._manager: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to running requests."""
        return {"_context": self._context, "_of_requests": {}, "_manager": None}

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Let memories of edits answer nothing in this thread's forwards inside."""
        outer, self._context.of_editor = self._context.of_editor, True
        try:
            yield
        finally:
            self._context.of_editor = outer

    def find(self, routers: Mapping[str, EditRouter], hidden: Tensor, call: Call) -> None:
        """Find which edit of each memory the tokens of the running forward belong to.

        Args:
            routers: by the memories' names, of those that have the same key block. hidden: (rows, tokens, d) of that block.

        Raises:
            ValueError: the model was called in a way that does not tell the prompt. NotImplementedError: so it was by continuous
                batching.
        """
        context = self._context
        if isinstance(context.of_editor, list):
            context.of_editor.append(hidden.detach())
            raise _KeyBlockHasRun
        if context.of_editor:
            return
        for name, router in routers.items():
            if router.count:
                router.require_model(context.model)
                call.routes[name] = self._routes(name, router, hidden.detach(), call)

    def key_states(self, ids: Tensor, real: Tensor) -> Tensor:
        """Compute what leaves the key block of the active memory, (rows, tokens, d), in a forward that ends there.

        Args:
            ids: (rows, tokens), padded on the right. real: (rows, tokens) bool, False for padding.

        Raises:
            ValueError: the active adapter is no memory of edits, or it is switched off.
        """
        seen: list[Tensor] = []
        names = self._context.row_adapters
        with self._context.another_call(), torch.no_grad():
            self._context.of_editor = seen
            if names is not None:  # of a mixed batch, in which each row may have several beams
                self._context.row_adapters = names[:: len(names) // len(ids)]
            try:
                self._context.call_model(ids, real)
            except _KeyBlockHasRun:
                return seen[0]
        raise ValueError("No memory of edits is active: use set_adapter, or enable the adapter.")

    def _routes(self, name: str, router: EditRouter, hidden: Tensor, running: Call) -> Routes:
        """Find which edit of a memory each token belongs to."""
        context, positions = self._context, running.asked_positions
        call, generation = context.stack_call, context.step_of
        if call is None or positions is None:
            raise ValueError(NO_TOKENS)
        if call.is_continuous_batch:
            return self._of_continuous_batch(name, router, hidden, positions[0])
        rows, width = positions.shape
        if generation is not None:
            if name not in generation.routes:
                generation.routes[name] = self._of_prompts(generation, router, hidden)
            return routes_of(generation.routes[name], rows, width)
        if isinstance(context.past, Tensor) or context.past:
            known = getattr(call.memory, ROUTES_OF_CACHE, {}).get(name)
            if known is None or len(known) != rows:
                raise ValueError(UNKNOWN_ROUTE)
            return routes_of(known, rows, width)
        ids, found = _token_ids(call.tokens), torch.full((rows, width), NOWHERE)
        for row, start, end, stop in Sequences.of(positions, OUTSIDE).places:
            if end > start:
                question = router.question(ids[row, start:end], hidden[row, start:end])
                found[row, start:stop] = router.match(question).edit
        return Routes(found if (found != NOWHERE).any() else None)

    def _of_continuous_batch(
        self, name: str, router: EditRouter, hidden: Tensor, positions: Tensor
    ) -> Routes:
        """Find which edit each token belongs to: that of its request, found when its prompt was read."""
        context = self._context
        if self._manager is not context.manager:
            self._manager, self._of_requests = context.manager, {}
        (ids,) = _token_ids(context.stack_call.tokens)
        found, start = torch.full((1, len(positions)), NOWHERE), 0
        for piece in model_call.pieces_of_requests(context.manager, len(positions)):
            known, end = (name, piece.request), start + piece.prompt
            if int(positions[start]) == -piece.prompt:
                if piece.length < piece.prompt:
                    raise NotImplementedError(PROMPT_IN_PIECES)
                question = router.question(ids[start:end], hidden[0, start:end])
                self._of_requests[known] = router.match(question).edit
            if known not in self._of_requests:
                raise NotImplementedError(PROMPT_IN_PIECES)
            found[0, start : start + piece.length] = self._of_requests[known]
            start += piece.length
        return Routes(found if (found != NOWHERE).any() else None)

    def _of_prompts(self, generation: Generation, router: EditRouter, hidden: Tensor) -> list[int]:
        """Find which edit each prompt of a running `generate` asks for."""
        context, ids = self._context, _token_ids(generation.prompt)
        beams = len(hidden) // len(ids)
        columns = generation.asked_span.relative_positions(0, *ids.shape)
        of_prompt = (columns < 0) & (columns != OUTSIDE)
        if int(context.past) == 0 and hidden.shape[1] >= ids.shape[1]:
            states = hidden[::beams]
        else:  # the prompt comes in pieces, or goes on from a cache
            states = self._states_of_prompts(ids, of_prompt)
        found = []
        for row, mask in enumerate(of_prompt):
            own = states[row, : len(mask)]
            question = router.question(ids[row, mask], own[mask.to(own.device)])
            found.append(router.match(question).edit)
        return found

    def _states_of_prompts(self, ids: Tensor, of_prompt: Tensor) -> Tensor:
        """Compute what leaves the key block at the tokens of prompts, (rows, columns, d), in a forward of their own."""
        longest = int(of_prompt.sum(1).max())
        batch, real = ids.new_zeros(len(ids), longest), of_prompt.new_zeros(len(ids), longest)
        for row, mask in enumerate(of_prompt):
            count = int(mask.sum())
            batch[row, :count], real[row, :count] = ids[row, mask], True
        at_prompts = self.key_states(batch, real)
        states = at_prompts.new_zeros(*of_prompt.shape, at_prompts.shape[-1])
        states[of_prompt.to(states.device)] = at_prompts[real.to(states.device)]
        return states

    def keep(self, call: Call, caches: Sequence[Any]) -> None:
        """Write the routes of a forward outside `generate` on the caches that it gives back."""
        routes = {}
        for name, found in call.routes.items():
            assert call.asked_positions is not None
            every, rows = found.of_tokens, len(call.asked_positions)
            routes[name] = [NOWHERE] * rows if every is None else every.amax(1).tolist()
        for cache in caches:
            setattr(cache, ROUTES_OF_CACHE, routes)


def _token_ids(tokens: Tensor) -> Tensor:
    if tokens.ndim != 2:
        raise ValueError(NO_TOKENS)
    return tokens
