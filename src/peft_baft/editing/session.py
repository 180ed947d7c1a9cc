"""What does not change during an edit is computed once: tokens before the last P prompt tokens are never edited."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from peft_baft.adapter import baft_layers, prompt_lengths
from peft_baft.data.batching import Tokens, collate
from peft_baft.losses import teacher_forcing

logger = logging.getLogger(__name__)
TOLERANCE = 1e-3  # of the first loss, relative; cached and plain differ by float noise, a model that cannot by far more
_checked: WeakKeyDictionary[Any, int] = (
    WeakKeyDictionary()
)  # base models whose caches were found right, up to so many tokens


class Session:
    """The plain way: every forward computes every token.

    Attributes:
        labels: (rows, tokens) of the logits that `logits()` gives.
    """

    def __init__(self, model: Any, rows: Sequence[Tokens], padding: int, device: torch.device) -> None:
        self.model = model
        self._batch = {name: tensor.to(device) for name, tensor in collate(rows, padding).items()}
        self.labels = self._batch["labels"]

    def logits(self) -> Tensor:
        """(rows, tokens, vocabulary) at the adapter's present parameters."""
        return self.model(**self._batch, use_cache=False).logits


class CachedSession(Session):
    """The same with all kept that an edit cannot change: keys and values of the tokens before the edited ones, and of these
    what the blocks below the first edited one give. Logits are computed from the last prompt token on.

    Args:
        positions: P, how many of the last prompt tokens are edited. Every row's prompt must be longer.
    """

    def __init__(self, model: Any, rows: Sequence[Tokens], padding: int, device: torch.device, positions: int) -> None:
        cuts = [row.prompt_length - positions for row in rows]
        before = collate([Tokens(row.ids[:cut], cut) for row, cut in zip(rows, cuts, strict=True)], padding, "left")
        after = collate([Tokens(row.ids[cut:], positions) for row, cut in zip(rows, cuts, strict=True)], padding)
        masks = [part["attention_mask"].to(device) for part in (before, after)]
        place = (torch.cat(masks, 1).cumsum(1) - 1).clamp(min=0)
        width = masks[0].shape[1]
        accepted = inspect.signature(model.get_base_model().forward).parameters
        self.model, kept = model, after["input_ids"].shape[1] - (positions - 1)
        self._inputs = {"input_ids": after["input_ids"].to(device), "attention_mask": torch.cat(masks, 1)}
        self._lengths = [row.prompt_length for row in rows]
        first = {"input_ids": before["input_ids"].to(device), "attention_mask": masks[0]}
        if "position_ids" in accepted:
            first["position_ids"], self._inputs["position_ids"] = place[:, :width], place[:, width:]
        last = torch.arange(after["input_ids"].shape[1], device=device)[
            -kept:
        ]  # indices, since a slice would cost a copy
        self._options = {"logits_to_keep": last} if "logits_to_keep" in accepted else {}
        self.labels = after["labels"].to(device)[:, -kept:] if self._options else after["labels"].to(device)
        with torch.no_grad(), prompt_lengths(model, self._lengths):
            options = {"logits_to_keep": 1} if self._options else {}
            self._cache = model(**first, **options, use_cache=True).past_key_values
        self._below = blocks_below(model)
        self._given: dict[nn.Module, Any] = {}

    def logits(self) -> Tensor:
        cache = copy.copy(self._cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]  # a forward adds to these, not to the kept ones
        known = giving(self._given) if self._given else remembering(self._below, self._given)
        with prompt_lengths(self.model, self._lengths), known:
            return self.model(**self._inputs, **self._options, past_key_values=cache, use_cache=True).logits


def blocks_below(model: Any) -> list[nn.Module]:
    """The blocks that run before the first one that any BaFT adapter edits; none where blocks do not stand in one list."""
    places = [layer.name.rpartition(".") for layer in baft_layers(model)]
    if len({stack for stack, _, _ in places}) != 1 or not all(number.isdigit() for _, _, number in places):
        return []
    stack = model.get_base_model().get_submodule(places[0][0])
    return list(stack)[: min(int(number) for _, _, number in places)]


@contextmanager
def remembering(modules: Sequence[nn.Module], given: dict[nn.Module, Any]) -> Iterator[None]:
    """Keep in `given` what the modules give in the forward inside."""
    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_hook(lambda own, _, output: given.update({own: output})))
        yield


@contextmanager
def giving(outputs: dict[nn.Module, Any]) -> Iterator[None]:
    """Let modules give these outputs inside without computing anything."""
    own = {module: module.__dict__.get("forward") for module in outputs}
    try:
        for module, output in outputs.items():
            module.forward = lambda *_, output=output, **__: output
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def open_session(model: Any, rows: Sequence[Tokens], padding: int, positions: int | None) -> Session:
    """The cached session where it gives what the plain one gives, else the plain one.

    That is checked when a model is first edited, and again when a text is longer than all before.

    Args:
        positions: P of the adapter; None where tokens before them may change as well.
    """
    device = model.get_input_embeddings().weight.device
    plain = Session(model, rows, padding, device)
    if positions is None or min(row.prompt_length for row in rows) <= positions:
        return plain
    longest = max(len(row.ids) for row in rows)
    try:
        cached = CachedSession(model, rows, padding, device, positions)
        if longest <= _checked.get(model.get_base_model(), 0):
            return cached
        with torch.no_grad():
            losses = [teacher_forcing(session.logits(), session.labels).item() for session in (plain, cached)]
    except (AttributeError, TypeError, ValueError, NotImplementedError) as error:
        logger.info("Editing without a cache: %s", error)
        return plain
    if abs(losses[0] - losses[1]) > TOLERANCE * (1 + losses[0]):
        logger.info("Editing without a cache: the first loss is %g with and %g without it.", losses[1], losses[0])
        return plain
    _checked[model.get_base_model()] = longest
    return cached
