"""The adapters of one block: their parameters, and the hook that edits the block's output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from peft_baft.adapter.call import Call, first_tensor
from peft_baft.adapter.config import BaftConfig
from peft_baft.adapter.context import EditContext
from peft_baft.adapter.kinds import AdapterKind, Part
from peft_baft.adapter.offloading import execution_device, forget_adapter, place_adapter
from peft_baft.adapter.parameters import Counts
from peft_baft.adapter.quantised import allow_packing, is_quantised, keep_unpacked
from peft_baft.adapter.switching import Switch
from peft_baft.adapter.weights import MARK

CHILD = "baft"  # the name of a block's BaftLayer; must not contain PEFT's prefix `baft_`
CANNOT_MERGE = (
    "A BaFT adapter cannot be merged into the model's weights: its update depends on the hidden vector, through the gates, "
    "and is applied to some tokens only. Keep the adapter separate, or call unload() to get the unedited model back."
)
BLOCK_WITHOUT_MODEL = (
    "A block with a BaFT adapter was called directly instead of through its model, {}. Only a call of the model determines where "
    "prompts end. Call the model."
)


class BaftLayer(nn.Module, BaseTunerLayer):
    """All BaFT adapters of one block, as a child module of the block.

    Each container maps the name of an adapter to:

    - `baft_basis`: R (r, d).
    - `baft_source`: D = A - R (r, d) and b (r,). Storing D instead of A makes a fresh adapter (D = 0, b = 0) exactly the
      identity, on every device and in every dtype, and weight decay pulls towards no edit.
    - `baft_gate`: the gates, if it has any.
    - `baft_part`: for adapters of another kind than plain BaFT, whatever that kind stores, instead of the above.
    - `baft_gate_usage`: (k + 1,) the sum of each of the k gates over the edited tokens of past edits, then the number of
      these tokens. Always float32, because it counts.

    Args:
        block: the module whose output is edited; it gets a forward hook, and this layer as a child.
        name: the block's name in the base model.
        context: determines which tokens are edited; all blocks of a model share it.
    """

    # PEFT looks for adapters under these names: what is trained, and what else is saved.
    adapter_layer_names = ("baft_basis", "baft_source", "baft_gate")
    other_param_names = ("baft_gate_usage", "baft_part", "configs")

    def __init__(self, block: nn.Module, name: str, context: EditContext) -> None:
        super().__init__()
        self.baft_basis = nn.ModuleDict()
        self.baft_source = nn.ModuleDict()
        self.baft_gate = nn.ModuleDict()
        self.baft_part = nn.ModuleDict()
        self.baft_gate_usage = Counts(persistent=True)
        self.configs: dict[str, BaftConfig] = {}
        self.name, self.context = name, context
        self._block = [block]  # in a list: as an attribute it would become a child of its own child
        self._disable_adapters, self._active_adapter, self.merged_adapters = False, [], []
        self._switch = Switch()
        self._unpacked_layers: list[nn.Module] = []
        # Prepended, so that other hooks on the block, such as those that record hidden states, see the edited output.
        self._handle = block.register_forward_hook(_edit_output, prepend=True, with_kwargs=True)
        place_adapter(context.model, f"{name}.{CHILD}", block)

    def attach(self, adapter_name: str, config: BaftConfig, width: int) -> None:
        """Create an adapter's parameters for hidden vectors of `width`, on the block's device."""
        self._unpacked_layers += keep_unpacked(self.context.model)
        self.configs[adapter_name] = config
        self.in_features = self.out_features = width
        config.kind.attach(self, adapter_name, config, width)
        if adapter_name in self.baft_part:
            self._resize_part(adapter_name, config.shapes_to_load)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def _resize_part(self, adapter_name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Resize the tensors of an adapter of another kind to those that will be loaded, by their names in a file."""
        part = cast(Part, self.baft_part[adapter_name])
        for name, tensor in part.tensors().items():
            shape = shapes.get(f"{self.name}{MARK}part.{name}", tensor.shape)
            if shape != tuple(tensor.shape):
                part.replace({name: torch.zeros(shape, dtype=tensor.dtype)})

    def detach(self) -> None:
        """Restore the block to its state before the first adapter."""
        self._handle.remove()
        forget_adapter(self.context.model, f"{self.name}.{CHILD}")
        del self._block[0]._modules[CHILD]
        allow_packing(self._unpacked_layers)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the block's adapters on or off. Frozen parameters stay frozen."""
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
        """Return device and dtype of the block's first weight that is not quantised; None if there is none."""
        own = {id(parameter) for parameter in self.parameters()}
        for weight in base_layer.parameters():
            if id(weight) not in own and weight.is_floating_point() and not is_quantised(weight):
                return weight.device, weight.dtype
        return None, None

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter to its block's device, and its parameters to the block's dtype."""
        device_of_block, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        device = device_of_block if device is None else device
        if device is not None and device.type == "meta":
            device = execution_device(self.get_base_layer())
        if device is None or device.type == "meta":
            return
        for container in (self.baft_basis, self.baft_source, self.baft_gate):
            if adapter_name in container and not _is_on_meta(container[adapter_name]):
                container[adapter_name].to(device, dtype)
        if adapter_name in self.baft_part and not _is_on_meta(self.baft_part[adapter_name]):
            self.baft_part[adapter_name].to(device)
        if adapter_name in self.baft_gate_usage:
            usage = self.baft_gate_usage[adapter_name]
            self.baft_gate_usage[adapter_name] = usage.to(device, torch.float32)

    def forward(self, hidden: Tensor, call: Call) -> Tensor:
        """Edit the block's output by all active adapters, each computed from the same `hidden`.

        Updates are summed; those of kinds that set vectors are applied last.

        Args:
            hidden: (batch, tokens, d), any floating dtype; updates are computed in the adapter's dtype.
            call: the forward that the block is part of.
        """
        if call.row_adapters is not None:
            return self._edit_rows(hidden, call, call.row_adapters)
        total: Tensor | None = None
        active = call.active.get(self.name, self.active_adapters)
        here = [name for name in active if name in self.configs]
        for adapter_name in sorted(here, key=lambda name: self.configs[name].kind.sets):
            kind = self.configs[adapter_name].kind
            change = kind.change(self, adapter_name, hidden, call)
            if change is None:
                continue
            if total is not None and kind.sets:
                is_set = change.any(-1, keepdim=True)
                # In the wider of the two dtypes, so that the vector that is set keeps its precision.
                total = torch.where(is_set, change, total.to(change.dtype))
            else:
                total = change if total is None else total + change
        return hidden if total is None else (hidden + total).to(hidden.dtype)

    def parts(self) -> list[Part]:
        """Return what adapters of other kinds than plain BaFT store in this block."""
        return [part for part in self.baft_part.values() if isinstance(part, Part)]

    def _edit_rows(self, hidden: Tensor, call: Call, row_adapters: list[str]) -> Tensor:
        """Edit row i by adapter `row_adapters[i]` only; each adapter computes its own rows and no others."""
        if len(row_adapters) != hidden.shape[0]:
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(row_adapters)} and {hidden.shape[0]} respectively."
            )
        by_kind: dict[int, tuple[AdapterKind, dict[str, list[int]]]] = {}
        for row, name in enumerate(row_adapters):
            if name in self.configs:
                kind = self.configs[name].kind
                _, rows_of_adapter = by_kind.setdefault(id(kind), (kind, {}))
                rows_of_adapter.setdefault(name, []).append(row)
        changes: list[tuple[Tensor, Tensor]] = []
        for kind, rows_of_adapter in by_kind.values():
            changes += kind.change_rows(self, rows_of_adapter, hidden, call)
        if not changes:
            return hidden
        edited = [(hidden[rows] + change).to(hidden.dtype) for rows, change in changes]
        return hidden.index_copy(0, torch.cat([rows for rows, _ in changes]), torch.cat(edited))

    def merge(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def unmerge(self) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def __repr__(self) -> str:
        return "baft." + super().__repr__()


def _is_on_meta(module: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def _edit_output(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Edit the hidden vectors that a block returns: its forward hook, at module level so that models can be pickled."""
    layer = cast("BaftLayer | None", block._modules.get(CHILD))
    if layer is None:
        return None
    call = layer.context.call_of_block(layer, first_tensor(args, kwargs))
    if call is None:
        if layer.disable_adapters:
            return None
        raise ValueError(BLOCK_WITHOUT_MODEL.format(type(layer.context.model).__name__))
    # A block that runs again for a backward is edited as it was the first time, whatever was switched since.
    if layer.name not in call.active:
        call.active[layer.name] = [] if layer.disable_adapters else list(layer.active_adapters)
    if not call.active[layer.name]:
        return None
    if isinstance(output, Tensor):
        return layer(output, call)
    return (layer(output[0], call), *output[1:])
