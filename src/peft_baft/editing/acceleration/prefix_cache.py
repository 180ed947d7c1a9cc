"""What does not change during an edit is computed once: tokens before the last P prompt tokens are never edited."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peft_baft.adapter import find_context
from peft_baft.adapter.blocks import text_config
from peft_baft.adapter.model_call import (
    call_with_cache,
    fork,
    full_logits,
    input_device,
    select_rows,
    takes_position_ids,
)
from peft_baft.data.batching import Tokens, collate
from peft_baft.editing.acceleration.module_patches import (
    blocks_below,
    changed,
    enough_rows,
    give,
    on,
    only_at,
    remembering,
    standing_in,
    without_padding,
)
from peft_baft.editing.acceleration.packed_linear import packed_forwards
from peft_baft.losses import answer_losses

logger = logging.getLogger(__name__)
TOLERANCE = 1e-3  # of the first loss and of its gradient, relative: cached and plain ones differ by rounding
ROUNDINGS = 8  # or so many times the spacing of the model's numbers, where that is coarser: bfloat16
_checked: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # base models whose caches were right, up to so many tokens
_failed: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # base models whose caches were not, from so many tokens on


class Session:
    """The plain way: every forward computes every token.

    Args:
        learned: numbers of the rows whose answers are learned; of the others only the gates are of interest.

    Attributes:
        answers: of each row, how many answer tokens `losses()` has; they stand in the order of the rows.
    """

    def __init__(
        self, model: Any, rows: Sequence[Tokens], learned: Sequence[int], padding: int, device: torch.device
    ) -> None:
        self.model, self.rows, self.padding, self.device = model, list(rows), padding, device
        batch = collate(rows, padding)
        self._inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        self._aim(learned, [0] * len(rows))

    def _aim(self, learned: Sequence[int], cuts: Sequence[int]) -> None:
        """Say which answers are learned; column 0 holds token `cuts[i]` of row i."""
        self._learned, self._cuts = list(learned), list(cuts)
        self._lengths = torch.tensor([row.prompt_length for row in self.rows], device=self.device)
        self._context = find_context(self.model)
        asked = [(i, t) for i in learned for t in range(self.rows[i].prompt_length, len(self.rows[i].ids))]
        self.answers = [0] * len(self.rows)
        for i, _ in asked:
            self.answers[i] += 1
        before = [(i, t - 1 - cuts[i]) for i, t in asked]  # the logits before a token predict it
        self._places = tuple(torch.tensor(column, device=self.device) for column in zip(*before, strict=True))
        self._tokens = torch.tensor([self.rows[i].ids[t] for i, t in asked], device=self.device)

    def losses(self) -> Tensor:
        """(n,) the cross entropy of each answer token to learn, at the adapter's present parameters."""
        with self._stating_lengths():
            logits = full_logits(self.model, **self._inputs)
        return answer_losses(logits[on(logits.device, self._places)], self._tokens.to(logits.device))

    def _stating_lengths(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._context is None else self._context.stating(self._lengths)

    def edited(self, rows: Sequence[int], among: Sequence[int], positions: int) -> Tensor:
        """(m,) where the edited tokens of some rows stand in a tensor (rows, tokens, …) of the rows `among`, flattened to
        (rows * tokens, …)."""
        width = self._inputs["input_ids"].shape[1]
        places = [
            among.index(i) * width + t - self._cuts[i]
            for i in rows
            for t in range(max(0, self.rows[i].prompt_length - positions), len(self.rows[i].ids))
        ]
        return torch.tensor(places, dtype=torch.long, device=self.device)

    def taking(self, rows: Sequence[int]) -> Session:
        """The session of some of the rows."""
        learned = [number for number, i in enumerate(rows) if i in self._learned]
        return Session(self.model, [self.rows[i] for i in rows], learned, self.padding, self.device)


class CachedSession(Session):
    """The same with all kept that an edit cannot change: keys and values of the tokens before the edited ones, and of these
    what comes out of the blocks up to the first edited one. Logits are computed where an answer token is to be learned.

    Args:
        positions: P, how many of the last prompt tokens are edited. At least one prompt must be longer.
    """

    def __init__(
        self,
        model: Any,
        rows: Sequence[Tokens],
        learned: Sequence[int],
        padding: int,
        device: torch.device,
        positions: int,
    ) -> None:
        self.model, self.rows, self.padding, self.device = model, list(rows), padding, device
        cuts = [max(0, row.prompt_length - positions) for row in rows]
        before = collate([Tokens(row.ids[:cut], cut) for row, cut in zip(rows, cuts, strict=True)], padding, "left")
        ends = [Tokens(row.ids[cut:], row.prompt_length - cut) for row, cut in zip(rows, cuts, strict=True)]
        after = collate(ends, padding)
        masks = [part["attention_mask"].to(device) for part in (before, after)]
        place = (torch.cat(masks, 1).cumsum(1) - 1).clamp(min=0)
        width = masks[0].shape[1]
        self._inputs = {"input_ids": after["input_ids"].to(device), "attention_mask": torch.cat(masks, 1)}
        first = {"input_ids": before["input_ids"].to(device), "attention_mask": masks[0]}
        if takes_position_ids(model.get_base_model()):
            first["position_ids"], self._inputs["position_ids"] = place[:, :width], place[:, width:]
        self._aim(learned, cuts)
        self._base = model.get_base_model()
        self._head = self._base.get_output_embeddings()
        self._asked = enough_rows(self._places)
        none = (self._places[0][:0], self._places[1][:0])
        self._below = blocks_below(model)
        self._products = packed_forwards(self._base.modules())
        forwards = standing_in(without_padding(self._base, masks[0].bool(), self._products))
        with torch.no_grad(), self._stating_lengths(), only_at(self._head, none), forwards:
            _, self._cache = call_with_cache(model, self._base, first)
        self.given: dict[nn.Module, Any] = {}
        self._width = width
        self._forwards = without_padding(self._base, self._inputs["attention_mask"][:, width:].bool(), self._products)

    def losses(self) -> Tensor:
        cache = fork(self._cache)  # a forward adds to this one, not to the kept one
        known = remembering(self._below, self.given) if not self.given else nullcontext()
        given = {block: partial(give, output) for block, output in self.given.items()}
        with self._stating_lengths(), only_at(self._head, self._asked), known, standing_in(self._forwards | given):
            logits, _ = call_with_cache(self.model, self._base, self._inputs, cache)
        logits = logits if len(logits) == len(self._tokens) else logits[: len(self._tokens)]
        return answer_losses(logits, self._tokens.to(logits.device))

    def taking(self, rows: Sequence[int]) -> CachedSession:
        taken, index = copy.copy(self), torch.tensor(rows, device=self.device)
        taken.rows = [self.rows[i] for i in rows]
        taken._aim([n for n, i in enumerate(rows) if i in self._learned], [self._cuts[i] for i in rows])
        taken._asked = enough_rows(taken._places)
        taken._inputs = {name: tensor[index] for name, tensor in self._inputs.items()}
        taken._cache = select_rows(self._cache, index)
        real = taken._inputs["attention_mask"][:, self._width :].bool()
        taken._forwards = without_padding(taken._base, real, taken._products)
        taken.given = {block: changed(given, lambda h: h[index]) for block, given in self.given.items()}
        return taken


def open_session(
    model: Any, rows: Sequence[Tokens], learned: Sequence[int], padding: int, positions: int | None
) -> Session:
    """Open the cached session where it gives what the plain one gives, else the plain one, with a warning.

    That is checked when a model is first edited, loss and gradient, and the loss again for texts that are much longer or reach
    over the model's attention window.

    Args:
        learned: numbers of the rows whose answers are learned.
        positions: P of the adapter; None where tokens before them may change as well.
    """
    device = input_device(model)
    base = model.get_base_model()
    plain = Session(model, rows, learned, padding, device)
    longest = max(len(row.ids) for row in rows)
    if (
        positions is None
        or max(row.prompt_length for row in rows) <= positions
        or longest >= _failed.get(base, longest + 1)
    ):
        return plain
    some = sorted({learned[0], max(range(len(rows)), key=lambda i: len(rows[i].ids))})
    # A model that was never edited before may fail in any way when it goes on from a cache: its error is told, not raised.
    unknown = (Exception,) if base not in _checked else ()
    try:
        cached = CachedSession(model, rows, learned, padding, device, positions)
        if longest > _checked.get(base, 0):
            _require_equal(model, plain.taking(some), cached.taking(some), gradient=base not in _checked)
            _checked[base] = _reach(model, longest)
        return cached
    except NotImplementedError as error:  # a model that keeps no cache: nothing is wrong with it
        _failed[base] = 0
        logger.info("%s is edited without a cache: %s", type(base).__name__, error)
    except (CacheDiffers, *unknown) as error:
        _failed[base] = _checked.get(base, -1) + 1
        logger.warning(SLOWER, type(base).__name__, type(error).__name__, error)
    return plain


SLOWER = (
    "%s is edited without a cache, which is slower but right: going on from a cache fails with it (%s: %s). "
    "`baft check --model ...` shows what works with this model."
)


class CacheDiffers(ArithmeticError):
    """Say that an edit with a cache is not the edit without it."""


def _require_equal(model: Any, plain: Session, cached: Session, gradient: bool) -> None:
    """Raise CacheDiffers unless two sessions of the same rows give the same loss, and the same gradient if asked.

    The cached one is run twice: what its first run leaves behind must not reach the second one.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not (gradient and parameters and torch.is_grad_enabled()):
        with torch.no_grad():
            wanted, found = (session.losses().mean().item() for session in (plain, cached))
        _require_small("loss", abs(found - wanted), 1 + abs(wanted), model)
        return
    wanted, wanted_gradient = _loss_and_gradient(plain, parameters)
    size = torch.linalg.vector_norm(wanted_gradient).item()
    for _ in range(2):
        loss, gradient_found = _loss_and_gradient(cached, parameters)
        _require_small("loss", abs(loss - wanted), 1 + abs(wanted), model)
        difference = torch.linalg.vector_norm(gradient_found - wanted_gradient).item()
        _require_small("gradient", difference, size, model)


def _loss_and_gradient(session: Session, parameters: Sequence[nn.Parameter]) -> tuple[float, Tensor]:
    """The mean loss of a session, and its gradient as one vector; gradients that the parameters have stay as they are."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    loss = session.losses().mean()
    loss.backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient
    return loss.item(), torch.cat([part.detach().flatten().float().cpu() for part in parts])


def _require_small(what: str, difference: float, size: float, model: Any) -> None:
    """Raise CacheDiffers if a difference is more than rounding explains in something of that size."""
    dtype = next((p.dtype for p in model.get_base_model().parameters() if p.is_floating_point()), torch.float32)
    tolerance = max(TOLERANCE, ROUNDINGS * torch.finfo(dtype).eps)
    if not difference <= tolerance * size:
        raise CacheDiffers(
            f"the {what} of its first step is off by {difference:.2g}, where the {what}'s size is {size:.2g}"
        )


def _reach(model: Any, checked: int) -> int:
    """Up to how many tokens a model may be taken to do what it did with so many: the next power of two, or its window."""
    window = getattr(text_config(model.get_base_model()), "sliding_window", None)
    reach = 1 << (checked - 1).bit_length()
    return min(reach, window) if window and window >= checked else reach
