"""Change a saved memory of edits without its model: remove edits, and merge two memories."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from peft_baft.adapter import BaftConfig
from peft_baft.adapter.weights import FILE, MARK
from peft_baft.editing.journal import EditLine, ForgetLine, Journal, RunLine, now
from peft_baft.memory.config import MemoryConfig
from peft_baft.memory.kind import PART
from peft_baft.memory.tensors import (
    HEADER,
    NUMBER,
    PER_EDIT,
    PER_MODEL,
    StoredEdit,
    add_edits,
    edit_numbers,
    largest_number,
    stored_edits,
)
from peft_baft.storage import replace_file

PREFIX = f"{MARK}{PART}"  # of tensor names in the file, after the name of the block


@dataclass(frozen=True)
class SavedMemory:
    """A memory of edits that was saved in a folder.

    Attributes:
        start: the start of all tensor names in the file, up to the name of the block.
        tensors: by the rest of their names.
    """

    config: BaftConfig
    start: str
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> SavedMemory:
        """Load a folder.

        Raises:
            ValueError: it does not contain a memory of edits, or the memory is damaged.
        """
        config = BaftConfig.from_pretrained(str(folder))
        if not isinstance(config, BaftConfig) or not isinstance(config.settings, MemoryConfig):
            raise ValueError(f"{folder} contains an adapter that is not a memory of edits.")
        found = load_file(folder / FILE)
        (start,) = {name.rpartition(PREFIX)[0] for name in found}
        return cls(config, start, {name.rpartition(PREFIX)[2]: t for name, t in found.items()})

    @property
    def settings(self) -> MemoryConfig:
        """The memory's settings."""
        settings: MemoryConfig = self.config.settings
        return settings

    @property
    def numbers(self) -> list[int]:
        """The numbers of the edits."""
        return edit_numbers(self.tensors)

    def with_only(self, edits: Sequence[StoredEdit], largest: int) -> SavedMemory:
        """Return the memory with these edits instead of its own.

        Args:
            largest: the largest number that was ever assigned to an edit.
        """
        headers = {name: self.tensors[name][:HEADER].clone() for name in PER_EDIT}
        headers["edits"][0, NUMBER] = largest
        return replace(self, tensors={**self.tensors, **add_edits(headers, edits)})

    def without(self, numbers: Collection[int]) -> SavedMemory:
        """Return the memory without some edits."""
        rest = [edit for edit in stored_edits(self.tensors) if edit.number not in numbers]
        return self.with_only(rest, largest_number(self.tensors))

    def file_tensors(self) -> dict[str, Tensor]:
        """Return the tensors by their names in the file."""
        return {f"{self.start}{PREFIX}{name}": tensor for name, tensor in self.tensors.items()}

    def write(self, folder: Path) -> None:
        """Replace the weights in the folder atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / FILE, save(self.file_tensors(), {"format": "pt"}))


def saved_numbers(folder: Path) -> list[int] | None:
    """Return the numbers of the edits in a folder; None if it does not contain a memory of edits."""
    if not (folder / FILE).exists():
        return None
    with safe_open(folder / FILE, "pt") as file:
        for name in file.keys():  # noqa: SIM118, it is not a dictionary
            if name.endswith(f"{PREFIX}edits"):
                return edit_numbers({"edits": file.get_tensor(name)})
    return None


def forget_saved(folder: Path, forgotten: Collection[int]) -> None:
    """Remove edits from the memory in a folder; the others stay unchanged byte for byte.

    The snapshot from which a later run resumes is changed first, and then the adapter. If the process is killed in between, the
    edits are still in the adapter, and the same command removes them.

    Raises:
        ValueError: there is no edit with such a number, no memory in the folder, or another process has locked its journal.
    """
    memory, journal = SavedMemory.read(folder), Journal(folder)
    unknown = sorted(set(forgotten) - set(memory.numbers))
    if unknown:
        raise ValueError(
            f"{folder} has no edit {unknown[0]} in its memory; `baft log {folder}` lists its edits."
        )
    rest = memory.without(forgotten)
    with journal.writing():
        snapshots = journal.snapshots()
        if snapshots:
            state, header = journal.load_snapshot(snapshots[-1])
            others = {
                name: tensor for name, tensor in state.items() if name not in rest.file_tensors()
            }
            journal.save_snapshot(snapshots[-1], {**rest.file_tensors(), **others}, header)
        rest.write(folder)
        for number in sorted(forgotten):
            journal.add(ForgetLine(number, now()))


def merge_saved(first: Path, second: Path, output: Path) -> dict[int, int]:
    """Merge two memories of the same model; the edits of the second are numbered after those of the first.

    An edit of the second memory replaces an edit of the first with the same question.

    Returns:
        For each replaced edit the one that replaces it, by their numbers in the result.

    Raises:
        ValueError: the memories are for different models or have different settings, or the output folder is not empty.
    """
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty: name another folder for the merged memory.")
    one, two = SavedMemory.read(first), SavedMemory.read(second)
    _require_compatible(one, two, first, second)
    offset = largest_number(one.tensors)
    later = [replace(e, number=offset + e.number) for e in stored_edits(two.tensors)]
    by_question = {edit.question: edit.number for edit in later}
    earlier = stored_edits(one.tensors)
    replaced = {e.number: by_question[e.question] for e in earlier if e.question in by_question}
    rest = [edit for edit in earlier if edit.number not in replaced]
    merged = one.with_only([*rest, *later], offset + largest_number(two.tensors))
    output.mkdir(parents=True, exist_ok=True)
    config = json.loads((first / CONFIG_NAME).read_text("utf-8"))
    (output / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True), "utf-8")
    _merge_journals(Journal(first), Journal(second), Journal(output), offset)
    merged.write(output)
    return replaced


def _merge_journals(first: Journal, second: Journal, output: Journal, offset: int) -> None:
    """Merge two journals, adding `offset` to the numbers of the second."""
    with output.writing():
        for line in first.lines():
            output.add(line)
        state = second.state()
        if state.edits:
            output.add(RunLine(offset, {"merged": str(second.folder)}))
        for edit in state.edits:
            output.add(replace(edit, edit=offset + edit.edit))
        for number, line in state.forgotten.items():
            output.add(replace(line, forgotten=offset + number))


def _require_compatible(one: SavedMemory, two: SavedMemory, first: Path, second: Path) -> None:
    """Raise a ValueError unless two memories are for the same model and have the same settings."""
    hashes = {one.config.template_hash, two.config.template_hash} - {None}
    if one.settings != two.settings:
        raise ValueError(f"{first} and {second} cannot be merged: their settings differ.")
    if len(hashes) > 1:
        raise ValueError(f"{first} and {second} cannot be merged: their chat templates differ.")
    same_names = one.start == two.start
    if not same_names or any(not torch.equal(one.tensors[n], two.tensors[n]) for n in PER_MODEL):
        raise ValueError(
            f"{first} and {second} cannot be merged: they were made for different models, with different versions of this "
            "package, or from measurements on different machines."
        )


def facts_by_number(lines: Sequence[EditLine]) -> dict[int, Sequence[Any]]:
    """Return the prompt and target of each edit in a journal, by its number."""
    return {line.edit: line.facts[0] for line in lines if line.facts}
