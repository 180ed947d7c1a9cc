"""The one gradient loop: AdamW on named losses, until the answers are learned."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from peft_baft.editing.editor import EditResult
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
        learn_end: whether the end of the answer is learned with it, so that a free reply says the answer and stops: the end
            of the assistant's turn in a chat, a line break in raw text. Teacher-forced scores leave the end out.

    Raises:
        TypeError: max_steps is not an integer, or learn_end not a bool. ValueError: a value is out of its range.
    """

    lr: float = 2e-3
    max_steps: int = 40
    stop_loss: float = 0.01
    weight_decay: float = 0.01
    clip_norm: float | None = None
    learn_end: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.max_steps, bool) or not isinstance(self.max_steps, int):
            raise TypeError(f"max_steps must be an integer, not {self.max_steps!r}.")
        if not isinstance(self.learn_end, bool):
            raise TypeError(f"learn_end must be True or False, not {self.learn_end!r}.")
        for name in ("lr", "max_steps", "clip_norm"):
            value = getattr(self, name)
            if not (value is None and name == "clip_norm") and not 0 < value < float("inf"):
                raise ValueError(f"{name} must be above 0 and finite, not {value!r}.")
        for name in ("stop_loss", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{name} must be 0 or above and finite, not {getattr(self, name)!r}."
                )


FUSED = ("cpu", "cuda")  # devices for which torch has AdamW in one kernel
STOP_TERM = "teacher_forcing"
CONTRAST_TERM = "contrast"
Terms = dict[str, Tensor]  # named losses, summed as they are


class Descent:
    """One descent, a step at a time, so that several can share a forward and a backward.

    Args:
        bounds: what further terms must be below, by name, for the descent to end before its last step.
        betas: of AdamW; by default torch's.

    Attributes:
        parameters: what is changed.
        result: what the descent came to, once it is over.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        config: DescentConfig,
        bounds: Mapping[str, float] | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self.parameters, self.config, self.bounds = list(parameters), config, dict(bounds or {})
        self.result: EditResult | None = None
        # A new optimiser for each edit (App. C): what it remembers of the last edit would push this one.
        self._optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.lr,
            betas=betas,
            weight_decay=config.weight_decay,
            fused=all(p.device.type in FUSED and p.is_floating_point() for p in self.parameters),
        )
        self._steps, self._seconds = 0, 0.0

    def record_losses(self, losses: dict[str, float], seconds: float) -> None:
        """Take the terms' values at the present parameters; end the descent if they are small enough, or were the last.

        Args:
            seconds: this descent's share of the time since the last call.

        Raises:
            FloatingPointError: a term, or a parameter in the end, is not finite.
        """
        self._seconds += seconds
        _require_finite(losses, self._steps)
        learned = losses[STOP_TERM] < self.config.stop_loss
        small = all(losses.get(name, 0.0) <= bound for name, bound in self.bounds.items())
        if (learned and small) or self._steps == self.config.max_steps:
            _require_finite({"a parameter": _first_not_finite(self.parameters)}, self._steps)
            self.result = EditResult(self._steps, losses, self._seconds, learned)

    def step(self) -> None:
        """Change the parameters along their gradients, and clear these."""
        if self.config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.config.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._steps += 1


def descend(
    descents: Sequence[Descent],
    losses: Callable[[Sequence[Descent]], Sequence[Terms]],
    processes: Processes | None = None,
) -> list[EditResult]:
    """Minimise the sum of each descent's terms until its `teacher_forcing` is below its stop loss.

    The descents share no parameter, and each comes out as if it were alone.

    Args:
        losses: gives the terms of each of some descents, at the present parameters.
        processes: each of them has the whole terms, and gradients of its own part; the first one says when it is over.

    Raises:
        FloatingPointError: a term, or a parameter in the end, is not finite. The parameters are left where they were at that
            moment; roll back.
    """
    processes = processes or Processes()
    running, begin = list(descents), time.perf_counter()
    while running:
        # The losses are looked at before each step and after the last one, so that a fact that is known takes no step.
        terms, now = losses(running), time.perf_counter()
        values = processes.on_main(partial(_fetch_values, terms))
        for descent, own_values in zip(running, values, strict=True):
            descent.record_losses(own_values, (now - begin) / len(running))
        left = [i for i, descent in enumerate(running) if descent.result is None]
        running, begin = [running[i] for i in left], now
        if running:
            total = _stacked([terms[i] for i in left]).sum()
            parameters = [parameter for descent in running for parameter in descent.parameters]
            processes.backward(total, parameters)
            for descent in running:
                descent.step()
    return [descent.result for descent in descents if descent.result is not None]


def _fetch_values(terms: Sequence[Terms]) -> list[dict[str, float]]:
    """Fetch the values of all terms from the device in one go."""
    values = iter(_stacked(terms).tolist())
    return [{name: next(values) for name in own_terms} for own_terms in terms]


def _stacked(terms: Sequence[Terms]) -> Tensor:
    device = terms[0][STOP_TERM].device
    return torch.stack([term.to(device) for own_terms in terms for term in own_terms.values()])


def _first_not_finite(parameters: Iterable[nn.Parameter]) -> float:
    """Find a NaN or infinity among the parameters; 0 if there is none."""
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
