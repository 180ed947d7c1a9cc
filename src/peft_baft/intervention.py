"""The formula of BaFT (arXiv 2503.00306, Sec. 2): hidden vectors in, what is added to them out. Torch only.

    Φ(h) = h + Rᵀ diag(w(h)) (A h + b - R h)        Eq. 3; with w = 1 it is ReFT, Eq. 1

R (r, d) has orthonormal rows that span the edited subspace (`orthonormal_rows`). In it, R h are the coordinates of a hidden
vector h, and A h + b the ones that an edit has learned. w(h), one number in [0, 1] for each row of R, says how far each
coordinate goes from the one to the other (`gates`); `update` gives what is added to h. An adapter learns A as D = A - R
(`adapter/layer.py`), so that A h + b - R h is D h + b, and D = 0, b = 0 changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def orthonormal_rows(weight: Tensor) -> Tensor:
    """Turn a free matrix into the paper's R: orthonormal rows that span the same subspace.

    A thin QR whose signs are fixed, so that the result is a smooth function of `weight` and a matrix whose rows are
    already orthonormal comes back as it was. Always computed in float32: there is no half-precision QR, and a basis
    rounded to 8 bits is not orthonormal.

    Args:
        weight: (..., r, d), any floating dtype, of full row rank, r <= d.

    Returns:
        R: (..., r, d) float32 (float64 for a float64 weight) with R Rᵀ = I.
    """
    precise = weight if weight.dtype == torch.float64 else weight.float()
    q, triangle = torch.linalg.qr(precise.mT)
    signs = torch.where(triangle.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).to(q.dtype)
    return (q * signs[..., None, :]).mT


def rms_normalise(h: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale each vector of h (..., d) to a root mean square of one, so that a gate sees directions and not sizes."""
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)


def gates(
    h: Tensor, U: Tensor, c: Tensor | None = None, offset: float = 0.0, *, shared: bool = False
) -> Tensor:
    """Compute the logistic gates w(h) of App. C: one per row of U, each in [0, 1].

    Args:
        h: (..., d) what the gate looks at.
        U: (k, d) one gate per row; with `shared`, the last row is a gate of the whole subspace.
        c: (k,) optional biases.
        offset: a constant added to every logit: gates start at σ(offset).
        shared: multiply the first k - 1 gates by the last one (basis gate times subspace gate).

    Returns:
        w: (..., k), or (..., k - 1) with `shared`.
    """
    w = torch.sigmoid(torch.nn.functional.linear(h, U, c) + offset)
    return w[..., :-1] * w[..., -1:] if shared else w


def update(shift: Tensor, R: Tensor, w: Tensor | None = None) -> Tensor:
    """Compute Φ(h) - h = Rᵀ diag(w) (A h + b - R h), given the shift A h + b - R h.

    Args:
        shift: (..., r) where the new coordinates A h + b differ from the present ones R h.
        R: (r, d) orthonormal rows.
        w: (..., r) or (..., 1) gates, or None for w = 1, which is ReFT (Eq. 1).

    Returns:
        (..., d) what is added to the hidden vector.
    """
    return (shift if w is None else shift * w) @ R
