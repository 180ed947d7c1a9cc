"""The one gradient loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class DescentConfig:
    """How an edit is trained: AdamW, made anew for each edit (App. C).

    Args:
        lr: learning rate.
        max_steps: at most so many steps; the paper takes 40 for an edit, 70 for a batch.
        stop_loss: stop once the mean cross entropy of the answers is below this; the paper takes 0.01.
        weight_decay: of AdamW.
        clip_norm: bound on the norm of all gradients together; None for no bound.

    Raises:
        TypeError: max_steps is not an integer. ValueError: a value is out of its range.
    """

    lr: float = 2e-3
    max_steps: int = 40
    stop_loss: float = 0.01
    weight_decay: float = 0.01
    clip_norm: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.max_steps, bool) or not isinstance(self.max_steps, int):
            raise TypeError(f"max_steps must be an integer, not {self.max_steps!r}.")
        for name in ("lr", "max_steps", "clip_norm"):
            value = getattr(self, name)
            if not (value is None and name == "clip_norm") and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be above 0 and finite, not {value!r}.")
        for name in ("stop_loss", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or above and finite, not {getattr(self, name)!r}.")


@dataclass(frozen=True)
class Outcome:
    """What an edit cost and how far it came.

    Attributes:
        steps: optimiser steps taken. losses: each term at the last evaluation, by name. seconds: wall time.
        learned: the answers' mean cross entropy fell below the stop loss.
    """

    steps: int
    losses: dict[str, float]
    seconds: float
    learned: bool = field(default=False)


STOP_TERM = "teacher_forcing"


def descend(
    parameters: Iterable[nn.Parameter], losses: Callable[[], dict[str, Tensor]], config: DescentConfig
) -> Outcome:
    """Minimise the sum of named losses until `teacher_forcing` is below the stop loss.

    Args:
        parameters: what to change. losses: the terms, at the present parameters; summed as they are.

    Raises:
        FloatingPointError: a term, or a parameter in the end, is not finite. The parameters are left where
            they were at that moment; roll back.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    begin = time.perf_counter()
    for step in range(config.max_steps + 1):
        terms = losses()
        values = {name: term.item() for name, term in terms.items()}
        _require_finite(values, step)
        learned = values[STOP_TERM] < config.stop_loss
        if learned or step == config.max_steps:
            _require_finite({"a parameter": _first_not_finite(parameters)}, step)
            return Outcome(step, values, time.perf_counter() - begin, learned)
        optimizer.zero_grad()
        torch.stack([term.to(terms[STOP_TERM].device) for term in terms.values()]).sum().backward()
        if config.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        optimizer.step()
    raise AssertionError("unreachable: the last step returns")


def _first_not_finite(parameters: Iterable[nn.Parameter]) -> float:
    """A NaN or infinity among the parameters; 0 if there is none."""
    for parameter in parameters:
        if not parameter.isfinite().all():
            return parameter[~parameter.isfinite()][0].item()
    return 0.0


def _require_finite(values: dict[str, float], step: int) -> None:
    broken = [name for name, value in values.items() if not abs(value) < float("inf")]
    if broken:
        raise FloatingPointError(
            f"{', '.join(broken)} became {values[broken[0]]} at step {step}; the edit was stopped and the adapter is "
            "as it was. A smaller learning rate may help, or a base model in float32 or bfloat16 instead of float16."
        )
