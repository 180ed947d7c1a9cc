"""The adapters of one block: their parameters, the gates' usage, and the hook that edits the block's output."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_baft.adapter.call import Call, first_tensor
from peft_baft.adapter.config import BaftConfig
from peft_baft.adapter.context import EditContext, RecordedGates
from peft_baft.adapter.memory import EditCodes, EditRouter
from peft_baft.adapter.offloading import execution_device, forget_adapter, place_adapter
from peft_baft.adapter.parameters import (
    Counts,
    Gate,
    OrthonormalBasis,
    stacked_bases,
    stacked_parameters,
)
from peft_baft.adapter.switching import Switch
from peft_baft.intervention import update

CHILD = "baft"  # the name of a block's BaftLayer; must not contain PEFT's prefix `baft_`


class BaftLayer(nn.Module, BaseTunerLayer):
    """All BaFT adapters of one block, a child module of it.

    Each of these holds, for every adapter by its name:

    - `baft_basis`: R (r, d).
    - `baft_source`: D = A - R (r, d) and b (r,), and not A, so that a fresh adapter (D = 0, b = 0) is the identity exactly, on
      every device and in every dtype, and weight decay pulls towards no edit.
    - `baft_gate`: the gates; nothing for an adapter without gates.
    - `baft_codes`: instead of all these, of a memory of edits: the codes of its edits in this block.
    - `baft_router`: of such a memory, in the one block whose output tells which edit a prompt asks for.
    - `baft_gate_usage`: (k + 1,) the sum of each of the k gates over the edited tokens of past edits, then how many tokens
      those were. It is float32 whatever the adapter's dtype, since it counts.

    Args:
        block: the module whose output is edited; a hook is put on it, and it gets this layer as a child.
        name: the block's name in the base model.
        context: tells which tokens to edit; all blocks of a model share it.
    """

    # PEFT looks for adapters under these names: what is trained, and what is saved beside it.
    adapter_layer_names = ("baft_basis", "baft_source", "baft_gate")
    other_param_names = ("baft_gate_usage", "baft_codes", "baft_router", "configs")

    def __init__(self, block: nn.Module, name: str, context: EditContext) -> None:
        super().__init__()
        self.baft_basis = nn.ModuleDict()
        self.baft_source = nn.ModuleDict()
        self.baft_gate = nn.ModuleDict()
        self.baft_codes = nn.ModuleDict()
        self.baft_router = nn.ModuleDict()
        self.baft_gate_usage = Counts(persistent=True)
        self.configs: dict[str, BaftConfig] = {}
        self.name, self.context = name, context
        self._block = [block]  # in a list: as an attribute it would become a child of its own child
        self._disable_adapters, self._active_adapter, self.merged_adapters = False, [], []
        self._switch = Switch()
        self._layers_kept_unpacked: list[Any] = []
        # Prepended, so that other hooks on the block, such as those that record hidden states, get the edited output.
        self._handle = block.register_forward_hook(_edit_output, prepend=True, with_kwargs=True)
        place_adapter(context._model, f"{name}.{CHILD}", block)

    def attach(self, adapter_name: str, config: BaftConfig, width: int) -> None:
        """Make the parameters of one more adapter for hidden vectors of `width`, and put them on the block's device."""
        self._layers_kept_unpacked += _keep_4bit_as_loaded(self.context._model)
        self.configs[adapter_name] = config
        self.in_features = self.out_features = width
        if config.memory:
            number = self.name.rpartition(".")[2]
            codes = EditCodes(config, int(number) if number.isdigit() else 0, width)
            self._attach_memory("codes", adapter_name, codes)
            return
        self.baft_basis[adapter_name] = OrthonormalBasis(config.r, width, config.pack_ranks)
        self.baft_source[adapter_name] = source = nn.Linear(width, config.r, dtype=torch.float32)
        if config.gate_count:
            self.baft_gate[adapter_name] = Gate(config, width)
            self.baft_gate_usage[adapter_name] = torch.zeros(
                config.gate_count + 1, dtype=torch.float32
            )
        if config.init_weights and source.weight.device.type != "meta":
            nn.init.zeros_(source.weight)
            nn.init.zeros_(source.bias)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def attach_router(self, adapter_name: str, config: BaftConfig, width: int) -> None:
        """Make the router of a memory of edits, whose key block this is."""
        self.configs[adapter_name] = config
        self.in_features = self.out_features = width
        router = EditRouter(config, width)
        self._attach_memory("router", adapter_name, router)
        self.context.keep_routes()

    def _attach_memory(self, kind: str, adapter_name: str, part: EditCodes | EditRouter) -> None:
        """Add a part of a memory."""
        container = self.baft_codes if kind == "codes" else self.baft_router
        container[adapter_name] = part
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def detach(self) -> None:
        """Leave the block as it was before its first adapter."""
        self._handle.remove()
        forget_adapter(self.context._model, f"{self.name}.{CHILD}")
        del self._block[0]._modules[CHILD]
        for layer in self._layers_kept_unpacked:
            layer.support_avx512bf16_for_cpu = True

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters of this block on or off. Those that were frozen stay frozen."""
        self._disable_adapters = not enabled
        self._switch.turn(self, on=enabled)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        with self._switch.changing_flags(self):
            super().set_adapter(adapter_names, inference_mode=inference_mode)

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        with self._switch.changing_flags(self):
            super().set_requires_grad(adapter_names, requires_grad)

    def get_base_layer(self) -> nn.Module:
        return self._block[0]

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, torch.dtype | None]:
        """Return device and dtype of the first of the block's own weights that is not quantised; None where there is none.

        Quantised weights may be stored under a dtype that nothing is computed in.
        """
        of_adapters = {id(parameter) for parameter in self.parameters()}
        for weight in base_layer.parameters():
            is_quantised = hasattr(weight, "quant_state") or weight.element_size() == 1
            if id(weight) not in of_adapters and weight.is_floating_point() and not is_quantised:
                return weight.device, weight.dtype
        return None, None

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter to its block's device, its parameters to the block's dtype. The gates' usage stays in float32."""
        device_of_block, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        device = device_of_block if device is None else device
        if device is not None and device.type == "meta":
            device = execution_device(self.get_base_layer())
        if device is None or device.type == "meta":
            return
        for container in (self.baft_basis, self.baft_source, self.baft_gate):
            if adapter_name in container and not any(
                p.is_meta for p in container[adapter_name].parameters()
            ):
                container[adapter_name].to(device, dtype)
        for part in (self.baft_codes, self.baft_router):
            if adapter_name in part and not any(b.is_meta for b in part[adapter_name].buffers()):
                part[adapter_name].to(device)
        if adapter_name in self.baft_gate_usage:
            usage = self.baft_gate_usage[adapter_name]
            self.baft_gate_usage[adapter_name] = usage.to(device, torch.float32)

    def forward(self, hidden: Tensor, call: Call) -> Tensor:
        """Edit the output of the block by all active adapters: each update is computed from the same `hidden`; they add up.

        Args:
            hidden: (batch, tokens, d), any floating dtype; updates are computed in the adapter's dtype.
            call: the forward that the block is part of.
        """
        active = call.active.get(self.name, self.active_adapters)
        in_use = active if call.row_adapters is None else call.row_adapters
        routers: Any = {
            n: r for n, r in self.baft_router.items() if n in in_use and n not in call.routes
        }
        if routers:
            self.context.routing.find(routers, hidden, call)
        recorded = self.context.gates_of(call)
        if call.row_adapters is not None:
            return self._edit_rows(hidden, call, call.row_adapters, recorded)
        active = [name for name in active if self.edits(name)]
        total: Tensor | None = None
        for adapter_name in active:
            mask = self.context.mask(call.relative_positions, hidden, self.configs[adapter_name])
            key = self.name if len(active) == 1 else (self.name, adapter_name)
            change = (
                self._coded(adapter_name, hidden, call)
                if adapter_name in self.baft_codes
                else self._update(adapter_name, key, hidden, mask, recorded)
            )
            if change is not None:
                total = change if total is None else total + change
        return hidden if total is None else (hidden + total).to(hidden.dtype)

    def edits(self, adapter_name: str) -> bool:
        """Tell whether an adapter edits the output of this block: the key block of a memory may tell its edits apart alone."""
        return adapter_name in self.baft_basis or adapter_name in self.baft_codes

    def _coded(self, adapter_name: str, hidden: Tensor, call: Call) -> Tensor | None:
        """Compute what the edits of a memory add, (rows, tokens, d); None where none of them is asked for."""
        routes = call.routes.get(adapter_name)
        if routes is None or routes.of_tokens is None:
            return None
        codes: Any = self.baft_codes[adapter_name]
        mask = self.context.mask(call.asked_positions, hidden, self.configs[adapter_name])
        assert mask is not None, "a forward with routes has positions"
        return routes.change(codes, mask, hidden)

    def change_at(self, adapter_name: str, h: Tensor) -> Tensor:
        """Compute Φ(h) - h of one adapter at vectors (m, d) that are all edited, whatever the model last ran on."""
        return self._update(adapter_name, None, h, None, None)

    def _edit_rows(
        self,
        hidden: Tensor,
        call: Call,
        row_adapters: list[str],
        recorded: dict[Any, RecordedGates] | None,
    ) -> Tensor:
        """Edit row i by adapter `row_adapters[i]` alone: each adapter computes its own rows, and no others."""
        if len(row_adapters) != hidden.shape[0]:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(row_adapters)} and {hidden.shape[0]} respectively."
            )
        present = [name for name in dict.fromkeys(row_adapters) if name in self.baft_basis]
        memories = [name for name in dict.fromkeys(row_adapters) if name in self.baft_codes]
        # Else a row is one vector, of a model that does not take tokens.
        rows_are_sequences = hidden.ndim == 3
        groups = (
            self._stackable_groups(present) if rows_are_sequences else [[name] for name in present]
        )
        edited_rows, edited_hidden = [], []
        for group in groups:
            rows_of = {
                name: [i for i, of_row in enumerate(row_adapters) if of_row == name]
                for name in group
            }
            rows = torch.tensor(list(chain.from_iterable(rows_of.values())), device=hidden.device)
            mask = self.context.mask(call.relative_positions, hidden, self.configs[group[0]])
            mask = None if mask is None else mask[rows]
            hidden_of_group = hidden[rows]
            if len(group) == 1:
                key = (self.name, group[0])
                change = self._update(group[0], key, hidden_of_group, mask, recorded)
            else:
                counts = {name: len(of_name) for name, of_name in rows_of.items()}
                change = self._update_side_by_side(counts, hidden_of_group, mask, recorded)
            edited_rows.append(rows)
            edited_hidden.append(hidden_of_group + change)
        for name in memories:
            added = self._coded(name, hidden, call)
            if added is not None:
                rows = torch.tensor([i for i, other in enumerate(row_adapters) if other == name])
                edited_rows.append(rows.to(hidden.device))
                edited_hidden.append((hidden + added)[edited_rows[-1]])
        if not edited_rows:
            return hidden
        return hidden.index_copy(
            0, torch.cat(edited_rows), torch.cat(edited_hidden).to(hidden.dtype)
        )

    def _stackable_groups(self, names: Iterable[str]) -> list[list[str]]:
        """Group the adapters whose parameters can be stacked: those of the same settings, dtype and device.

        Parameters that are offloaded or sharded are there only while their own module runs, so each of these stays by itself.
        """
        groups: dict[tuple, list[str]] = {}
        for name in names:
            weight = self.baft_source[name].weight
            key: tuple = (self.configs[name].forward_settings, weight.dtype, weight.device)
            if weight.is_meta or not weight.numel():
                key = (name,)
            groups.setdefault(key, []).append(name)
        return list(groups.values())

    def _update(
        self,
        adapter_name: str,
        key: Any,
        hidden: Tensor,
        mask: Tensor | None,
        recorded: dict[Any, RecordedGates] | None,
    ) -> Tensor:
        """Compute Φ(h) - h of one adapter at every token: (rows, tokens, d), 0 where it does not edit.

        Args:
            key: what the gates are recorded under. mask: (rows, tokens), or None to edit every vector.
        """
        source: Any = self.baft_source[adapter_name]
        with torch.autocast(hidden.device.type, enabled=False):
            h = hidden.to(source.weight.dtype)
            w = self.baft_gate[adapter_name](h) if adapter_name in self.baft_gate else None
            if w is not None and mask is not None and recorded is not None:
                recorded[key] = RecordedGates(w, mask)
            R: Tensor = self.baft_basis[adapter_name]().to(h.dtype)
            change = update(source(h), R, w)  # the source gives D h + b, which is A h + b - R h
        # Every token is computed and some are thrown away: to pick them out first would wait for the GPU.
        return change if mask is None else torch.where(mask[..., None], change, 0)

    def _update_side_by_side(
        self,
        counts: dict[str, int],
        hidden: Tensor,
        mask: Tensor | None,
        recorded: dict[Any, RecordedGates] | None,
    ) -> Tensor:
        """Compute `_update` of several adapters of the same settings at once, their parameters stacked.

        Args:
            counts: the adapters, in the order of their rows in `hidden`, and how many rows each has.
        """
        lengths = list(counts.values())
        adapter_of_row = torch.repeat_interleave(
            torch.arange(len(lengths)), torch.tensor(lengths)
        ).to(hidden.device)
        sources = [self.baft_source[name] for name in counts]
        bases = [self.baft_basis[name] for name in counts]
        gates: list[Any] = [self.baft_gate[name] for name in counts if name in self.baft_gate]
        with torch.autocast(hidden.device.type, enabled=False):
            source = stacked_parameters(sources, adapter_of_row)
            h, w = hidden.to(source["weight"].dtype), None
            if gates:
                w = torch.vmap(gates[0].weigh)(stacked_parameters(gates, adapter_of_row), h)
                if mask is not None and recorded is not None:
                    parts = zip(counts, w.split(lengths), mask.split(lengths), strict=True)
                    for name, w_of_adapter, mask_of_adapter in parts:
                        recorded[self.name, name] = RecordedGates(w_of_adapter, mask_of_adapter)
            shift = torch.baddbmm(source["bias"][:, None], h, source["weight"].mT)
            change = update(shift, stacked_bases(bases)[adapter_of_row].to(h.dtype), w)
        return change if mask is None else torch.where(mask[..., None], change, 0)

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


def _edit_output(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
    """Edit the hidden vectors that a block returns, as its forward hook. At module level, so that models can be pickled."""
    layer: Any = block._modules.get(CHILD)
    if layer is None:
        return None
    call = layer.context.call_of_block(layer, first_tensor(args, kwargs))
    if call is None:
        if layer.disable_adapters:
            return None
        raise ValueError(layer.context.called_without_model())
    # A block that is run again for a backward is edited as it was, whatever has been switched since.
    if layer.name not in call.active:
        call.active[layer.name] = [] if layer.disable_adapters else list(layer.active_adapters)
    if not call.active[layer.name]:
        return None
    if isinstance(output, Tensor):
        return layer(output, call)
    return (layer(output[0], call), *output[1:])


def _keep_4bit_as_loaded(model: nn.Module) -> list[Any]:
    """Keep bitsandbytes from packing 4-bit weights anew for a CPU with bf16 instructions, and undo it where it has.

    It packs at a layer's first forward without gradients. Packed weights let no gradient through to earlier blocks, and
    become garbage when any state_dict is made of them, as to save an adapter (both with bitsandbytes 0.50).

    Returns:
        The layers, for `detach` to let them pack again.
    """
    layers: list[Any] = [
        module for module in model.modules() if getattr(module, "support_avx512bf16_for_cpu", False)
    ]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
        state: Any = getattr(layer.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpacked

            scales, state.original_nested = state.absmax.T.reshape(-1).float(), False
            layer.weight.data, _ = unpacked(layer.weight.data, state)
            state.absmax = scales
    return layers
