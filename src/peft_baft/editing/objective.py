"""The training objective of BaFT (Sec. 2.4): teacher forcing, load balance of the gates, locality margins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from peft_baft.editing.train import STOP_TERM, Terms
from peft_baft.losses import load_balance, locality_margin, mean_over_blocks, rescaled


@dataclass(frozen=True)
class Objective:
    """Settings of the two regularisers.

    Each regulariser is rescaled to the magnitude of the teacher-forcing loss (Eq. 4) by the factor teacher forcing / term,
    capped at its ceiling. No gradient flows through the factor.

    Args:
        alpha: upper bound of the gates on unrelated text. beta: lower bound of the gates on the edit. gamma: margin between
            the most open gate on the edit and the most open gate on unrelated text.
        balance: weight of the load balance. locality: weight of the margins. A weight of 0 removes the term.
        balance_ceiling, locality_ceiling: upper bounds of the rescaling factors.
    """

    alpha: float = 0.01
    beta: float = 0.05
    gamma: float = 0.02
    balance: float = 1.0
    locality: float = 1.0
    balance_ceiling: float = 1.0
    locality_ceiling: float = 10.0

    def terms(
        self,
        answer_loss: Tensor,
        gates: Mapping[str, tuple[Tensor, Tensor]],
        gate_usage: Mapping[str, Tensor],
        *,
        several_gates: bool,
        unrelated: bool,
    ) -> Terms:
        """Compute the terms for one adapter.

        Args:
            answer_loss: () the teacher-forcing loss.
            gates: the gates at the edited tokens by block name: (n, k) for the facts and (m, k) for the unrelated texts.
            gate_usage: sums of past gate values by block, (k + 1,); the last entry is the number of tokens in the sums. Empty
                for an adapter without gates.
            several_gates: whether a block has more than one gate.
            unrelated: whether there are unrelated texts.
        """
        terms = {STOP_TERM: answer_loss}
        balances, localities = [], []
        for block, usage in gate_usage.items():
            on_facts, on_unrelated = (w.to(usage.device) for w in gates[block])
            if self.balance and several_gates:
                balances.append(load_balance(on_facts, usage[:-1], usage[-1]))
            if self.locality and unrelated:
                localities.append(
                    locality_margin(on_facts, on_unrelated, self.alpha, self.beta, self.gamma)
                )
        if balances:
            balance = rescaled(mean_over_blocks(balances), answer_loss, self.balance_ceiling)
            terms["balance"] = self.balance * balance
        if localities:
            locality = rescaled(mean_over_blocks(localities), answer_loss, self.locality_ceiling)
            terms["locality"] = self.locality * locality
        return terms
