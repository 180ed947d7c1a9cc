"""One block's share of the adapters: parameters, usage statistics, and the hook that edits the block's output."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.func import functional_call

from peft_baft.adapter.config import BaftConfig
from peft_baft.adapter.context import CurrentForward, EditContext, RecordedGates
from peft_baft.adapter.parameters import Gate, OrthonormalBasis, stacked_bases, stacked_parameters
from peft_baft.intervention import update

CHILD = "baft"  # the name of a block's BaftLayer; must not contain PEFT's prefix `baft_`


class BaftLayer(nn.Module, BaseTunerLayer):
    """All BaFT adapters of one block, a child module of it.

    Per adapter: `baft_basis` holds R; `baft_source` holds D = A - R and b, so that a fresh adapter (D = 0, b = 0) is the
    identity exactly, on every device and in every dtype, and weight decay pulls towards no edit; `baft_gate` holds the
    gates; `baft_gate_usage` the gates' summed use over past edits and, last, over how many tokens: (k + 1,).

    Args:
        block: the module whose output is edited; it is watched, not owned.
        name: the block's name in the base model.
        context: where each token stands; shared by the blocks of a model.
    """

    adapter_layer_names = ("baft_basis", "baft_source", "baft_gate")
    other_param_names = ("baft_gate_usage", "configs")

    def __init__(self, block: nn.Module, name: str, context: EditContext) -> None:
        super().__init__()
        self.baft_basis = nn.ModuleDict()
        self.baft_source = nn.ModuleDict()
        self.baft_gate = nn.ModuleDict()
        self.baft_gate_usage = BufferDict(persistent=True)
        self.configs: dict[str, BaftConfig] = {}
        self.name, self.context = name, context
        self._block = [block]  # in a list, so as not to become a child that has us as a child
        self._disable_adapters, self._active_adapter, self.merged_adapters = False, [], []
        self._packing: list[Any] = []
        self._handle = block.register_forward_hook(_edit_output, prepend=True)

    def attach(self, adapter_name: str, config: BaftConfig, width: int) -> None:
        """Make the parameters of one more adapter for hidden vectors of `width`, on the block's device."""
        self._packing += _keep_4bit_as_loaded(self.context._model)
        self.configs[adapter_name] = config
        self.in_features = self.out_features = width
        self.baft_basis[adapter_name] = OrthonormalBasis(config.r, width)
        self.baft_source[adapter_name] = source = nn.Linear(width, config.r)
        if config.gate_count:
            self.baft_gate[adapter_name] = Gate(config, width)
            self.baft_gate_usage[adapter_name] = torch.zeros(config.gate_count + 1)
        if config.init_weights and source.weight.device.type != "meta":
            nn.init.zeros_(source.weight)
            nn.init.zeros_(source.bias)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def detach(self) -> None:
        """Leave the block as it was before the first adapter came."""
        self._handle.remove()
        del self._block[0]._modules[CHILD]
        for layer in self._packing:
            layer.support_avx512bf16_for_cpu = True

    def get_base_layer(self) -> nn.Module:
        return self._block[0]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        own = {id(p) for p in self.parameters()}
        weights = [p for p in base_layer.parameters() if id(p) not in own]
        computing = (
            p for p in weights if p.is_floating_point() and p.element_size() > 1 and not hasattr(p, "quant_state")
        )
        first = next(computing, None)  # quantised weights may be stored under a dtype that nothing is computed in
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
        if adapter_name in self.baft_gate_usage:
            self.baft_gate_usage[adapter_name] = self.baft_gate_usage[adapter_name].to(place)

    def forward(self, hidden: Tensor) -> Tensor:
        """Edit the output of the block: every chosen adapter's update is computed from the same `hidden`, and they add up.

        Args:
            hidden: (batch, tokens, d), any floating dtype; updates are computed in the adapter's dtype.
        """
        call = self.context.current_forward()
        if call.row_adapters is not None:
            return self._edit_rows(hidden, call, call.row_adapters)
        total = None
        chosen = [name for name in self.active_adapters if name in self.configs]
        for adapter_name in chosen:
            mask = self.context.mask(call.relative_positions, hidden, self.configs[adapter_name].prompt_positions)
            place = self.name if len(chosen) == 1 else (self.name, adapter_name)
            part = self._update(adapter_name, place, hidden, mask, call.recorded)
            total = part if total is None else total + part
        return hidden if total is None else (hidden + total).to(hidden.dtype)

    def _edit_rows(self, hidden: Tensor, call: CurrentForward, names: list[str]) -> Tensor:
        """`forward` where row i is edited by adapter `names[i]` alone: each adapter computes its own rows."""
        if len(names) != hidden.shape[0]:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(names)} and {hidden.shape[0]} respectively."
            )
        places, parts = [], []
        present = [name for name in dict.fromkeys(names) if name in self.configs]
        stackable = hidden.ndim == 3  # not where a row is one vector, in a model that is none of token sequences
        for group in self._alike(present) if stackable else [[name] for name in present]:
            own = {name: [i for i, chosen in enumerate(names) if chosen == name] for name in group}
            rows = torch.tensor([i for of_one in own.values() for i in of_one], device=hidden.device)
            mask = self.context.mask(call.relative_positions, hidden, self.configs[group[0]].prompt_positions)
            mask, chosen = None if mask is None else mask[rows], hidden[rows]
            if len(group) == 1:
                part = self._update(group[0], (self.name, group[0]), chosen, mask, call.recorded)
            else:
                part = self._update_side_by_side(
                    [(name, len(own[name])) for name in group], chosen, mask, call.recorded
                )
            places.append(rows)
            parts.append(chosen + part)
        return hidden.index_copy(0, torch.cat(places), torch.cat(parts).to(hidden.dtype)) if places else hidden

    def _alike(self, names: Iterable[str]) -> list[list[str]]:
        """Adapters in groups whose parameters can be stacked: of the same settings, dtype and device."""
        groups: dict[tuple, list[str]] = {}
        for name in names:
            config, weight = self.configs[name], self.baft_source[name].weight
            key = (config.forward_settings, weight.dtype, weight.device)
            groups.setdefault(key, []).append(name)
        return list(groups.values())

    def _update(
        self,
        adapter_name: str,
        place: Any,
        hidden: Tensor,
        mask: Tensor | None,
        recorded: dict[Any, RecordedGates] | None,
    ) -> Tensor:
        """Φ(h) - h of one adapter at every token, (rows, tokens, d), 0 where it does not edit.

        place: what the gates are recorded under.
        """
        source: Any = self.baft_source[adapter_name]
        with torch.autocast(hidden.device.type, enabled=False):
            h = hidden.to(source.weight.dtype)
            w = self.baft_gate[adapter_name](h) if adapter_name in self.baft_gate else None
            if w is not None and mask is not None and recorded is not None:
                recorded[place] = RecordedGates(w, mask)
            R: Tensor = self.baft_basis[adapter_name]().to(h.dtype)
            part = update(source(h), R, w)
        return part if mask is None else torch.where(mask[..., None], part, 0)

    def _update_side_by_side(
        self,
        owners: list[tuple[str, int]],
        hidden: Tensor,
        mask: Tensor | None,
        recorded: dict[Any, RecordedGates] | None,
    ) -> Tensor:
        """`_update` of several alike adapters at once, their parameters stacked.

        owners: each adapter, and how many of the next rows are its own.
        """
        counts = [count for _, count in owners]
        index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(hidden.device)
        sources, bases, gates = (
            [container[name] for name, _ in owners if name in container]
            for container in (self.baft_source, self.baft_basis, self.baft_gate)
        )
        with torch.autocast(hidden.device.type, enabled=False):
            source = stacked_parameters(sources, index)
            h, w = hidden.to(source["weight"].dtype), None
            if gates:
                w = torch.vmap(partial(functional_call, gates[0]))(stacked_parameters(gates, index), h)
                if mask is not None and recorded is not None:
                    for (name, _), own, edited in zip(owners, w.split(counts), mask.split(counts), strict=True):
                        recorded[self.name, name] = RecordedGates(own, edited)
            shift = torch.baddbmm(source["bias"][:, None], h, source["weight"].mT)
            part = update(shift, stacked_bases(bases)[index].to(h.dtype), w)
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


def _keep_4bit_as_loaded(model: nn.Module) -> list[Any]:
    """Keep bitsandbytes from packing 4-bit weights anew for a CPU with bf16 instructions, and undo it where it has.

    It packs at a layer's first forward without gradients. Packed weights let no gradient through to earlier blocks, and
    become garbage when any state_dict is made of them, as to save an adapter (both with bitsandbytes 0.50).

    Returns:
        The layers, for `detach` to let them pack again.
    """
    layers: list[Any] = [module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
        state: Any = getattr(layer.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpacked

            scales, state.original_nested = state.absmax.T.reshape(-1).float(), False
            layer.weight.data, _ = unpacked(layer.weight.data, state)
            state.absmax = scales
    return layers
