"""The training loop: AdamW on named losses, until the answers are learned."""

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
    """Optimiser settings of an edit. Each edit uses a new AdamW optimiser (App. C).

    Args:
        lr: learning rate.
        max_steps: maximum number of steps; in the paper 40 for one edit and 70 for a batch.
        stop_loss: stop once the mean cross entropy of the answers is below this; in the paper 0.01.
        weight_decay: weight decay of AdamW.
        clip_norm: maximum total norm of the gradients; None for no clipping.
        learn_end: whether the end of the answer is trained as well, so that a generated reply stops after the answer: the end
            of the assistant's turn in a chat, a line break in raw text. Teacher-forced scores do not include the end.

    Raises:
        TypeError: max_steps is not an integer, or learn_end is not a bool. ValueError: a value is out of range.
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


FUSED = ("cpu", "cuda")  # devices with a fused AdamW kernel
STOP_TERM = "teacher_forcing"
CONTRAST_TERM = "contrast"
Terms = dict[str, Tensor]  # named losses; their unweighted sum is minimised


class Descent:
    """The optimisation of one set of parameters, run step by step so that several can share forward and backward passes.

    Args:
        bounds: by name, the values that other terms must not exceed for an early stop.
        betas: the betas of AdamW.

    Attributes:
        parameters: the parameters that are optimised.
        result: the result; None until the descent has ended.
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
        # Each edit gets a new optimiser (App. C), so that the moments of the last edit do not affect it.
        self._optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.lr,
            betas=betas,
            weight_decay=config.weight_decay,
            fused=all(p.device.type in FUSED and p.is_floating_point() for p in self.parameters),
        )
        self._steps, self._seconds = 0, 0.0

    def record_losses(self, losses: dict[str, float], seconds: float) -> None:
        """Record the terms' values at the current parameters; end the descent if they are small enough or no step is left.

        Args:
            seconds: this descent's share of the time since the last call.

        Raises:
            FloatingPointError: a term, or on the last call a parameter, is not finite.
        """
        self._seconds += seconds
        _require_finite(losses, self._steps)
        learned = losses[STOP_TERM] < self.config.stop_loss
        small = all(losses.get(name, 0.0) <= bound for name, bound in self.bounds.items())
        if (learned and small) or self._steps == self.config.max_steps:
            _require_finite({"a parameter": _first_not_finite(self.parameters)}, self._steps)
            self.result = EditResult(self._steps, losses, self._seconds, learned)

    def step(self) -> None:
        """Take one optimiser step and clear the gradients."""
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
    """Minimise the sum of each descent's terms until its `teacher_forcing` term is below its stop loss.

    The descents share no parameters, so each gives the same result as it would without the others.

    Args:
        losses: computes the terms of each of the given descents at the current parameters.
        processes: the processes that share the work. Each has the values of all terms and the gradients of its part; the
            first process decides when a descent ends.

    Raises:
        FloatingPointError: a term, or a final parameter, is not finite. The parameters keep their current values; the caller
            must restore them.
    """
    processes = processes or Processes()
    running, begin = list(descents), time.perf_counter()
    while running:
        # The losses are checked before each step and after the last one, so that a known fact takes no step.
        terms, now = losses(running), time.perf_counter()
        values = processes.on_main(partial(_fetch_values, terms))
        for descent, own_values in zip(running, values, strict=True):
            descent.record_losses(own_values, (now - begin) / len(running))
        unfinished = [i for i, descent in enumerate(running) if descent.result is None]
        running, begin = [running[i] for i in unfinished], now
        if running:
            total = _stacked([terms[i] for i in unfinished]).sum()
            parameters = [parameter for descent in running for parameter in descent.parameters]
            processes.backward(total, parameters)
            for descent in running:
                descent.step()
    return [descent.result for descent in descents if descent.result is not None]


def _fetch_values(terms: Sequence[Terms]) -> list[dict[str, float]]:
    """Copy the values of all terms from the device in one transfer."""
    values = iter(_stacked(terms).tolist())
    return [{name: next(values) for name in own_terms} for own_terms in terms]


def _stacked(terms: Sequence[Terms]) -> Tensor:
    """Stack the terms of all descents, (terms,), on one device."""
    device = terms[0][STOP_TERM].device
    return torch.stack([term.to(device) for own_terms in terms for term in own_terms.values()])


def _first_not_finite(parameters: Iterable[nn.Parameter]) -> float:
    """Return the first NaN or infinity among the parameters; 0 if there is none."""
    for parameter in parameters:
        if not parameter.isfinite().all():
            return parameter[~parameter.isfinite()][0].item()
    return 0.0


def _require_finite(values: dict[str, float], step: int) -> None:
    broken = [name for name, value in values.items() if not abs(value) < float("inf")]
    if broken:
        raise FloatingPointError(
            f"{', '.join(broken)} became {values[broken[0]]} at step {step}; the edit was stopped and the adapter restored. "
            "A smaller learning rate may help, or a base model in float32 or bfloat16 instead of float16."
        )
