"""What an adapter has in one block: the basis, the gates and their usage, alone or stacked with those of other adapters."""

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
    """R (r, d) as a free matrix that is orthonormalised on use; the result is kept for forwards that need no gradient.

    Args:
        pack_ranks: of a combined adapter: how many rows each of its packs has, within which they are orthonormal.
    """

    def __init__(self, r: int, d: int, pack_ranks: Sequence[int] | None = None) -> None:
        super().__init__()
        self.take_settings(pack_ranks)
        self.weight = nn.Parameter(torch.empty(r, d, dtype=torch.float32))
        if self.weight.device.type != "meta":
            nn.init.orthogonal_(self.weight)

    def take_settings(self, pack_ranks: Sequence[int] | None) -> None:
        """Orthonormalise within these packs from now on."""
        self.pack_ranks = None if pack_ranks is None else list(pack_ranks)
        # A copy of the weight, and R of it.
        self._known: tuple[Tensor, Tensor] | None = None

    def _orthonormal(self, weight: Tensor) -> Tensor:
        if self.pack_ranks is None:
            return orthonormal_rows(weight)
        return torch.cat([orthonormal_rows(pack) for pack in weight.split(self.pack_ranks)])

    def forward(self) -> Tensor:
        """Return R, (r, d) float32 with orthonormal rows."""
        needs_gradient = torch.is_grad_enabled() and self.weight.requires_grad
        if needs_gradient or not _is_comparable(self.weight):
            self._known = None
            return self._orthonormal(self.weight)
        known = self._known
        # The values are compared: an averaged or synchronised weight, written through `.data`, has the same address and
        # version. That takes a tenth of the time of a decomposition.
        if known is None or not _are_equal(known[0], self.weight):
            # Outside of inference mode, so that gradients of other tensors can pass through R later.
            with torch.inference_mode(False):
                copy = self.weight.detach().clone()
                known = self._known = (copy, self._orthonormal(copy))
        return known[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}


def _is_comparable(weight: Tensor) -> bool:
    """Tell whether the values of a weight can be looked at now: not in a trace or capture of a forward, nor of a part of it."""
    if torch.compiler.is_compiling() or type(weight) not in (Tensor, nn.Parameter):
        return False
    capturing = weight.is_cuda and torch.cuda.is_current_stream_capturing()
    return not (weight.is_meta or capturing)


def _are_equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


class Counts(BufferDict):
    """Tensors that count, by the names of adapters. They stay float32 when the model is cast: float16 ends at 65,504."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Counts:
        before = dict(self.items())
        super()._apply(fn, recurse)
        for name, count in before.items():
            moved = self[name]
            if moved.dtype != torch.float32:
                self[name] = count.to(moved.device, torch.float32)
        return self


@dataclass(frozen=True)
class Weighting:
    """What weighs an adapter's update.

    Attributes:
        gate_count: the number k of gates that weigh the update, from the rank r.
        has_shared_gate: whether one more row of U is a gate that multiplies all the others (`intervention.gates`).
    """

    gate_count: Callable[[int], int]
    has_shared_gate: bool = False


@dataclass(frozen=True)
class GateNorm:
    """What a gate sees of the hidden vector h.

    Attributes:
        apply: from h (..., d) and the learned vectors, in their order, to what the gate sees (..., d).
        learned_vectors: the vectors (d,) that are learned for this, by the name of the parameter, with the number that each
            is filled with at the start.
    """

    apply: Callable[..., Tensor]
    learned_vectors: Mapping[str, float] = field(default_factory=dict)


# A new kind of gate is one entry here, and a sentence in the docstring of `BaftConfig`.
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
    """Return the shapes of one block's gate parameters by name; nothing where the config has no gates.

    Args:
        d: width of the hidden vectors; None where it is not known, and then None in the shapes.
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

    Small random rows rather than zeros: at exact equality of the gates the load balance has no gradient to part them.
    """

    def __init__(self, config: BaftConfig, d: int) -> None:
        super().__init__()
        self.take_settings(config)
        # Of the logits, for a vector of unit root mean square.
        spread = 0.1 if config.init_weights else 5.0
        shapes: dict[str, Any] = gate_shapes(config, d)
        float32 = torch.float32
        self.weight = nn.Parameter(torch.randn(shapes["weight"], dtype=float32) * spread * d**-0.5)
        self.bias = (
            nn.Parameter(torch.zeros(shapes["bias"], dtype=float32)) if "bias" in shapes else None
        )
        for name, initial in GATE_NORMS[self.norm].learned_vectors.items():
            setattr(self, name, nn.Parameter(torch.full(shapes[name], initial, dtype=float32)))

    def take_settings(self, config: BaftConfig) -> None:
        """Follow a config whose gates have the same parameters."""
        self.norm, self.offset = config.gate_norm, config.gate_offset
        self.shared = WEIGHTINGS[config.weighting].has_shared_gate

    def forward(self, h: Tensor) -> Tensor:
        """Return w(h), each in [0, 1]."""
        return self.weigh(dict(self.named_parameters()), h)

    def weigh(self, parameters: Mapping[str, Tensor], h: Tensor) -> Tensor:
        """Return w(h) with other parameters of the same names, which are not put into the module: other threads may run it."""
        gate_norm = GATE_NORMS[self.norm]
        learned = [parameters[name] for name in gate_norm.learned_vectors]
        seen = gate_norm.apply(h, *learned)
        weight, bias = parameters["weight"], parameters.get("bias")
        return gates(seen, weight, bias, self.offset, shared=self.shared)


def stacked_parameters(modules: Sequence[nn.Module], index: Tensor) -> dict[str, Tensor]:
    """Stack the parameters of modules of the same shape, one row for each of `index`, with gradients to the modules' own."""
    parameters = [dict(module.named_parameters()) for module in modules]
    return {
        name: torch.stack([of_one[name] for of_one in parameters])[index] for name in parameters[0]
    }


def stacked_bases(bases: Sequence[Any]) -> Tensor:
    """Stack R of each basis, (bases, r, d) float32."""
    needs_gradient = torch.is_grad_enabled() and any(b.weight.requires_grad for b in bases)
    if needs_gradient and bases[0].pack_ranks is None:  # all have the same settings
        return orthonormal_rows(torch.stack([basis.weight for basis in bases]))
    return torch.stack([basis() for basis in bases])
