"""The gradient loop by itself: where it stops, how many steps it takes, and which optimiser takes them."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_baft import DescentConfig
from peft_baft.editing.train import STOP_TERM, Descent, descend


def losses_of(parameter: nn.Parameter, values: Sequence[float]) -> tuple[Any, list[int]]:
    """A loss that has these values in turn, the last one ever after, and a slope of 1; the list counts its evaluations."""
    evaluations: list[int] = []

    def losses(_: Sequence[Descent]) -> list[dict[str, Tensor]]:
        value = values[min(len(evaluations), len(values) - 1)]
        evaluations.append(1)
        return [{STOP_TERM: (parameter - parameter.detach()).sum() + value}]

    return losses, evaluations


@pytest.mark.parametrize("value", [0.5, 0.75])
def test_a_loss_at_the_bound_or_above_is_not_learned(value: float) -> None:
    parameter = nn.Parameter(torch.ones(1))
    losses, evaluations = losses_of(parameter, [value])
    (result,) = descend([Descent([parameter], DescentConfig(max_steps=3, stop_loss=0.5))], losses)
    assert not result.learned and result.steps == 3 and len(evaluations) == 4


def test_a_loss_below_the_bound_is_learned_at_once() -> None:
    parameter = nn.Parameter(torch.ones(1))
    losses, evaluations = losses_of(parameter, [0.5 - 2**-12])
    (result,) = descend([Descent([parameter], DescentConfig(max_steps=3, stop_loss=0.5))], losses)
    assert result.learned and result.steps == 0 and len(evaluations) == 1
    assert parameter.item() == 1


@pytest.mark.parametrize("steps", [1, 4])
def test_as_many_steps_are_taken_as_allowed_and_no_more(steps: int) -> None:
    parameter = nn.Parameter(torch.ones(1))
    losses, evaluations = losses_of(parameter, [1.0])
    (result,) = descend(
        [Descent([parameter], DescentConfig(lr=0.01, max_steps=steps, weight_decay=0.0))], losses
    )
    assert result.steps == steps and len(evaluations) == steps + 1
    # Adam's step is lr where the slope is constant
    assert parameter.item() == pytest.approx(1 - 0.01 * steps, abs=1e-5)


def test_what_the_last_step_reached_counts() -> None:
    parameter = nn.Parameter(torch.ones(1))
    losses, _ = losses_of(parameter, [1.0, 1.0, 0.25])
    (result,) = descend([Descent([parameter], DescentConfig(max_steps=2, stop_loss=0.5))], losses)
    assert result.learned and result.steps == 2 and result.losses == {STOP_TERM: 0.25}


def test_a_stop_loss_of_zero_is_never_reached() -> None:
    parameter = nn.Parameter(torch.ones(1))
    losses, _ = losses_of(parameter, [0.0])
    (result,) = descend([Descent([parameter], DescentConfig(max_steps=2, stop_loss=0.0))], losses)
    assert not result.learned and result.steps == 2


def stand_in(device: str, floating: bool = True) -> Any:
    """What the choice of the optimiser looks at, also for a device that this machine does not have."""
    return SimpleNamespace(device=torch.device(device), is_floating_point=lambda: floating)


@pytest.mark.parametrize(
    ("parameters", "fused"),
    [
        ([stand_in("cpu")], True),
        ([stand_in("cuda"), stand_in("cuda", floating=True)], True),
        ([stand_in("cpu"), stand_in("cuda")], True),
        ([stand_in("mps")], False),
        ([stand_in("xla")], False),
        ([stand_in("meta")], False),
        ([stand_in("cuda"), stand_in("meta")], False),
        ([stand_in("cpu", floating=False)], False),
        ([stand_in("cpu"), stand_in("cpu", floating=False)], False),
    ],
    ids=lambda value: (
        "-".join(f"{p.device}{'' if p.is_floating_point() else '-complex'}" for p in value)
        if isinstance(value, list)
        else None
    ),
)
def test_one_kernel_takes_the_step_where_every_parameter_allows_it(
    parameters: list[Any], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[bool] = []
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda _, **settings: chosen.append(settings["fused"])
    )
    Descent(parameters, DescentConfig())
    assert chosen == [fused]


def test_parameters_that_no_kernel_takes_are_trained_all_the_same() -> None:
    """torch refuses fused=True for complex numbers: the plain optimiser takes the step."""
    parameter = nn.Parameter(torch.ones(1, dtype=torch.complex64))
    descent = Descent([parameter], DescentConfig(lr=0.1))
    parameter.real.sum().backward()
    descent.step()
    assert parameter.real.item() < 1


def test_the_time_of_a_descent_is_the_sum_of_what_it_was_told() -> None:
    descent = Descent([nn.Parameter(torch.ones(1))], DescentConfig(max_steps=2, stop_loss=0.0))
    for seconds in (0.25, 0.5, 0.125):
        assert descent.result is None
        descent.record_losses({STOP_TERM: 1.0}, seconds)
        descent.step()
    assert descent.result is not None and descent.result.seconds == 0.875
