"""What does not change during an edit is computed once: tokens before the last P prompt tokens are never edited."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_baft.adapter import baft_layers, find_context
from peft_baft.data.batching import Tokens, collate
from peft_baft.losses import answer_losses

logger = logging.getLogger(__name__)
TOLERANCE = 1e-3  # of the first loss, relative; cached and plain differ by float noise, a model that cannot by far more
PACKED_FROM, PACKED_BELOW = 32, 0.9  # tokens of a batch, and how many of them are real
_checked: WeakKeyDictionary[Any, int] = (
    WeakKeyDictionary()
)  # base models whose caches were found right, up to so many tokens


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
            logits = self.model(**self._inputs, use_cache=False).logits
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
        positions: P, how many of the last prompt tokens are edited. Every row's prompt must be longer.
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
        cuts = [row.prompt_length - positions for row in rows]
        before = collate([Tokens(row.ids[:cut], cut) for row, cut in zip(rows, cuts, strict=True)], padding, "left")
        after = collate([Tokens(row.ids[cut:], positions) for row, cut in zip(rows, cuts, strict=True)], padding)
        masks = [part["attention_mask"].to(device) for part in (before, after)]
        place = (torch.cat(masks, 1).cumsum(1) - 1).clamp(min=0)
        width = masks[0].shape[1]
        self._inputs = {"input_ids": after["input_ids"].to(device), "attention_mask": torch.cat(masks, 1)}
        first = {"input_ids": before["input_ids"].to(device), "attention_mask": masks[0]}
        if "position_ids" in inspect.signature(model.get_base_model().forward).parameters:
            first["position_ids"], self._inputs["position_ids"] = place[:, :width], place[:, width:]
        self._aim(learned, cuts)
        self._base = model.get_base_model()
        self._head = self._base.get_output_embeddings()
        self._asked = enough_rows(self._places)
        none = (self._places[0][:0], self._places[1][:0])
        packed = standing_in(without_padding(self._base, masks[0].bool()))
        with torch.no_grad(), self._stating_lengths(), only_at(self._head, none), packed:
            self._cache = model(**first, use_cache=True).past_key_values
        self._below = blocks_below(model)
        self._given: dict[nn.Module, Any] = {}
        self._width = width
        self._packed = without_padding(self._base, self._inputs["attention_mask"][:, width:].bool())

    def losses(self) -> Tensor:
        cache = copied(self._cache)  # a forward adds to this one, not to the kept one
        known = remembering(self._below, self._given) if not self._given else nullcontext()
        given = {block: partial(_give, output) for block, output in self._given.items()}
        with self._stating_lengths(), only_at(self._head, self._asked), known, standing_in(self._packed | given):
            logits = self.model(**self._inputs, past_key_values=cache, use_cache=True).logits
        logits = logits if len(logits) == len(self._tokens) else logits[: len(self._tokens)]
        return answer_losses(logits, self._tokens.to(logits.device))

    def taking(self, rows: Sequence[int]) -> CachedSession:
        taken, index = copy.copy(self), torch.tensor(rows, device=self.device)
        taken.rows = [self.rows[i] for i in rows]
        taken._aim([n for n, i in enumerate(rows) if i in self._learned], [self._cuts[i] for i in rows])
        taken._asked = enough_rows(taken._places)
        taken._inputs = {name: tensor[index] for name, tensor in self._inputs.items()}
        taken._cache = copied(self._cache)
        taken._cache.batch_select_indices(index)
        taken._packed = without_padding(taken._base, taken._inputs["attention_mask"][:, self._width :].bool())
        taken._given = {block: _changed(given, lambda h: h[index]) for block, given in self._given.items()}
        return taken


def on(device: torch.device, places: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Indices where they are needed."""
    return tuple(index.to(device) for index in places)


def enough_rows(places: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The first place again and again where there are but two or three: BLAS multiplies four rows in half the time of three."""
    missing = 4 - len(places[0])
    return tuple(torch.cat([i, i[:1].expand(missing)]) for i in places) if 0 < missing < 3 else places


def copied(cache: Any) -> Any:
    """The same keys and values in another cache."""
    cache = copy.copy(cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    return cache


def blocks_below(model: Any) -> list[nn.Module]:
    """The blocks up to the first one that any BaFT adapter edits, which is edited after it has run; none where blocks do not
    stand in one list."""
    places = [layer.name.rpartition(".") for layer in baft_layers(model)]
    if len({stack for stack, _, _ in places}) != 1 or not all(number.isdigit() for _, _, number in places):
        return []
    stack = model.get_base_model().get_submodule(places[0][0])
    return list(stack)[: min(int(number) for _, _, number in places) + 1]


@contextmanager
def only_at(head: nn.Module, places: tuple[Tensor, ...]) -> Iterator[None]:
    """Let the model's head compute logits at some places (rows, columns) alone: (n, vocabulary)."""
    with head.register_forward_pre_hook(lambda _, given: (given[0][on(given[0].device, places)],)):
        yield


@contextmanager
def remembering(modules: Sequence[nn.Module], given: dict[nn.Module, Any]) -> Iterator[None]:
    """Keep in `given` what the modules give in the forward inside, before any hook changes it."""
    with ExitStack() as hooks:
        for module in modules:
            hook = module.register_forward_hook(
                lambda own, _, out: given.update({own: _changed(out, Tensor.detach)}), prepend=True
            )
            hooks.enter_context(hook)
        yield


def _changed(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a block gives, with its hidden vectors changed."""
    return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])


def _give(output: Any, *_: Any, **__: Any) -> Any:
    return output


@contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let these functions stand in for the forwards of modules inside."""
    own = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, instead in own.items():
            if instead is None:
                del module.forward
            else:
                module.__dict__["forward"] = instead


def without_padding(model: Any, real: Tensor) -> dict[nn.Module, Callable[..., Any]]:
    """Forwards of the model's linear layers that compute the real tokens (rows, tokens) alone and give 0 for padding.

    None where that would not pay: for few tokens a layer's time goes into reading its weights, on a GPU for many as well.
    """
    if real.device.type != "cpu" or real.numel() < PACKED_FROM or real.float().mean() > PACKED_BELOW:
        return {}
    places, head = real.flatten().nonzero()[:, 0], model.get_output_embeddings()
    own = {id(module) for layer in baft_layers(model) for module in layer.modules()}
    linear = [m for m in model.modules() if isinstance(m, nn.Linear | Conv1D) and m is not head and id(m) not in own]
    return {module: partial(_of_real_tokens, module.forward, real.shape, places) for module in linear}


def _of_real_tokens(forward: Callable[[Tensor], Tensor], shape: torch.Size, places: Tensor, h: Tensor) -> Tensor:
    if h.shape[:-1] != shape:
        return forward(h)
    out = forward(h.flatten(0, 1).index_select(0, places))
    return out.new_zeros(shape.numel(), out.shape[-1]).index_copy(0, places, out).unflatten(0, shape)


def open_session(
    model: Any, rows: Sequence[Tokens], learned: Sequence[int], padding: int, positions: int | None
) -> Session:
    """The cached session where it gives what the plain one gives, else the plain one.

    That is checked when a model is first edited, and again when a text is longer than all before.

    Args:
        learned: numbers of the rows whose answers are learned.
        positions: P of the adapter; None where tokens before them may change as well.
    """
    device = model.get_input_embeddings().weight.device
    plain = Session(model, rows, learned, padding, device)
    if positions is None or min(row.prompt_length for row in rows) <= positions:
        return plain
    longest = max(len(row.ids) for row in rows)
    try:
        cached = CachedSession(model, rows, learned, padding, device, positions)
        if longest <= _checked.get(model.get_base_model(), 0):
            return cached
        some = sorted({learned[0], max(range(len(rows)), key=lambda i: len(rows[i].ids))})
        with torch.no_grad():
            losses = [session.taking(some).losses().mean().item() for session in (plain, cached)]
    except (AttributeError, IndexError, TypeError, ValueError, NotImplementedError) as error:
        logger.info("Editing without a cache: %s", error)
        return plain
    if not abs(losses[0] - losses[1]) <= TOLERANCE * (1 + losses[0]):
        logger.info("Editing without a cache: the first loss is %g with and %g without it.", losses[1], losses[0])
        return plain
    _checked[model.get_base_model()] = longest
    return cached
