"""What does not change during an edit is computed once: tokens before the last P prompt tokens are never edited."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from peft_baft.adapter import prompt_lengths
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
    """The same with the keys and values of the unedited tokens kept, and logits from the last prompt token on.

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

    def logits(self) -> Tensor:
        cache = copy.copy(self._cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]  # a forward adds to these, not to the kept ones
        with prompt_lengths(self.model, self._lengths):
            return self.model(**self._inputs, **self._options, past_key_values=cache, use_cache=True).logits


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
