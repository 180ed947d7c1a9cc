"""One block's share of the adapters: parameters, usage statistics, and the hook that edits the block's output."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_baft.adapter.config import BaftConfig
from peft_baft.adapter.context import EditContext, RecordedGates
from peft_baft.intervention import gates, orthonormal_rows, rms_normalise, update

CHILD = "baft"  # the name of a block's BaftLayer; must not contain PEFT's prefix `baft_`


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


class BaftLayer(nn.Module, BaseTunerLayer):
    """All BaFT adapters of one block, a child module of it.

    Per adapter: `baft_basis` holds R; `baft_source` holds D = A - R and b, so that a fresh adapter (D = 0, b = 0) is the
    identity exactly, on every device and in every dtype, and weight decay pulls towards no edit; `baft_gate` holds the
    gates; `baft_load` the gates' summed use over past edits and, last, over how many tokens: (k + 1,).

    Args:
        block: the module whose output is edited; it is watched, not owned.
        name: the block's name in the base model.
        context: where each token stands; shared by the blocks of a model.
    """

    adapter_layer_names = ("baft_basis", "baft_source", "baft_gate")
    other_param_names = ("baft_load", "configs")

    def __init__(self, block: nn.Module, name: str, context: EditContext) -> None:
        super().__init__()
        self.baft_basis = nn.ModuleDict()
        self.baft_source = nn.ModuleDict()
        self.baft_gate = nn.ModuleDict()
        self.baft_load = BufferDict(persistent=True)
        self.configs: dict[str, BaftConfig] = {}
        self.name, self.context = name, context
        self._block = [block]  # in a list, so as not to become a child that has us as a child
        self._disable_adapters, self._active_adapter, self.merged_adapters = False, [], []
        self._handle = block.register_forward_hook(_edit_output, prepend=True)

    def attach(self, adapter_name: str, config: BaftConfig, width: int) -> None:
        """Make the parameters of one more adapter for hidden vectors of `width`, on the block's device."""
        self.configs[adapter_name] = config
        self.in_features = self.out_features = width
        self.baft_basis[adapter_name] = OrthonormalBasis(config.r, width)
        self.baft_source[adapter_name] = source = nn.Linear(width, config.r)
        if config.gate_count:
            self.baft_gate[adapter_name] = Gate(config, width)
            self.baft_load[adapter_name] = torch.zeros(config.gate_count + 1)
        if config.init_weights and source.weight.device.type != "meta":
            nn.init.zeros_(source.weight)
            nn.init.zeros_(source.bias)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def detach(self) -> None:
        """Leave the block as it was before the first adapter came."""
        self._handle.remove()
        del self._block[0]._modules[CHILD]

    def get_base_layer(self) -> nn.Module:
        return self._block[0]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        own = {id(p) for p in self.parameters()}
        first = next((p for p in base_layer.parameters() if id(p) not in own and p.is_floating_point()), None)
        return (None, None) if first is None else (first.device, first.dtype)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Put an adapter where its block is, its parameters in the block's dtype. Statistics stay in float32."""
        place, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        place = place if device is None else device
        if place is None or place.type == "meta":
            return
        for container in (self.baft_basis, self.baft_source, self.baft_gate):
            if adapter_name in container and not any(p.is_meta for p in container[adapter_name].parameters()):
                container[adapter_name].to(place, dtype)
        if adapter_name in self.baft_load:
            self.baft_load[adapter_name] = self.baft_load[adapter_name].to(place)

    def forward(self, hidden: Tensor) -> Tensor:
        """Edit the output of the block: every chosen adapter's update is computed from the same `hidden`, and they add up.

        Args:
            hidden: (batch, tokens, d), any floating dtype; updates are computed in the adapter's dtype.
        """
        if self.context.row_adapters is not None:
            return self._edit_rows(hidden, self.context.row_adapters)
        total = None
        for adapter_name in (name for name in self.active_adapters if name in self.configs):
            mask = self.context.mask(hidden, self.configs[adapter_name].prompt_positions)
            part = self._update(adapter_name, self.name, hidden, mask)
            total = part if total is None else total + part
        return hidden if total is None else (hidden + total).to(hidden.dtype)

    def _edit_rows(self, hidden: Tensor, names: list[str]) -> Tensor:
        """`forward` where row i is edited by adapter `names[i]` alone: each adapter computes its own rows."""
        if len(names) != hidden.shape[0]:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {hidden.shape[0]} respectively."
            )
        places, parts = [], []
        for adapter_name in (name for name in dict.fromkeys(names) if name in self.configs):
            rows = torch.tensor([i for i, name in enumerate(names) if name == adapter_name], device=hidden.device)
            mask = self.context.mask(hidden, self.configs[adapter_name].prompt_positions)
            mask = mask if mask is None else mask[rows]
            places.append(rows)
            parts.append(hidden[rows] + self._update(adapter_name, (self.name, adapter_name), hidden[rows], mask))
        return hidden.index_copy(0, torch.cat(places), torch.cat(parts).to(hidden.dtype)) if places else hidden

    def _update(self, adapter_name: str, place: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
        """Φ(h) - h of one adapter at every token, (rows, tokens, d), 0 where it does not edit.

        place: what the gates are recorded under.
        """
        source: Any = self.baft_source[adapter_name]
        with torch.autocast(hidden.device.type, enabled=False):
            h = hidden.to(source.weight.dtype)
            w = self.baft_gate[adapter_name](h) if adapter_name in self.baft_gate else None
            if w is not None and mask is not None and self.context.recorded is not None:
                self.context.recorded[place] = RecordedGates(w, mask)
            R: Tensor = self.baft_basis[adapter_name]().to(h.dtype)
            part = update(source(h), R, w)
        return part if mask is None else torch.where(mask[..., None], part, 0)

    def merge(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def unmerge(self) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def __repr__(self) -> str:
        return "baft." + super().__repr__()


CANNOT_MERGE = (
    "A BaFT adapter cannot be merged into the model's weights: its update depends on the hidden vector, through the gates, "
    "and is applied to some tokens only. Keep the adapter beside the model, or call unload() to get the unedited model back."
)


def _edit_output(block: nn.Module, _args: tuple, output: Any) -> Any:
    """Forward hook of a block: edit the hidden vectors it returns. At module level, so that models can be pickled."""
    layer = block._modules.get(CHILD)
    if layer is None or layer.disable_adapters:
        return None
    if isinstance(output, Tensor):
        return layer(output)
    return (layer(output[0]), *output[1:])
