"""The objective puts the paper's terms together: each from its own statistics, weighted, and brought to one magnitude."""

from __future__ import annotations

import pytest
import torch

from peft_baft import Objective
from peft_baft.losses import load_balance, locality_margin

GENERATOR = torch.Generator().manual_seed(0)
GATES = {
    name: (torch.rand(5, 3, generator=GENERATOR), torch.rand(4, 3, generator=GENERATOR))
    for name in ("a", "b")
}
USAGE = {"a": torch.tensor([1.0, 2.0, 6.0, 9.0]), "b": torch.tensor([3.0, 1.0, 1.0, 8.0])}
ANSWER_LOSS = torch.tensor(1e-3)


def test_every_block_is_balanced_with_its_own_past_use() -> None:
    objective = Objective(balance=0.5, locality=0.0, balance_ceiling=1e-2)
    terms = objective.terms(ANSWER_LOSS, GATES, USAGE, several_gates=True, unrelated=True)
    spreads = []
    for name, (on_facts, _) in GATES.items():
        sums, count = USAGE[name][:3], USAGE[name][3]
        spreads.append(load_balance(on_facts, sums, count))
    mean = torch.stack(spreads).mean()
    factor = min(ANSWER_LOSS / mean, torch.tensor(1e-2))
    assert terms.keys() == {"teacher_forcing", "balance"}
    assert terms["teacher_forcing"] is ANSWER_LOSS
    assert terms["balance"].item() == pytest.approx((0.5 * factor * mean).item())


def test_the_margins_use_the_objectives_bounds() -> None:
    objective = Objective(alpha=0.2, beta=0.7, gamma=0.3, balance=0.0, locality=2.0)
    terms = objective.terms(ANSWER_LOSS, GATES, USAGE, several_gates=True, unrelated=True)
    margins = [locality_margin(edit, other, 0.2, 0.7, 0.3) for edit, other in GATES.values()]
    mean = torch.stack(margins).mean()
    factor = min(ANSWER_LOSS / mean, torch.tensor(10.0))
    assert terms.keys() == {"teacher_forcing", "locality"}
    assert terms["locality"].item() == pytest.approx((2 * factor * mean).item())
