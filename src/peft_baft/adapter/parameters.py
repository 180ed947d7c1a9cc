"""What an adapter learns in one block: the basis and the gates, alone or stacked with those of other adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_baft.adapter.config import BaftConfig
from peft_baft.intervention import gates, orthonormal_rows, rms_normalise


class OrthonormalBasis(nn.Module):
    """R (r, d) as a free matrix that is orthonormalised on use; the result is kept while no gradient is needed."""

    def __init__(self, r: int, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(r, d))
        self._kept: tuple[tuple, Tensor] | None = None
        if self.weight.device.type != "meta":
            nn.init.orthogonal_(self.weight)

    def forward(self) -> Tensor:
        """R, (r, d) float32 with orthonormal rows."""
        if torch.compiler.is_compiling() or self.weight.is_inference():
            return orthonormal_rows(self.weight)
        if torch.is_grad_enabled() and self.weight.requires_grad:
            self._kept = None  # a step may follow, and sharded weights change without a new version
            return orthonormal_rows(self.weight)
        state = (self.weight.data_ptr(), self.weight._version, self.weight.dtype)
        if self._kept is None or self._kept[0] != state:
            self._kept = (state, orthonormal_rows(self.weight.detach()))
        return self._kept[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}


class Gate(nn.Module):
    """The logistic gates w(h) of one block: (…, d) to (…, k).

    Small random rows rather than zeros: at exact equality of the gates the load balance has no gradient to part them.
    """

    def __init__(self, config: BaftConfig, d: int) -> None:
        super().__init__()
        rows = config.gate_count + (config.weighting == "product")
        spread = 0.1 if config.init_weights else 5.0  # of the logits, for a vector of unit root mean square
        self.weight = nn.Parameter(torch.randn(rows, d) * spread * d**-0.5)
        self.bias = nn.Parameter(torch.zeros(rows)) if config.gate_bias else None
        self.norm, self.shared, self.offset = config.gate_norm, config.weighting == "product", config.gate_offset
        if self.norm == "scale":
            self.scale = nn.Parameter(torch.ones(d))
        elif self.norm == "center":
            self.center = nn.Parameter(torch.zeros(d))

    def forward(self, h: Tensor) -> Tensor:
        """w(h), each in [0, 1]."""
        return gates(self._seen(h), self.weight, self.bias, self.offset, shared=self.shared)

    def _seen(self, h: Tensor) -> Tensor:
        if self.norm == "center":
            return h - self.center
        if self.norm == "none":
            return h
        return rms_normalise(h) if self.norm == "rms" else rms_normalise(h) * self.scale


def stacked_parameters(modules: Sequence[nn.Module], index: Tensor) -> dict[str, Tensor]:
    """The parameters of alike modules, one row for each of `index`, with gradients to the modules' own."""
    named = [dict(module.named_parameters()) for module in modules]
    return {name: torch.stack([own[name] for own in named])[index] for name in named[0]}


def stacked_bases(bases: Sequence[Any]) -> Tensor:
    """R of each, (bases, r, d) float32."""
    if torch.is_grad_enabled() and any(basis.weight.requires_grad for basis in bases):
        return orthonormal_rows(torch.stack([basis.weight for basis in bases]))
    return torch.stack([basis() for basis in bases])
