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

# Adapters with `pack_ranks` or `answer_positions` have the second number: versions that do not know these fields refuse them.
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
        """Accept every config: `BaftConfig` itself checks plain BaFT."""

    def saved_format(self, config: BaftConfig) -> int:
        """Return the lowest saved format that supports what a config uses."""
        is_extended = config.pack_ranks or config.answer_positions is not None
        return EXTENDED_FORMAT if is_extended else FORMAT

    def choose_blocks(self, model: nn.Module, config: BaftConfig) -> list[str]:
        """Return the blocks of `layers_to_transform`, the paper's by default."""
        return block_names(model, config.layers_to_transform, config.layers_pattern)

    def attach(self, layer: BaftLayer, adapter_name: str, config: BaftConfig, width: int) -> None:
        """Create an adapter's parameters in a block."""
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
        """Compute Φ(h) - h of one adapter at every token, (rows, tokens, d); 0 where it does not edit."""
        # An active adapter of another kind may have nothing in this block.
        active = [name for name in call.active.get(layer.name, ()) if name in layer.configs]
        are_several = sum(layer.configs[name].kind is self for name in active) > 1
        mask = layer.context.mask(call.relative_positions, hidden, layer.configs[adapter_name])
        key = (layer.name, adapter_name) if are_several else layer.name
        return self._update(layer, adapter_name, key, hidden, mask, layer.context.gates_of(call))

    def change_at(self, layer: BaftLayer, adapter_name: str, h: Tensor) -> Tensor:
        """Compute Φ(h) - h of one adapter at vectors (m, d), all of them edited, outside of any forward."""
        return self._update(layer, adapter_name, None, h, None, None)

    def change_rows(
        self, layer: BaftLayer, rows: Mapping[str, Sequence[int]], hidden: Tensor, call: Call
    ) -> list[tuple[Tensor, Tensor]]:
        """Compute the changes of a mixed batch; adapters with the same settings are computed together."""
        changes = []
        # Otherwise a row is a single vector, of a model that does not take tokens.
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
                change = self._update_stacked(layer, counts, hidden[index], mask, recorded)
            changes.append((index, change))
        return changes

    def saved_tensors(self, config: BaftConfig, block: str) -> dict[str, SavedTensor]:
        """Return the tensors of a block by name."""
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
        """Accept tensors that fit individually: there is nothing else to check."""

    def _update(
        self,
        layer: BaftLayer,
        adapter_name: str,
        key: str | tuple[str, str] | None,
        hidden: Tensor,
        mask: Tensor | None,
        recorded: dict[Any, RecordedGates] | None,
    ) -> Tensor:
        """Compute Φ(h) - h of one adapter at every token, (rows, tokens, d); 0 where it does not edit.

        Args:
            key: under which the gates are recorded. mask: (rows, tokens), or None to edit every vector.
        """
        source: Any = layer.baft_source[adapter_name]
        with torch.autocast(hidden.device.type, enabled=False):
            h = hidden.to(source.weight.dtype)
            w = layer.baft_gate[adapter_name](h) if adapter_name in layer.baft_gate else None
            if w is not None and mask is not None and recorded is not None:
                recorded[key] = RecordedGates(w, mask)
            R: Tensor = layer.baft_basis[adapter_name]().to(h.dtype)
            change = update(source(h), R, w)  # the source computes D h + b, which is A h + b - R h
        # All tokens are computed and some discarded: selecting them first would wait for the GPU.
        return change if mask is None else torch.where(mask[..., None], change, 0)

    def _update_stacked(
        self,
        layer: BaftLayer,
        counts: dict[str, int],
        hidden: Tensor,
        mask: Tensor | None,
        recorded: dict[Any, RecordedGates] | None,
    ) -> Tensor:
        """Compute `_update` of several adapters with the same settings in one pass, with stacked parameters.

        Args:
            counts: the number of rows of each adapter, in the order of their rows in `hidden`.
        """
        lengths = list(counts.values())
        numbers = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        adapter_of_row = numbers.to(hidden.device)
        sources = [layer.baft_source[name] for name in counts]
        bases = [layer.baft_basis[name] for name in counts]
        gates: list[Any] = [layer.baft_gate[name] for name in counts if name in layer.baft_gate]
        with torch.autocast(hidden.device.type, enabled=False):
            source = stacked_parameters(sources, adapter_of_row)
            h, w = hidden.to(source["weight"].dtype), None
            if gates:
                w = torch.vmap(gates[0].weigh)(stacked_parameters(gates, adapter_of_row), h)
                if mask is not None and recorded is not None:
                    splits = torch.split(w, lengths), torch.split(mask, lengths)
                    for name, *gates_and_mask in zip(counts, *splits, strict=True):
                        recorded[layer.name, name] = RecordedGates(*gates_and_mask)
            shift = torch.baddbmm(source["bias"][:, None], h, source["weight"].mT)
            change = update(shift, stacked_bases(bases)[adapter_of_row].to(h.dtype), w)
        return change if mask is None else torch.where(mask[..., None], change, 0)


def _stackable_groups(layer: BaftLayer, names: Iterable[str]) -> list[list[str]]:
    """Group adapters whose parameters can be stacked: those with the same settings, dtype and device.

    Offloaded or sharded parameters exist only while their own module runs, so each of these adapters is a group by itself.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name in names:
        weight: Any = layer.baft_source[name].weight
        key: tuple[Any, ...] = (layer.configs[name].forward_settings, weight.dtype, weight.device)
        if weight.is_meta or not weight.numel():
            key = (name,)
        groups.setdefault(key, []).append(name)
    return list(groups.values())


PLAIN = Plain()
register_kind(PLAIN)
