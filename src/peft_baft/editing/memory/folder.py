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
from peft_baft.adapter.memory import OF_EDITS, OF_TOKENS, of_edits
from peft_baft.adapter.taught_form import BOTH, RAW
from peft_baft.adapter.weights import FILE, memory_sizes
from peft_baft.editing.journal import EditLine, ForgetLine, Journal, RunLine, now
from peft_baft.storage import replace_file

ROUTER = ".baft.baft_router."
OF_MODEL = (
    "mean",
    "whitening",
    "texts",
    "sample",
    "relation_keys",
    "wordings",
    "relation_names",
    "before",
    "after",
)  # the same for every memory on a model


@dataclass(frozen=True)
class SavedMemory:
    """A memory of edits as its folder holds it. tensors: by the names in the file."""

    config: BaftConfig
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> SavedMemory:
        """Read a folder.

        Raises:
            ValueError: it holds no memory of edits, or a damaged one.
        """
        config = BaftConfig.from_pretrained(str(folder))
        if not isinstance(config, BaftConfig) or not config.memory:
            raise ValueError(f"{folder} holds an adapter that is no memory of edits.")
        return cls(config, load_file(folder / FILE))

    def part(self, name: str) -> Tensor:
        """Get a tensor of the router."""
        return next(t for key, t in self.tensors.items() if key.endswith(f"{ROUTER}{name}"))

    @property
    def numbers(self) -> list[int]:
        """The numbers of its edits."""
        return self.part("numbers").tolist()

    @property
    def form(self) -> str | None:
        """The form in which its questions and the wordings of relations are put to the model, where that is known."""
        return RAW if self.config.template == BOTH else self.config.template

    def statistics(self) -> dict[str, Tensor]:
        """What was measured of the base model, and is the same for every memory on it."""
        return {name: self.part(name) for name in OF_MODEL}

    def questions(self) -> list[tuple[int, ...]]:
        """The tokens of each edit's question."""
        parts = self.part("ids").split(self.part("lengths").tolist())
        return [tuple(part.tolist()) for part in parts] if self.numbers else []

    def only(self, places: Sequence[int]) -> SavedMemory:
        """Keep the edits at some places alone, in this order."""
        return replace(self, tensors=of_edits(self.tensors, self.part("lengths").tolist(), places))

    def with_numbers(self, numbers: Sequence[int], made: int) -> SavedMemory:
        """Give the edits other numbers. made: the largest one that was ever given."""
        changed = {"numbers": numbers, "made": made}
        return replace(
            self,
            tensors={
                name: torch.tensor(changed[last], dtype=torch.int32)
                if ROUTER in name and (last := name.rpartition(".")[2]) in changed
                else tensor
                for name, tensor in self.tensors.items()
            },
        )

    def followed_by(self, other: SavedMemory) -> SavedMemory:
        """Put the edits of another memory, with numbers of their own, behind these."""
        tensors = {}
        for name, tensor in self.tensors.items():
            of_both = name.rpartition(".")[2] in (*OF_EDITS, *OF_TOKENS)
            tensors[name] = torch.cat([tensor, other.tensors[name]]) if of_both else tensor
        return replace(self, tensors=tensors)

    def write(self, folder: Path) -> None:
        """Put it in the place of what the folder holds: the weights first, each file whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / FILE, save(dict(self.tensors), {"format": "pt"}))
        sizes = memory_sizes({name: tuple(t.shape) for name, t in self.tensors.items()})
        file = folder / CONFIG_NAME
        known = self.config.to_dict() if not file.exists() else json.loads(file.read_text("utf-8"))
        text = json.dumps(known | {"memory_sizes": sizes}, indent=2, sort_keys=True, default=list)
        replace_file(file, text.encode())


def saved_numbers(folder: Path) -> list[int] | None:
    """Read the numbers of the edits in a folder; None where it holds no memory of edits."""
    if not (folder / FILE).exists():
        return None
    with safe_open(folder / FILE, "pt") as file:
        for name in file.keys():  # noqa: SIM118, it is no dictionary
            if name.endswith(f"{ROUTER}numbers"):
                return file.get_tensor(name).tolist()
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
    left = memory.only([i for i, n in enumerate(memory.numbers) if n not in forgotten])
    with journal.writing():
        snapshots = journal.snapshots()
        if snapshots:
            state, header = journal.load_snapshot(snapshots[-1])
            others = {name: tensor for name, tensor in state.items() if name not in left.tensors}
            journal.save_snapshot(snapshots[-1], {**left.tensors, **others}, header)
        left.write(folder)
        for number in sorted(forgotten):
            journal.add(ForgetLine(number, now()))


def merge_saved(first: Path, second: Path, output: Path) -> dict[int, int]:
    """Put the edits of two memories of the same model into one; those of the second get numbers behind those of the first.

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
    made = int(one.part("made"))
    two = two.with_numbers([made + n for n in two.numbers], made + int(two.part("made")))
    later = dict(zip(two.questions(), two.numbers, strict=True))
    replaced = {
        number: later[question]
        for number, question in zip(one.numbers, one.questions(), strict=True)
        if question in later
    }
    kept = one.only([i for i, number in enumerate(one.numbers) if number not in replaced])
    merged = kept.followed_by(two)
    merged = merged.with_numbers(merged.numbers, int(two.part("made")))
    output.mkdir(parents=True, exist_ok=True)
    (output / CONFIG_NAME).write_bytes((first / CONFIG_NAME).read_bytes())
    _merge_journals(Journal(first), Journal(second), Journal(output), made)
    merged.write(output)
    return replaced


def _merge_journals(first: Journal, second: Journal, output: Journal, made: int) -> None:
    """Write the edits of two journals into one."""
    with output.writing():
        for line in first.lines():
            output.add(line)
        if second.edits():
            output.add(RunLine(made, {"merged": str(second.folder)}))
        for line in second.edits():
            output.add(replace(line, edit=made + line.edit))


def _require_alike(one: SavedMemory, two: SavedMemory, first: Path, second: Path) -> None:
    """Raise a ValueError unless two memories belong to the same model and have the same settings."""
    for name in ("r", "prompt_positions", "key_block", "key_dimensions", "template_hash"):
        values = [getattr(memory.config, name) for memory in (one, two)]
        if values[0] != values[1] and None not in values:
            raise ValueError(
                f"{first} and {second} cannot be merged: {name} is {values[0]!r} in one, {values[1]!r} in the other."
            )
    if one.form != two.form and None not in (one.form, two.form):
        raise ValueError(
            f"{first} and {second} cannot be merged: questions are put in the form {one.form!r} in one, in {two.form!r} in the "
            "other. Teach the facts of one of them in the other's form."
        )
    names_differ = one.tensors.keys() != two.tensors.keys()
    if names_differ or any(not torch.equal(one.part(n), two.part(n)) for n in OF_MODEL):
        raise ValueError(
            f"{first} and {second} cannot be merged: they were made for different models, with different versions of this "
            "package, or their statistics were measured on different machines."
        )


def facts_by_number(lines: Sequence[EditLine]) -> dict[int, Sequence[Any]]:
    """Give prompt and target of each edit that a journal has, by its number."""
    return {line.edit: line.facts[0] for line in lines if line.facts}
