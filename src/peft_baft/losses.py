"""Teacher forcing and locality (arXiv 2503.00306, Sec. 2.4); the load balance is in `regularisers.py`. Torch only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def answer_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Compute the cross entropy of each answer token, given the tokens before it; their mean is the teacher forcing loss.

    Args:
        logits: (n, vocabulary) what is predicted in the place of each token; any floating dtype. tokens: (n,).

    Returns:
        (n,) float32 (float64 for float64 logits).
    """
    precise = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(precise, tokens, reduction="none")


def locality_margin(
    w: Tensor, w_unrelated: Tensor, alpha: float, beta: float, gamma: float
) -> Tensor:
    """Compute the locality regulariser R_loc: gates below α on unrelated text, above β on the edit, their maxima γ apart.

    relu(w(h_ir) - α) + relu(β - w(h)) + relu(γ - (max_k w(h) - max_k w(h_ir))), the first two averaged over tokens and
    gates, the third over all pairs of an edited and an unrelated token.

    Args:
        w: (n, r) gates at the edited tokens; w_unrelated: (m, r) gates at the tokens of unrelated text.
    """
    gap = w.amax(-1)[:, None] - w_unrelated.amax(-1)[None, :]
    return F.relu(w_unrelated - alpha).mean() + F.relu(beta - w).mean() + F.relu(gamma - gap).mean()
