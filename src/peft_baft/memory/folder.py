"""Change a saved memory of edits without its model: forget edits, and put two memories together."""

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
    OF_EDITS,
    OF_MODEL,
    StoredEdit,
    largest_number,
    numbers_of,
    stored_edits,
    with_edits,
)
from peft_baft.storage import replace_file

NAMED = f"{MARK}{PART}"


@dataclass(frozen=True)
class SavedMemory:
    """A memory of edits as its folder holds it. start: how the names in the file begin. tensors: by the rest of the names."""

    config: BaftConfig
    start: str
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> SavedMemory:
        """Read a folder.

        Raises:
            ValueError: it holds no memory of edits, or a damaged one.
        """
        config = BaftConfig.from_pretrained(str(folder))
        if not isinstance(config, BaftConfig) or not isinstance(config.settings, MemoryConfig):
            raise ValueError(f"{folder} holds an adapter that is no memory of edits.")
        found = load_file(folder / FILE)
        (start,) = {name.rpartition(NAMED)[0] for name in found}
        return cls(config, start, {name.rpartition(NAMED)[2]: t for name, t in found.items()})

    @property
    def settings(self) -> MemoryConfig:
        """Its settings."""
        return self.config.settings  # type: ignore[no-any-return]

    @property
    def numbers(self) -> list[int]:
        """The numbers of its edits."""
        return numbers_of(self.tensors)

    def with_only(self, edits: Sequence[StoredEdit], made: int) -> SavedMemory:
        """Return the memory with these edits instead of its own. made: the largest number that was ever given."""
        head = {name: self.tensors[name][:1].clone() for name in OF_EDITS}
        head["edits"][0, 0] = made
        return replace(self, tensors={**self.tensors, **with_edits(head, edits)})

    def without(self, numbers: Collection[int]) -> SavedMemory:
        """Return the memory without some edits."""
        left = [edit for edit in stored_edits(self.tensors) if edit.number not in numbers]
        return self.with_only(left, largest_number(self.tensors))

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by their names in the file."""
        return {f"{self.start}{NAMED}{name}": tensor for name, tensor in self.tensors.items()}

    def write(self, folder: Path) -> None:
        """Put the weights in the place of what the folder holds, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / FILE, save(self.named(), {"format": "pt"}))


def saved_numbers(folder: Path) -> list[int] | None:
    """Read the numbers of the edits in a folder; None where it holds no memory of edits."""
    if not (folder / FILE).exists():
        return None
    with safe_open(folder / FILE, "pt") as file:
        for name in file.keys():  # noqa: SIM118, it is no dictionary
            if name.endswith(f"{NAMED}edits"):
                return numbers_of({"edits": file.get_tensor(name)})
    return None


def forget_saved(folder: Path, forgotten: Collection[int]) -> None:
    """Take edits out of the memory in a folder; the others are kept byte for byte.

    What a later run goes on from forgets them first, then the adapter: a kill between leaves an edit that is still there, and
    the same command takes it out.

    Raises:
        ValueError: there is no edit of such a number, no memory in the folder, or another process holds its journal.
    """
    memory, journal = SavedMemory.read(folder), Journal(folder)
    unknown = sorted(set(forgotten) - set(memory.numbers))
    if unknown:
        raise ValueError(
            f"{folder} has no edit {unknown[0]} in its memory: `baft log {folder}` lists those that it has."
        )
    left = memory.without(forgotten)
    with journal.writing():
        snapshots = journal.snapshots()
        if snapshots:
            state, header = journal.load_snapshot(snapshots[-1])
            others = {name: tensor for name, tensor in state.items() if name not in left.named()}
            journal.save_snapshot(snapshots[-1], {**left.named(), **others}, header)
        left.write(folder)
        for number in sorted(forgotten):
            journal.add(ForgetLine(number, now()))


def merge_saved(first: Path, second: Path, output: Path) -> dict[int, int]:
    """Put the edits of two memories of the same model into one; those of the second get numbers after those of the first.

    An edit of the second replaces one of the first that has the same question.

    Returns:
        Which edits were replaced, and by which, in the numbers of the result.

    Raises:
        ValueError: they are memories of different models or settings, or the output holds something.
    """
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty: name another folder for the merged memory.")
    one, two = SavedMemory.read(first), SavedMemory.read(second)
    _require_alike(one, two, first, second)
    made = largest_number(one.tensors)
    later = [replace(e, number=made + e.number) for e in stored_edits(two.tensors)]
    by_question = {edit.question: edit.number for edit in later}
    earlier = stored_edits(one.tensors)
    replaced = {e.number: by_question[e.question] for e in earlier if e.question in by_question}
    left = [edit for edit in earlier if edit.number not in replaced]
    merged = one.with_only([*left, *later], made + largest_number(two.tensors))
    output.mkdir(parents=True, exist_ok=True)
    config = json.loads((first / CONFIG_NAME).read_text("utf-8"))
    (output / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True), "utf-8")
    _merge_journals(Journal(first), Journal(second), Journal(output), made)
    merged.write(output)
    return replaced


def _merge_journals(first: Journal, second: Journal, output: Journal, made: int) -> None:
    """Write the edits of two journals into one."""
    with output.writing():
        for line in first.lines():
            output.add(line)
        state = second.state()
        if state.edits:
            output.add(RunLine(made, {"merged": str(second.folder)}))
        for edit in state.edits:
            output.add(replace(edit, edit=made + edit.edit))
        for number, line in state.forgotten.items():
            output.add(replace(line, forgotten=made + number))


def _require_alike(one: SavedMemory, two: SavedMemory, first: Path, second: Path) -> None:
    """Raise a ValueError unless two memories belong to the same model and have the same settings."""
    settings = ((memory.settings, memory.config.template_hash) for memory in (one, two))
    (of_one, hash_of_one), (of_two, hash_of_two) = settings
    if of_one != of_two or (hash_of_one != hash_of_two and None not in (hash_of_one, hash_of_two)):
        what = "settings" if of_one != of_two else "chat template"
        raise ValueError(
            f"{first} and {second} cannot be merged: the {what} of one are not those of the other."
        )
    same_names = one.start == two.start
    if not same_names or any(not torch.equal(one.tensors[n], two.tensors[n]) for n in OF_MODEL):
        raise ValueError(
            f"{first} and {second} cannot be merged: they were made for different models, with different versions of this "
            "package, or what was measured of the model was measured on different machines."
        )


def facts_by_number(lines: Sequence[EditLine]) -> dict[int, Sequence[Any]]:
    """Return prompt and target of each edit that a journal has, by its number."""
    return {line.edit: line.facts[0] for line in lines if line.facts}
