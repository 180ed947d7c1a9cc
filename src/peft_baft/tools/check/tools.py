"""What the trials of a check measure with."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn, stack

from peft_baft.adapter import BaftLayer
from peft_baft.editing.fast_paths import logger as forward_logger


def largest_difference(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Find the largest difference of pairs of logits, in standard deviations of the second ones; infinite where one is NaN."""
    largest = 0.0
    for one, other in pairs:
        if not len(other):
            continue
        difference = (
            (one - other.to(one.device)).abs().max() / other.std().clamp(min=1e-30)
        ).item()
        largest = max(largest, math.inf if math.isnan(difference) else difference)
    return largest


def step_difference(
    plain: tuple[float, dict[str, Tensor]], cached: tuple[float, dict[str, Tensor]]
) -> float:
    """Measure how far loss and gradient of two ways differ, relative to the loss and to the whole gradient's length."""
    (loss, gradients), (other_loss, others) = plain, cached
    missing = gradients.keys() ^ others.keys()
    squares = [
        (others[name] - gradient).square().sum()
        for name, gradient in gradients.items()
        if name not in missing
    ]
    length = stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    of_loss = abs(other_loss - loss) / (1 + abs(loss))
    of_gradient = (stack(squares).sum().sqrt() / length).item()
    difference = max(of_loss, of_gradient)
    return math.inf if missing or math.isnan(difference) else difference


def in_words(error: BaseException) -> str:
    """Give an error's type and message in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def error_of(attempt: Callable[[], Any]) -> str | None:
    """Attempt something; what it fails with, None where it does not."""
    try:
        attempt()
    except Exception as error:
        return in_words(error)
    return None


@contextmanager
def changed_tokens(layers: Sequence[BaftLayer]) -> Iterator[dict[str, list[Tensor]]]:
    """Note at every run of each edited block which tokens (rows, tokens) its BaftLayer changes."""
    changed: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}

    def note(layer: Any, args: tuple, out: Tensor) -> None:
        changed[layer.name].append((args[0] != out).any(-1).cpu())

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(note))
        yield changed


@contextmanager
def reasons_for_plain_path() -> Iterator[list[str]]:
    """Collect why edits go the plain path, without a cache, instead of letting it be logged."""
    reasons: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        error = record.args[-1] if isinstance(record.args, tuple) and record.args else record.msg
        reasons.append(in_words(error) if isinstance(error, Exception) else str(error))
        return False

    forward_logger.addFilter(keep)
    level = forward_logger.level
    forward_logger.setLevel(logging.INFO)
    try:
        yield reasons
    finally:
        forward_logger.setLevel(level)
        forward_logger.removeFilter(keep)


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Put back which parameters are trained: PEFT changes that when adapters come and go."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
