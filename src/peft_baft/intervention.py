"""The formula of BaFT (arXiv 2503.00306, Sec. 2): from hidden vectors to the update that is added to them. Torch only.

    Φ(h) = h + Rᵀ diag(w(h)) (A h + b - R h)        Eq. 3; with w = 1 it is ReFT, Eq. 1

R (r, d) has orthonormal rows that span the edited subspace (`orthonormal_rows`). R h are the coordinates of a hidden vector h
in this subspace, and A h + b are its learned coordinates. The gates w(h), one number in [0, 1] for each row of R, interpolate
between the two (`gates`). `update` computes the term that is added to h. An adapter learns D = A - R instead of A
(`adapter/layer.py`), so that A h + b - R h is D h + b, and D = 0, b = 0 is exactly the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal_rows(weight: Tensor) -> Tensor:
    """Turn a free matrix into the paper's R: orthonormal rows that span the same subspace.

    This is a thin QR with fixed signs, so that the result is a smooth function of `weight`, and a matrix whose rows are already
    orthonormal is returned unchanged. It is computed in float32 at least: there is no half-precision QR, and a basis rounded to
    8 bits is not orthonormal.

    Args:
        weight: (..., r, d), any floating dtype, of full row rank, with r <= d.

    Returns:
        R: (..., r, d) float32 (float64 for a float64 weight) with R Rᵀ = I.
    """
    precise = weight if weight.dtype == torch.float64 else weight.float()
    q: Tensor
    triangle: Tensor
    q, triangle = torch.linalg.qr(precise.mT)
    signs = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return (q * signs[..., None, :]).mT


def rms_normalise(h: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale each vector of h (..., d) to a root mean square of one, so that gates depend on its direction only."""
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)


def gates(
    h: Tensor, U: Tensor, c: Tensor | None = None, offset: float = 0.0, *, shared: bool = False
) -> Tensor:
    """Compute the logistic gates w(h) of App. C: one per row of U, each in [0, 1].

    Args:
        h: (..., d) input of the gates.
        U: (k, d) one gate per row; with `shared`, the last row is a gate for the whole subspace.
        c: (k,) biases, or None.
        offset: a constant added to every logit, so that gates start at σ(offset).
        shared: multiply the first k - 1 gates by the last one (basis gates times subspace gate).

    Returns:
        w: (..., k), or (..., k - 1) with `shared`.
    """
    w = torch.sigmoid(torch.nn.functional.linear(h, U, c) + offset)
    return w[..., :-1] * w[..., -1:] if shared else w


def update(shift: Tensor, R: Tensor, w: Tensor | None = None) -> Tensor:
    """Compute Φ(h) - h = Rᵀ diag(w) (A h + b - R h), given the shift A h + b - R h.

    Args:
        shift: (..., r) the learned coordinates A h + b minus the present ones R h.
        R: (r, d) orthonormal rows.
        w: (..., r) or (..., 1) gates, or None for w = 1, which is ReFT (Eq. 1).

    Returns:
        (..., d) the update that is added to the hidden vector.
    """
    return (shift if w is None else shift * w) @ R
