"""The losses of arXiv 2503.00306 (Sec. 2.4): teacher forcing, locality, load balance, and their scaling (Eq. 4). Torch only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def answer_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Compute the cross entropy of each answer token given the tokens before it. The mean is the teacher forcing loss.

    Args:
        logits: (n, vocabulary) the logits that predict each token, any floating dtype.
        tokens: (n,) the answer tokens.

    Returns:
        (n,) float32 (float64 for float64 logits).
    """
    precise = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(precise, tokens, reduction="none")


def locality_margin(
    w: Tensor, w_unrelated: Tensor, alpha: float, beta: float, gamma: float
) -> Tensor:
    """Compute the locality regulariser R_loc.

    It asks for gates below α on unrelated text and above β on the edit, with maxima at least γ apart:

    relu(w(h_ir) - α) + relu(β - w(h)) + relu(γ - (max_k w(h) - max_k w(h_ir))), where the first two terms are averaged
    over tokens and gates, and the third over all pairs of an edited and an unrelated token.

    Args:
        w: (n, r) gates at the edited tokens.
        w_unrelated: (m, r) gates at the tokens of unrelated text.
    """
    gap = w.amax(-1)[:, None] - w_unrelated.amax(-1)[None, :]
    return F.relu(w_unrelated - alpha).mean() + F.relu(beta - w).mean() + F.relu(gamma - gap).mean()


def load_balance(w: Tensor, past_sum: Tensor, past_count: Tensor) -> Tensor:
    """Compute the incremental load balance R_bal: how unevenly the gates were used over all edits so far, with the present one.

    As printed in the paper: Σ_k (w̄_k - w̄)² / ((r - 1) w̄). Only the contribution of the present edit carries a gradient.

    Args:
        w: (n, r) gates at the edited tokens of the present edit.
        past_sum: (r,) sum of the gates over the edited tokens of past edits.
        past_count: () number of edited tokens of past edits.

    Returns:
        () >= 0, and 0 if there is only one gate.
    """
    if w.shape[-1] < 2:
        return w.sum() * 0
    use = (past_sum.detach() + w.sum(0)) / (past_count.detach() + w.shape[0])
    mean = use.mean()
    return (use - mean).square().sum() / ((use.numel() - 1) * mean.clamp(min=1e-6))


def mean_over_blocks(terms: Sequence[Tensor]) -> Tensor:
    """Average scalars, one per edited block, on the device of the first."""
    return torch.stack([term.to(terms[0].device) for term in terms]).mean()


def rescaled(term: Tensor, reference: Tensor, ceiling: float) -> Tensor:
    """Scale `term` to the magnitude of `reference` (Eq. 4), by a factor that is constant with respect to the gradient.

    The factor is reference / term, clamped to `ceiling`, so that a regulariser close to 0 is not scaled without bound.
    """
    factor = reference.detach().to(term.device) / term.detach().clamp(
        min=torch.finfo(term.dtype).tiny
    )
    return term * factor.clamp(max=ceiling)
