"""Plain BaFT, the kind of adapter that `BaftConfig` makes by default: Φ(h) = h + Rᵀ W(h) (A h + b - R h), paper Eq. 3."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from peft_baft.adapter.blocks import block_names
from peft_baft.adapter.call import Call, RecordedGates
from peft_baft.adapter.kinds import SavedTensor, register_kind
from peft_baft.adapter.parameters import (
    Gate,
    OrthonormalBasis,
    gate_shapes,
    stacked_bases,
    stacked_parameters,
)
from peft_baft.intervention import update

if TYPE_CHECKING:
    from peft_baft.adapter.config import BaftConfig
    from peft_baft.adapter.layer import BaftLayer

# Adapters with `pack_ranks` or `answer_positions` have the second number, so that versions which do not know these refuse them.
FORMAT, EXTENDED_FORMAT = 1, 2


class Plain:
    """Plain BaFT, and with `weighting="none"` ReFT."""

    name: ClassVar[str] = "baft"
    settings: ClassVar[type | None] = None
    formats: ClassVar[range] = range(FORMAT, EXTENDED_FORMAT + 1)
    trains: ClassVar[bool] = True
    sets: ClassVar[bool] = False
    needs_same_base: ClassVar[bool] = False
    editor: ClassVar[str | None] = "peft_baft.editing.baft:BaftEditor"

    def check_config(self, config: BaftConfig) -> None:
        """Accept every config: its own checks are those of plain BaFT."""

    def saved_format(self, config: BaftConfig) -> int:
        """Return the number of the first saved format that has what a config uses."""
        is_extended = config.pack_ranks or config.answer_positions is not None
        return EXTENDED_FORMAT if is_extended else FORMAT

    def choose_blocks(self, model: nn.Module, config: BaftConfig) -> list[str]:
        """Return the blocks of `layers_to_transform`, by default the paper's."""
        return block_names(model, config.layers_to_transform, config.layers_pattern)

    def attach(self, layer: BaftLayer, adapter_name: str, config: BaftConfig, width: int) -> None:
        """Make the parameters of one more adapter of a block."""
        layer.baft_basis[adapter_name] = OrthonormalBasis(config.r, width, config.pack_ranks)
        layer.baft_source[adapter_name] = source = nn.Linear(width, config.r, dtype=torch.float32)
        if config.gate_count:
            layer.baft_gate[adapter_name] = Gate(config, width)
            layer.baft_gate_usage[adapter_name] = torch.zeros(
                config.gate_count + 1, dtype=torch.float32
            )
        if config.init_weights and source.weight.device.type != "meta":
            nn.init.zeros_(source.weight)
            nn.init.zeros_(source.bias)

    def change(self, layer: BaftLayer, adapter_name: str, hidden: Tensor, call: Call) -> Tensor:
        """Compute Φ(h) - h of one adapter at every token: (rows, tokens, d), 0 where it does not edit."""
        # Of other kinds, an adapter may be active that has nothing in this block.
        active = [name for name in call.active.get(layer.name, ()) if name in layer.configs]
        are_several = sum(layer.configs[name].kind is self for name in active) > 1
        mask = layer.context.mask(call.relative_positions, hidden, layer.configs[adapter_name])
        key = (layer.name, adapter_name) if are_several else layer.name
        return self._update(layer, adapter_name, key, hidden, mask, layer.context.gates_of(call))

    def change_at(self, layer: BaftLayer, adapter_name: str, h: Tensor) -> Tensor:
        """Compute Φ(h) - h of one adapter at vectors (m, d) that are all edited, whatever the model last ran on."""
        return self._update(layer, adapter_name, None, h, None, None)

    def change_rows(
        self, layer: BaftLayer, rows: Mapping[str, Sequence[int]], hidden: Tensor, call: Call
    ) -> list[tuple[Tensor, Tensor]]:
        """Compute the changes of a mixed batch, those of adapters that can be stacked side by side."""
        changes = []
        # Else a row is one vector, of a model that does not take tokens.
        rows_are_sequences = hidden.ndim == 3
        groups = _stackable_groups(layer, rows) if rows_are_sequences else [[name] for name in rows]
        recorded = layer.context.gates_of(call)
        for group in groups:
            numbers = list(chain.from_iterable(rows[name] for name in group))
            index = torch.tensor(numbers, device=hidden.device)
            mask = layer.context.mask(call.relative_positions, hidden, layer.configs[group[0]])
            mask = None if mask is None else mask[index]
            if len(group) == 1:
                key = (layer.name, group[0])
                change = self._update(layer, group[0], key, hidden[index], mask, recorded)
            else:
                counts = {name: len(rows[name]) for name in group}
                change = self._update_side_by_side(layer, counts, hidden[index], mask, recorded)
            changes.append((index, change))
        return changes

    def saved_tensors(self, config: BaftConfig, block: str) -> dict[str, SavedTensor]:
        """Return names and shapes of the tensors of a block."""
        r, d, k = config.r, config.hidden_size, config.gate_count
        shapes: dict[str, tuple[int | None, ...]] = {
            "basis.weight": (r, d),
            "source.weight": (r, d),
            "source.bias": (r,),
        }
        if k:
            shapes |= {f"gate.{name}": shape for name, shape in gate_shapes(config, d).items()}
            shapes["gate_usage"] = (k + 1,)
        return {name: SavedTensor(shape) for name, shape in shapes.items()}

    def check_tensors(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Accept tensors that fit one by one: nothing else is asked of them."""

    def _update(
        self,
        layer: BaftLayer,
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
        source: Any = layer.baft_source[adapter_name]
        with torch.autocast(hidden.device.type, enabled=False):
            h = hidden.to(source.weight.dtype)
            w = layer.baft_gate[adapter_name](h) if adapter_name in layer.baft_gate else None
            if w is not None and mask is not None and recorded is not None:
                recorded[key] = RecordedGates(w, mask)
            R: Tensor = layer.baft_basis[adapter_name]().to(h.dtype)
            change = update(source(h), R, w)  # the source gives D h + b, which is A h + b - R h
        # Every token is computed and some are thrown away: to pick them out first would wait for the GPU.
        return change if mask is None else torch.where(mask[..., None], change, 0)

    def _update_side_by_side(
        self,
        layer: BaftLayer,
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
        sources = [layer.baft_source[name] for name in counts]
        bases = [layer.baft_basis[name] for name in counts]
        gates: list[Any] = [layer.baft_gate[name] for name in counts if name in layer.baft_gate]
        with torch.autocast(hidden.device.type, enabled=False):
            source = stacked_parameters(sources, adapter_of_row)
            h, w = hidden.to(source["weight"].dtype), None
            if gates:
                w = torch.vmap(gates[0].weigh)(stacked_parameters(gates, adapter_of_row), h)
                if mask is not None and recorded is not None:
                    parts = zip(counts, w.split(lengths), mask.split(lengths), strict=True)
                    for name, w_of_adapter, mask_of_adapter in parts:
                        recorded[layer.name, name] = RecordedGates(w_of_adapter, mask_of_adapter)
            shift = torch.baddbmm(source["bias"][:, None], h, source["weight"].mT)
            change = update(shift, stacked_bases(bases)[adapter_of_row].to(h.dtype), w)
        return change if mask is None else torch.where(mask[..., None], change, 0)


def _stackable_groups(layer: BaftLayer, names: Iterable[str]) -> list[list[str]]:
    """Group the adapters whose parameters can be stacked: those of the same settings, dtype and device.

    Parameters that are offloaded or sharded are there only while their own module runs, so each of these stays by itself.
    """
    groups: dict[tuple, list[str]] = {}
    for name in names:
        weight: Any = layer.baft_source[name].weight
        key: tuple = (layer.configs[name].forward_settings, weight.dtype, weight.device)
        if weight.is_meta or not weight.numel():
            key = (name,)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


PLAIN = Plain()
register_kind(PLAIN)
