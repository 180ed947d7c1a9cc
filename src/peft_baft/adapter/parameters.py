"""The parameters of an adapter in one block: basis, gates and their usage, also stacked for several adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn

from peft_baft.intervention import gates, orthonormal_rows, rms_normalise

if TYPE_CHECKING:
    from peft_baft.adapter.config import BaftConfig


class OrthonormalBasis(nn.Module):
    """R (r, d) as a free matrix that is orthonormalised on use; the result is cached for forwards without gradients.

    Args:
        pack_ranks: for a combined adapter, the number of rows of each of its packs, within which they are orthonormal.
    """

    def __init__(self, r: int, d: int, pack_ranks: Sequence[int] | None = None) -> None:
        super().__init__()
        self.apply_settings(pack_ranks)
        self.weight = nn.Parameter(torch.empty(r, d, dtype=torch.float32))
        if self.weight.device.type != "meta":
            nn.init.orthogonal_(self.weight)

    def apply_settings(self, pack_ranks: Sequence[int] | None) -> None:
        """Orthonormalise within these packs from now on."""
        self.pack_ranks = None if pack_ranks is None else list(pack_ranks)
        self._cached: tuple[Tensor, Tensor] | None = None  # a copy of the weight, and its R

    def _orthonormal(self, weight: Tensor) -> Tensor:
        if self.pack_ranks is None:
            return orthonormal_rows(weight)
        return torch.cat([orthonormal_rows(pack) for pack in torch.split(weight, self.pack_ranks)])

    def forward(self) -> Tensor:
        """Return R, (r, d) float32 with orthonormal rows."""
        needs_gradient = torch.is_grad_enabled() and self.weight.requires_grad
        if needs_gradient or not _is_comparable(self.weight):
            self._cached = None
            return self._orthonormal(self.weight)
        cached = self._cached
        # Values are compared, in a tenth of the time of a decomposition: an averaged or synchronised weight, written through
        # `.data`, has the same address and version.
        if cached is None or not _are_equal(cached[0], self.weight):
            # Outside inference mode, so that gradients of other tensors can pass through R later.
            with torch.inference_mode(False):
                copy = self.weight.detach().clone()
                cached = self._cached = (copy, self._orthonormal(copy))
        return cached[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cached": None}


def _is_comparable(weight: Tensor) -> bool:
    """Return whether the values of a weight can be read now: not while tracing or capturing a forward, nor of a shard."""
    if torch.compiler.is_compiling() or type(weight) not in (Tensor, nn.Parameter):
        return False
    capturing = weight.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (weight.is_meta or capturing)


def _are_equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


class Counts(BufferDict):
    """Counts by adapter name. They stay float32 when the model is cast, since float16 ends at 65,504."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Counts:
        before: dict[str, Tensor] = dict(self.items())  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, count in before.items():
            moved = self[name]
            if moved.dtype != torch.float32:
                self[name] = count.to(moved.device, torch.float32)
        return self


@dataclass(frozen=True)
class Weighting:
    """How gates weight an adapter's update.

    Attributes:
        gate_count: computes the number of gates k from the rank r.
        has_shared_gate: whether U has one more row, a gate that multiplies all the others (`intervention.gates`).
    """

    gate_count: Callable[[int], int]
    has_shared_gate: bool = False


@dataclass(frozen=True)
class GateNorm:
    """How the gates' input is computed from the hidden vector h.

    Attributes:
        apply: maps h (..., d) and the learned vectors, in their order, to the gates' input (..., d).
        learned_vectors: the initial value of each learned vector (d,), by the name of the parameter.
    """

    apply: Callable[..., Tensor]
    learned_vectors: Mapping[str, float] = field(default_factory=dict)


# A new kind of gate needs one entry here, and a sentence in the docstring of `BaftConfig`.
WEIGHTINGS = {
    "basis": Weighting(gate_count=lambda r: r),
    "subspace": Weighting(gate_count=lambda r: 1),
    "product": Weighting(gate_count=lambda r: r, has_shared_gate=True),
    "none": Weighting(gate_count=lambda r: 0),
}
GATE_NORMS = {
    "none": GateNorm(lambda h: h),
    "rms": GateNorm(rms_normalise),
    "scale": GateNorm(lambda h, scale: rms_normalise(h) * scale, {"scale": 1.0}),
    "center": GateNorm(lambda h, center: h - center, {"center": 0.0}),
}


def gate_shapes(config: BaftConfig, d: int | None) -> dict[str, tuple[int | None, ...]]:
    """Return the shapes of one block's gate parameters by name; empty if the config has no gates.

    Args:
        d: width of the hidden vectors; None if unknown, and then also in the shapes.
    """
    if not config.gate_count:
        return {}
    rows = config.gate_count + WEIGHTINGS[config.weighting].has_shared_gate
    shapes: dict[str, tuple[int | None, ...]] = {"weight": (rows, d)}
    if config.gate_bias:
        shapes["bias"] = (rows,)
    return shapes | dict.fromkeys(GATE_NORMS[config.gate_norm].learned_vectors, (d,))


class Gate(nn.Module):
    """The logistic gates w(h) of one block: (…, d) to (…, k).

    Initialised with small random rows, not zeros: if all gates are equal, the load balance has no gradient to separate them.
    """

    def __init__(self, config: BaftConfig, d: int) -> None:
        super().__init__()
        self.apply_settings(config)
        # The standard deviation of the logits, for a vector of unit root mean square.
        spread = 0.1 if config.init_weights else 5.0
        shapes: dict[str, Any] = gate_shapes(config, d)
        float32 = torch.float32
        self.weight = nn.Parameter(torch.randn(shapes["weight"], dtype=float32) * spread * d**-0.5)
        self.bias = (
            nn.Parameter(torch.zeros(shapes["bias"], dtype=float32)) if "bias" in shapes else None
        )
        for name, initial in GATE_NORMS[self.norm].learned_vectors.items():
            setattr(self, name, nn.Parameter(torch.full(shapes[name], initial, dtype=float32)))

    def apply_settings(self, config: BaftConfig) -> None:
        """Use the settings of a config whose gates have the same parameters."""
        self.norm, self.offset = config.gate_norm, config.gate_offset
        self.shared = WEIGHTINGS[config.weighting].has_shared_gate

    def forward(self, h: Tensor) -> Tensor:
        """Return w(h), each in [0, 1]."""
        return self.weigh(dict(self.named_parameters()), h)

    def weigh(self, parameters: Mapping[str, Tensor], h: Tensor) -> Tensor:
        """Return w(h) with other parameters of the same names, without setting them: other threads may run the module."""
        gate_norm = GATE_NORMS[self.norm]
        learned = [parameters[name] for name in gate_norm.learned_vectors]
        gate_input = gate_norm.apply(h, *learned)
        weight, bias = parameters["weight"], parameters.get("bias")
        return gates(gate_input, weight, bias, self.offset, shared=self.shared)


def stacked_parameters(modules: Sequence[nn.Module], index: Tensor) -> dict[str, Tensor]:
    """Stack the parameters of modules of the same shapes, one row per entry of `index`, with gradients to the originals."""
    parameters = [dict(module.named_parameters()) for module in modules]
    return {name: torch.stack([own[name] for own in parameters])[index] for name in parameters[0]}


def stacked_bases(bases: Sequence[Any]) -> Tensor:
    """Stack R of each basis, (bases, r, d) float32."""
    needs_gradient = torch.is_grad_enabled() and any(b.weight.requires_grad for b in bases)
    if needs_gradient and bases[0].pack_ranks is None:  # all have the same settings
        return orthonormal_rows(torch.stack([basis.weight for basis in bases]))
    return torch.stack([basis() for basis in bases])
