"""The terms of the objective (Sec. 2.4), held against loops, hand-worked values and signs."""

# mypy: disable-error-code="index, union-attr"
from __future__ import annotations

import pytest
import torch
from torch import Tensor

from peft_baft.losses import (
    answer_losses,
    load_balance,
    locality_margin,
    mean_over_blocks,
    rescaled,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def no_history(r: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(r), torch.tensor(0.0)


# --- answers --------------------------------------------------------------------------------------------------------


def test_an_answer_loss_is_the_surprise_at_its_token() -> None:
    logits, tokens = draw(6, 7).float() * 4, torch.tensor([3, 4, 6, 1, 2, 5])
    surprises = [-logits[i].log_softmax(-1)[token] for i, token in enumerate(tokens)]
    torch.testing.assert_close(answer_losses(logits, tokens), torch.stack(surprises))


@pytest.mark.parametrize(
    ("given", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_answer_losses_are_computed_in_float32_at_least(
    given: torch.dtype, computed: torch.dtype
) -> None:
    assert answer_losses(draw(2, 7).to(given), torch.tensor([2, 3])).dtype == computed


# --- load balance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [0.1, 0.9])
def test_the_balance_is_zero_exactly_where_all_gates_are_used_alike(level: float) -> None:
    even = torch.full((5, 4), level)
    assert load_balance(even, *no_history(4)) == pytest.approx(0, abs=1e-6)
    uneven = even + torch.tensor([0.05, -0.05, 0.0, 0.0])
    assert load_balance(uneven, *no_history(4)) > 1e-4
    swapped = torch.tensor([[0.2, 0.8], [0.8, 0.2]])  # what counts is the mean use, not each token
    assert load_balance(swapped, *no_history(2)) == pytest.approx(0, abs=1e-6)


def test_the_balance_has_the_value_worked_by_hand() -> None:
    # Mean use 0.3 and 0.6, mean 0.45: 2 * 0.15² / (1 * 0.45).
    w = torch.tensor([[0.2, 0.4], [0.4, 0.8]])
    assert load_balance(w, *no_history(2)) == pytest.approx(0.1)


def test_the_balance_counts_past_edits() -> None:
    past, present = draw(6, 3, seed=1), draw(2, 3, seed=2)
    together = load_balance(torch.cat([past, present]), torch.zeros(3), torch.tensor(0.0))
    torch.testing.assert_close(load_balance(present, past.sum(0), torch.tensor(6.0)), together)
    opposite = torch.tensor([[1.0, 0.0]]), torch.tensor([0.0, 1.0]), torch.tensor(1.0)
    assert load_balance(*opposite) == 0 < load_balance(opposite[0], *no_history(2))


def test_only_the_present_edit_carries_a_gradient_and_it_is_the_formulas() -> None:
    w, past, count = (
        draw(2, 3).requires_grad_(),
        (4 * draw(3, seed=1)).requires_grad_(),
        torch.tensor(4.0),
    )
    load_balance(w, past, count).backward()
    assert past.grad is None
    r, n = 3, 6
    use = (past.detach() + w.detach().sum(0)) / n
    mean = use.mean()
    spread = (use - mean).square().sum()
    # D/d use of Σ(use - mean)² / ((r - 1) mean).
    by_use = (2 * (use - mean) / mean - spread / (r * mean**2)) / (r - 1)
    torch.testing.assert_close(w.grad, (by_use / n).expand(2, 3))


def test_a_step_down_the_balance_closes_the_gates_that_are_used_most() -> None:
    w = torch.tensor([[0.9, 0.5, 0.1]], requires_grad=True)
    load_balance(w, *no_history(3)).backward()
    assert w.grad[0, 0] > 0 > w.grad[0, 2]


def test_a_single_gate_is_in_balance_and_its_gradient_is_zero() -> None:
    w = draw(4, 1).requires_grad_()
    term = load_balance(w, *no_history(1))
    term.backward()
    assert term == 0 and not w.grad.any()


def test_closed_gates_give_a_finite_balance() -> None:
    w = torch.zeros(2, 3, requires_grad=True)
    load_balance(w, *no_history(3)).backward()
    assert w.grad.isfinite().all()


# --- locality margins -------------------------------------------------------------------------------------------------

ALPHA, BETA, GAMMA = 0.1, 0.5, 0.3


def test_met_margins_cost_nothing() -> None:
    edit, unrelated = torch.full((2, 3), 0.6), torch.full((4, 3), 0.05)
    assert locality_margin(edit, unrelated, ALPHA, BETA, GAMMA) == 0
    for broken in [(edit - 0.2, unrelated), (edit, unrelated + 0.1), (edit, unrelated + 0.5)]:
        assert locality_margin(*broken, ALPHA, BETA, GAMMA) > 0


def test_the_margins_have_the_value_worked_by_hand() -> None:
    edit, unrelated = torch.tensor([[0.3, 0.7]]), torch.tensor([[0.0, 0.2], [0.6, 0.0]])
    above, below = (0.1 + 0.5) / 4, 0.2 / 2  # unrelated gates over α, edit gates under β
    apart = (0.0 + 0.2) / 2  # gaps 0.5 and 0.1 of the largest gates, where 0.3 is wanted
    assert locality_margin(edit, unrelated, ALPHA, BETA, GAMMA) == pytest.approx(
        above + below + apart
    )


def test_every_pair_of_tokens_is_kept_apart() -> None:
    edit, unrelated = draw(3, 2, seed=1), draw(4, 2, seed=2)
    gaps = [edit[i].max() - unrelated[j].max() for i in range(3) for j in range(4)]
    expected = torch.stack([torch.clamp(GAMMA - gap, min=0) for gap in gaps]).mean()
    torch.testing.assert_close(locality_margin(edit, unrelated, 1.0, 0.0, GAMMA), expected)


def test_a_step_down_the_margins_opens_gates_on_the_edit_and_closes_them_elsewhere() -> None:
    edit, unrelated = (
        torch.full((2, 3), 0.4, requires_grad=True),
        torch.full((4, 3), 0.3, requires_grad=True),
    )
    locality_margin(edit, unrelated, ALPHA, BETA, GAMMA).backward()
    assert (edit.grad < 0).all() and (unrelated.grad > 0).all()


# --- how the terms are put together -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("term", "reference"), [(0.2, 3.0), (5.0, 0.1)])
def test_a_rescaled_term_has_the_magnitude_of_its_reference(term: float, reference: float) -> None:
    brought = rescaled(torch.tensor(term), torch.tensor(reference), 100.0)
    assert brought == pytest.approx(reference)


def test_the_factor_is_a_constant_to_the_gradient() -> None:
    x, y = torch.tensor(0.5, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    rescaled(x.square(), y.square(), 100.0).backward()
    # Factor times the term's own gradient.
    assert y.grad is None and x.grad == pytest.approx(4.0 / 0.25 * 2 * 0.5)


def test_the_factor_has_a_ceiling() -> None:
    small = torch.tensor(1e-3)
    assert rescaled(small, torch.tensor(1.0), 10.0) == pytest.approx(1e-2)
    assert rescaled(small, torch.tensor(1.0), 1e4) == pytest.approx(1.0)


@pytest.mark.parametrize("reference", [0.0, 1.0])
def test_a_term_that_is_met_stays_zero_and_finite(reference: float) -> None:
    term = torch.zeros((), requires_grad=True)
    brought = rescaled(term, torch.tensor(reference), 10.0)
    brought.backward()
    assert brought == 0 and term.grad.isfinite()


def test_blocks_count_alike() -> None:
    assert mean_over_blocks([torch.tensor(1.0), torch.tensor(2.0), torch.tensor(6.0)]) == 3.0
