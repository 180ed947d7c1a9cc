"""The one gradient loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from peft_baft.processes import Processes


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


FUSED = ("cpu", "cuda")  # devices for which torch has AdamW in one kernel
STOP_TERM = "teacher_forcing"
Terms = dict[str, Tensor]  # named losses, summed as they are


class Descent:
    """One descent, a step at a time, so that several can share a forward and a backward.

    Attributes:
        outcome: what it came to, once it is over.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], config: DescentConfig) -> None:
        self.parameters, self.config = list(parameters), config
        self.outcome: Outcome | None = None
        self._optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.lr,
            weight_decay=config.weight_decay,
            fused=all(p.device.type in FUSED and p.is_floating_point() for p in self.parameters),
        )
        self._steps, self._seconds = 0, 0.0

    def weigh(self, values: dict[str, float], seconds: float) -> None:
        """Look at the terms at the present parameters; the descent is over if they are small enough, or were the last.

        Args:
            seconds: this descent's share of the time since it last looked.

        Raises:
            FloatingPointError: a term, or a parameter in the end, is not finite.
        """
        self._seconds += seconds
        _require_finite(values, self._steps)
        learned = values[STOP_TERM] < self.config.stop_loss
        if learned or self._steps == self.config.max_steps:
            _require_finite({"a parameter": _first_not_finite(self.parameters)}, self._steps)
            self.outcome = Outcome(self._steps, values, self._seconds, learned)

    def step(self) -> None:
        """Follow the gradients, and forget them."""
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._steps += 1


def descend(
    parameters: Iterable[nn.Parameter],
    losses: Callable[[], Terms],
    config: DescentConfig,
    processes: Processes | None = None,
) -> Outcome:
    """Minimise the sum of named losses until `teacher_forcing` is below the stop loss.

    Args:
        parameters: what to change. losses: the terms, at the present parameters.
        processes: each of them has the whole terms, and gradients of its own part; the first one says when it is over.

    Raises:
        FloatingPointError: a term, or a parameter in the end, is not finite. The parameters are left where
            they were at that moment; roll back.
    """
    return descend_together([Descent(parameters, config)], lambda _: [losses()], processes)[0]


def descend_together(
    descents: Sequence[Descent],
    losses: Callable[[Sequence[Descent]], Sequence[Terms]],
    processes: Processes | None = None,
) -> list[Outcome]:
    """Bring descents that share no parameter to their ends, each as if it were alone.

    Args:
        losses: the terms of each of some descents, at the present parameters.
        processes: as for `descend`.

    Raises:
        FloatingPointError: one of them came to a number that is not finite.
    """
    processes = processes or Processes()
    going, begin = list(descents), time.perf_counter()
    while going:
        terms, now = losses(going), time.perf_counter()
        for one, values in zip(going, processes.of_first(partial(_read, terms)), strict=True):
            one.weigh(values, (now - begin) / len(going))
        left = [i for i, one in enumerate(going) if one.outcome is None]
        going, begin = [going[i] for i in left], now
        if going:
            total = _stacked([terms[i] for i in left]).sum()
            processes.backward(total, [parameter for one in going for parameter in one.parameters])
            for one in going:
                one.step()
    return [one.outcome for one in descents if one.outcome is not None]


def _read(terms: Sequence[Terms]) -> list[dict[str, float]]:
    """The values of all terms, fetched from the device in one go."""
    values = iter(_stacked(terms).tolist())
    return [{name: next(values) for name in own} for own in terms]


def _stacked(terms: Sequence[Terms]) -> Tensor:
    device = terms[0][STOP_TERM].device
    return torch.stack([term.to(device) for own in terms for term in own.values()])


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
