"""Helpers of the trials of a check."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

from peft import PeftModel
from torch import Tensor, nn, stack
from transformers import PreTrainedModel

from peft_baft.adapter import BaftLayer
from peft_baft.editing.fast_paths import logger as forward_logger


def base_model_of(model: PeftModel | PreTrainedModel) -> PreTrainedModel:
    """Return the transformers model inside a PeftModel, or the model itself."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return cast(PreTrainedModel, base)


def largest_difference(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the largest difference of pairs of logits, in standard deviations of the second ones; infinite for NaN."""
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
    """Return how much the loss and the gradient of two paths differ, relative to 1 + loss and to the norm of the gradient."""
    (loss, gradients), (other_loss, others) = plain, cached
    missing = gradients.keys() ^ others.keys()
    squares = [
        (others[name] - gradient).square().sum()
        for name, gradient in gradients.items()
        if name not in missing
    ]
    length = stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt()
    loss_difference = abs(other_loss - loss) / (1 + abs(loss))
    gradient_difference = (stack(squares).sum().sqrt() / length).item()
    difference = max(loss_difference, gradient_difference)
    return math.inf if missing or math.isnan(difference) else difference


def describe(error: BaseException) -> str:
    """Return the type and message of an error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def error_of(attempt: Callable[[], Any]) -> str | None:
    """Call `attempt`, and return a description of the error that it raises, or None."""
    try:
        attempt()
    except Exception as error:
        return describe(error)
    return None


@contextmanager
def changed_tokens(layers: Sequence[BaftLayer]) -> Iterator[dict[str, list[Tensor]]]:
    """Record the mask (rows, tokens) of tokens that each BaftLayer changes, for each of its calls."""
    changed: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}

    def record(layer: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        changed[layer.name].append((args[0] != out).any(-1).cpu())

    with ExitStack() as hooks:
        for layer in layers:
            hooks.enter_context(layer.register_forward_hook(record))
        yield changed


@contextmanager
def reasons_for_plain_path() -> Iterator[list[str]]:
    """Collect the logged reasons for which edits do not use the cached path, instead of logging them."""
    reasons: list[str] = []

    def collect(record: logging.LogRecord) -> bool:
        error = record.args[-1] if isinstance(record.args, tuple) and record.args else record.msg
        reasons.append(describe(error) if isinstance(error, Exception) else str(error))
        return False

    forward_logger.addFilter(collect)
    level = forward_logger.level
    forward_logger.setLevel(logging.INFO)
    try:
        yield reasons
    finally:
        forward_logger.setLevel(level)
        forward_logger.removeFilter(collect)


@contextmanager
def requires_grad_restored(model: nn.Module) -> Iterator[None]:
    """Restore `requires_grad` of all parameters on exit, since PEFT changes it when adapters are added or removed."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
