"""Kinds of adapters of the PEFT type BAFT: what each one adds to a block's output, and what it saves.

Plain BaFT is one kind (`peft_baft.adapter.plain`). A package that adds another one registers it with `register_kind`; nothing
else in this folder depends on it. docs/kinds.md shows how, step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft_baft.adapter.call import Call
    from peft_baft.adapter.config import BaftConfig
    from peft_baft.adapter.layer import BaftLayer


@dataclass(frozen=True)
class SavedTensor:
    """The expected form of one tensor in an adapter's file.

    Attributes:
        shape: its sizes; None for those that the config does not determine.
        dtype: its dtype; None for a parameter, which may have any floating dtype and has the model's sizes.
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype | None = None

    def fits(self, tensor: Tensor) -> bool:
        """Return whether a tensor has this shape and dtype."""
        if tensor.ndim != len(self.shape) or self.dtype not in (None, tensor.dtype):
            return False
        sizes = zip(self.shape, tensor.shape, strict=True)
        return all(expected in (None, size) for expected, size in sizes)


class AdapterKind(Protocol):
    """One kind of adapter.

    Attributes:
        name: the keyword of `BaftConfig` that selects the kind, and the key of its settings in adapter_config.json.
        settings: the dataclass of its settings; None for plain BaFT, whose settings are `BaftConfig`'s own fields.
        formats: the saved formats that this version reads.
        trains: whether it has parameters trained by gradients.
        sets: whether it overwrites the vectors that it changes, whatever other active adapters add to them (if several
            overwrite one vector, the last active one wins). Otherwise changes are summed.
        needs_same_base: whether an adapter is refused on a base model other than its own; otherwise it is loaded with a
            warning.
        editor: `module:class` of the editor for such an adapter (`peft_baft.editor_for`), imported on demand; None if there
            is none.
    """

    name: ClassVar[str]
    settings: ClassVar[type | None]
    formats: ClassVar[range]
    trains: ClassVar[bool]
    sets: ClassVar[bool]
    needs_same_base: ClassVar[bool]
    editor: ClassVar[str | None]

    def check_config(self, config: BaftConfig) -> None:
        """Raise a ValueError if a config has fields that contradict the kind."""

    def saved_format(self, config: BaftConfig) -> int:
        """Return the lowest saved format that supports what a config uses."""

    def choose_blocks(self, model: nn.Module, config: BaftConfig) -> list[str]:
        """Return the full names of the blocks to attach an adapter to if its config names none."""

    def attach(self, layer: BaftLayer, adapter_name: str, config: BaftConfig, width: int) -> None:
        """Create what a new adapter stores in one block, for hidden vectors of `width`."""

    def change(
        self, layer: BaftLayer, adapter_name: str, hidden: Tensor, call: Call
    ) -> Tensor | None:
        """Compute Φ(h) - h at every token, (rows, tokens, d); None where nothing changes.

        Args:
            hidden: (rows, tokens, d), the block's own output. call: the running forward.
        """

    def change_rows(
        self, layer: BaftLayer, rows: Mapping[str, Sequence[int]], hidden: Tensor, call: Call
    ) -> list[tuple[Tensor, Tensor]]:
        """Compute the changes of a mixed batch.

        Args:
            rows: the rows that each adapter of this kind changes, by the adapter's name. hidden: (all rows, tokens, d).

        Returns:
            Pairs of row numbers (n,) and the change in these rows, (n, tokens, d).
        """

    def saved_tensors(self, config: BaftConfig, block: str) -> dict[str, SavedTensor]:
        """Return the tensors that an adapter's file must hold for a block, by the last part of their names."""

    def check_tensors(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Raise a ValueError unless a block's tensors, which fit individually, also fit together."""


class Part(nn.Module):
    """What an adapter of another kind than plain BaFT stores in one block: buffers that are replaced, never written into.

    A snapshot is therefore the tensors themselves, and loading accepts tensors of other lengths than the present ones. They
    keep their dtypes when the model is cast.

    Args:
        tensors: those of an empty adapter, by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        return {name: buffer for name, buffer in self._buffers.items() if buffer is not None}

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the tensors of these names; the new ones are moved to the device of the old."""
        for name, tensor in tensors.items():
            self._buffers[name] = tensor.to(self._buffers[name].device)  # type: ignore[union-attr]
        self.changed()

    def changed(self) -> None:
        """Discard whatever was computed from the tensors, because they have changed."""

    def answering(self, prompt: Sequence[int]) -> int | None:
        """Return the number of the edit that answers a prompt of these token ids; None if there is none."""
        return None

    def snapshot(self) -> Callable[[], None]:
        """Return a function that restores the present tensors."""
        tensors = self.tensors()
        return lambda: self.replace(tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Part:
        for name, buffer in self.tensors().items():
            moved = fn(torch.empty(0, device=buffer.device))
            if moved.is_meta:
                self._buffers[name] = torch.empty_like(buffer, device="meta")
            elif buffer.is_meta:
                self._buffers[name] = torch.zeros_like(buffer, device=moved.device)
            else:
                self._buffers[name] = buffer.to(moved.device)
        self.changed()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name, buffer in self.tensors().items():
            given = state_dict.get(prefix + name)
            if given is not None:
                # A new tensor: `copy_` would write into one that a snapshot holds.
                self._buffers[name] = torch.empty_like(given, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.changed()


KINDS: dict[str, AdapterKind] = {}  # by name
_MODULES: dict[str, str] = {}  # by a kind's name, the module that registers it on import


def register_kind(kind: AdapterKind) -> None:
    """Register a kind of adapter for configs and saved adapters."""
    KINDS[kind.name] = kind


def register_module(name: str, module: str) -> None:
    """Register a kind by name only; its module, which registers the rest, is imported on first use."""
    _MODULES[name] = module


def find_kind(name: str) -> AdapterKind | None:
    """Return the kind with this name, importing its module if necessary; None if there is none."""
    if name not in KINDS and name in _MODULES:
        import_module(_MODULES[name])
    return KINDS.get(name)
