"""What an edit by BaFT minimises (Sec. 2.4): teacher forcing, load balance of the gates, locality margins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from peft_baft.editing.train import STOP_TERM, Terms
from peft_baft.losses import locality_margin
from peft_baft.regularisers import load_balance, mean_over_blocks, rescaled

Gates = Mapping[str, tuple[Tensor, Tensor]]  # by block: (n, k) at edited tokens, (m, k) at those of unrelated text


@dataclass(frozen=True)
class Objective:
    """The regularisers' settings.

    The two regularisers are brought to the magnitude of the teacher forcing loss (Eq. 4) by a factor that is constant to
    the gradient: teacher forcing / term, at most `ceiling`.

    Args:
        alpha: gates stay below this on unrelated text. beta: gates stay above this on the edit. gamma: margin between the
            most open gate on the edit and on unrelated text.
        balance: weight of the load balance, locality: weight of the margins; 0 leaves a term out.
        balance_ceiling, locality_ceiling: the largest factor of the rescaling.
    """

    alpha: float = 0.01
    beta: float = 0.05
    gamma: float = 0.02
    balance: float = 1.0
    locality: float = 1.0
    balance_ceiling: float = 1.0
    locality_ceiling: float = 10.0

    def terms(self, fit: Tensor, gates: Gates, loads: Mapping[str, Tensor], several: bool, unrelated: bool) -> Terms:
        """The terms for one adapter.

        Args:
            fit: the teacher forcing loss. loads: (k + 1,) statistics of the gates' use, by the name of the block.
            several: whether a block has more than one gate. unrelated: whether there are unrelated texts.
        """
        terms = {STOP_TERM: fit}
        if not loads:
            return terms
        pairs = [(edit.to(loads[n].device), off.to(loads[n].device), loads[n]) for n, (edit, off) in gates.items()]
        if self.balance and several:
            spread = mean_over_blocks([load_balance(edit, load[:-1], load[-1]) for edit, _, load in pairs])
            terms["balance"] = self.balance * rescaled(spread, fit, self.balance_ceiling)
        if self.locality and unrelated:
            margins = (self.alpha, self.beta, self.gamma)
            locality = mean_over_blocks([locality_margin(edit, off, *margins) for edit, off, _ in pairs])
            terms["locality"] = self.locality * rescaled(locality, fit, self.locality_ceiling)
        return terms
