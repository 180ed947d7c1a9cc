"""A memory of edits as a kind of adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from peft_baft.adapter.blocks import last_block
from peft_baft.adapter.call import Call
from peft_baft.adapter.config import BaftConfig
from peft_baft.adapter.kinds import SavedTensor
from peft_baft.adapter.layer import BaftLayer
from peft_baft.memory.config import MemoryConfig
from peft_baft.memory.part import MemoryPart
from peft_baft.memory.tensors import require_consistent, saved_tensors

FORMAT = 4
PART = "part."
UNUSED = (
    "pack_ranks",
    "modules_to_save",
    "balance_weight",
    "answer_positions",
    "layers_to_transform",
    "layers_pattern",
    "exclude_modules",
)


class Memory:
    """A memory of edits: a router finds the edit that a prompt asks for, and the last block outputs its answer."""

    name: ClassVar[str] = "memory"
    settings: ClassVar[type | None] = MemoryConfig
    formats: ClassVar[range] = range(FORMAT, FORMAT + 1)
    trains: ClassVar[bool] = False
    sets: ClassVar[bool] = True
    needs_same_base: ClassVar[bool] = True
    editor: ClassVar[str | None] = "peft_baft.memory.editor:MemoryEditor"

    def check_config(self, config: BaftConfig) -> None:
        """Raise a ValueError if a config has settings that a memory does not use."""
        given = [name for name in UNUSED if getattr(config, name) not in (None, 0.0)]
        if config.target_modules is not None and not config.comes_from_a_file:
            given += [] if config.hidden_size is not None else ["target_modules"]
        if given:
            raise ValueError(
                f"A memory of edits has no {given[0]}, and is always in the last block: leave it out."
            )

    def saved_format(self, config: BaftConfig) -> int:
        """Return the number of the saved format."""
        return FORMAT

    def choose_blocks(self, model: nn.Module, config: BaftConfig) -> list[str]:
        """Return the last block."""
        return [last_block(model)]

    def attach(self, layer: BaftLayer, adapter_name: str, config: BaftConfig, width: int) -> None:
        """Attach an empty memory to the last block."""
        part = MemoryPart(config, width, layer.context, adapter_name, layer.name)
        layer.baft_part[adapter_name] = part
        layer.context.read_texts()

    def change(
        self, layer: BaftLayer, adapter_name: str, hidden: Tensor, call: Call
    ) -> Tensor | None:
        """Compute the change of the block's output that produces the next tokens of answers."""
        change: Tensor | None = self._part(layer, adapter_name).change(hidden, call)
        return change

    def change_rows(
        self, layer: BaftLayer, rows: Mapping[str, Sequence[int]], hidden: Tensor, call: Call
    ) -> list[tuple[Tensor, Tensor]]:
        """Compute the changes of a mixed batch."""
        changes = []
        for name, numbers in rows.items():
            change = self._part(layer, name).change(hidden, call, set(numbers))
            if change is not None:
                index = torch.tensor(numbers, device=hidden.device)
                changes.append((index, change[index]))
        return changes

    def saved_tensors(self, config: BaftConfig, block: str) -> dict[str, SavedTensor]:
        """Return the table of a memory's tensors."""
        settings: MemoryConfig = config.settings
        table = saved_tensors(config.hidden_size, settings.key_dimensions)
        return {f"{PART}{name}": saved for name, saved in table.items()}

    def check_tensors(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Raise a ValueError unless the tensors of a memory belong together."""
        require_consistent({name.removeprefix(PART): t for name, t in tensors.items()}, where)

    @staticmethod
    def _part(layer: BaftLayer, adapter_name: str) -> MemoryPart:
        return cast(MemoryPart, layer.baft_part[adapter_name])


MEMORY = Memory()
