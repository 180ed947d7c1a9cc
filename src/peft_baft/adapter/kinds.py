"""The kinds of adapters of the PEFT type BAFT: what each one adds to a block's output, and what it saves.

Plain BaFT is one kind (`peft_baft.adapter.plain`). A package that brings another one registers it with `register_kind`; nothing
else in this folder knows of it. docs/kinds.md adds one step by step.
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
    """What an adapter's file holds under one name.

    Attributes:
        shape: sizes; None where the config does not tell them.
        dtype: of the tensor; None for a parameter: floating-point numbers of any width, in the sizes that the model has.
    """

    shape: tuple[int | None, ...]
    dtype: torch.dtype | None = None

    def fits(self, tensor: Tensor) -> bool:
        """Return whether a tensor has this number of dimensions, these sizes and this dtype."""
        if tensor.ndim != len(self.shape) or self.dtype not in (None, tensor.dtype):
            return False
        sizes = zip(self.shape, tensor.shape, strict=True)
        return all(expected in (None, size) for expected, size in sizes)


class AdapterKind(Protocol):
    """One kind of adapter.

    Attributes:
        name: the keyword of `BaftConfig` that chooses the kind, and the key of its settings in adapter_config.json.
        settings: the dataclass of its settings; None for plain BaFT, whose settings are `BaftConfig`'s own fields.
        formats: numbers of the saved formats that this version reads.
        trains: whether it has parameters that gradients train.
        sets: whether it sets vectors that it changes to others, whatever further active adapters add to them; of several that
            set one vector, the last active one does. Else changes add up.
        needs_same_base: whether an adapter is refused on another base model than the one that it was made on; else a warning
            says so.
        editor: `module:class` of what edits such an adapter (`peft_baft.editor_for`), imported when it is needed; None if
            nothing does.
    """

    name: ClassVar[str]
    settings: ClassVar[type | None]
    formats: ClassVar[range]
    trains: ClassVar[bool]
    sets: ClassVar[bool]
    needs_same_base: ClassVar[bool]
    editor: ClassVar[str | None]

    def check_config(self, config: BaftConfig) -> None:
        """Raise a ValueError if fields of a config contradict the kind."""

    def saved_format(self, config: BaftConfig) -> int:
        """Return the number of the first saved format that has what a config uses."""

    def choose_blocks(self, model: nn.Module, config: BaftConfig) -> list[str]:
        """Return the full names of the blocks that an adapter is attached to, where its config names none."""

    def attach(self, layer: BaftLayer, adapter_name: str, config: BaftConfig, width: int) -> None:
        """Make what a new adapter has in one block, for hidden vectors of `width`."""

    def change(
        self, layer: BaftLayer, adapter_name: str, hidden: Tensor, call: Call
    ) -> Tensor | None:
        """Compute Φ(h) - h at every token, (rows, tokens, d); None where nothing changes.

        Args:
            hidden: (rows, tokens, d), the block's own output. call: the forward that it belongs to.
        """

    def change_rows(
        self, layer: BaftLayer, rows: Mapping[str, Sequence[int]], hidden: Tensor, call: Call
    ) -> list[tuple[Tensor, Tensor]]:
        """Compute the changes of a mixed batch.

        Args:
            rows: by the name of an adapter of this kind, the rows that it changes. hidden: (all rows, tokens, d).

        Returns:
            Pairs of row numbers (n,) and the change of these rows, (n, tokens, d).
        """

    def saved_tensors(self, config: BaftConfig, block: str) -> dict[str, SavedTensor]:
        """Return what the adapter's file holds for a block, by the end of the name; nothing if the block has none."""

    def check_tensors(self, tensors: Mapping[str, Tensor], where: str) -> None:
        """Raise a ValueError unless a block's tensors, which fit one by one, belong together."""


class Part(nn.Module):
    """What an adapter of another kind than plain BaFT has in one block: buffers that are replaced, never written into.

    To remember a state is then to remember its tensors, and loading takes tensors of other lengths than those that are there.
    They keep their dtypes when the model is cast.

    Args:
        tensors: by name, of an empty adapter.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name."""
        return {name: buffer for name, buffer in self._buffers.items() if buffer is not None}

    def replace(self, tensors: Mapping[str, Tensor]) -> None:
        """Put tensors in the place of those of the same names, on the device of those."""
        for name, tensor in tensors.items():
            self._buffers[name] = tensor.to(self._buffers[name].device)  # type: ignore[union-attr]
        self.changed()

    def changed(self) -> None:
        """Forget what was computed from the tensors: they are others now."""

    def answering(self, prompt: Sequence[int]) -> int | None:
        """Return the number of the edit that answers a prompt of these tokens, if the kind has edits; else None."""
        return None

    def snapshot(self) -> Callable[[], None]:
        """Remember the tensors; calling the result puts them back."""
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
                # A new tensor: `copy_` would write into one that a snapshot remembers.
                self._buffers[name] = torch.empty_like(given, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.changed()


KINDS: dict[str, AdapterKind] = {}  # by name
_MODULES: dict[
    str, str
] = {}  # by the names of kinds: the modules that register them when they are imported


def register_kind(kind: AdapterKind) -> None:
    """Make a kind of adapter known, for configs and saved adapters."""
    KINDS[kind.name] = kind


def register_module(name: str, module: str) -> None:
    """Make a kind known by its name; its module is imported, and registers it, when a config first uses it."""
    _MODULES[name] = module


def find_kind(name: str) -> AdapterKind | None:
    """Return the kind of a name, importing its module if necessary; None if there is no such kind."""
    if name not in KINDS and name in _MODULES:
        import_module(_MODULES[name])
    return KINDS.get(name)
