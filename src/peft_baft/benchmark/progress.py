"""A run that survives being killed: what is done is on disk, whole, after every edit."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from peft_baft.editing.adapter_editor import adapter_tensors
from peft_baft.editing.journal import replace_file


@dataclass
class Progress:
    """What a run has done so far, in one file that is replaced as a whole: a kill at any instant leaves the last state.

    Attributes:
        file: where it is kept; None keeps nothing.
        cases: results of the finished blocks. outcomes: of the edits made in the block under way.
        replies: of the same block, the results of rows that were asked already.
        tensors: the adapter after the last of these edits, in the order of `adapter_tensors`.
    """

    file: Path | None
    cases: list[dict[str, Any]] = field(default_factory=list)
    outcomes: list[dict[str, Any]] = field(default_factory=list)
    replies: list[dict[str, Any]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)

    @classmethod
    def load(cls, file: Path | None) -> Progress:
        """What was kept, or a new beginning.

        Raises:
            ValueError: the file is damaged.
        """
        if file is None or not file.exists():
            return cls(file)
        try:
            data = file.read_bytes()  # in one go: the file may be replaced at any instant
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            done = json.loads(header["__metadata__"]["progress"])
            found = load(data)
            tensors = [found[str(i)] for i in range(done.pop("tensors"))]
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{file} is damaged ({error}). Delete it to measure this run from its beginning."
            ) from None
        return cls(file, tensors=tensors, **done)

    def restore(self, model: nn.Module) -> None:
        """Bring a fresh editor's adapter to where the block under way had come."""
        if self.outcomes:
            with torch.no_grad():
                for tensor, value in zip(adapter_tensors(model), self.tensors, strict=True):
                    tensor.copy_(value)

    def edited(self, model: nn.Module, outcome: dict[str, Any], replies: list[dict[str, Any]]) -> None:
        """Keep one more edit."""
        self.outcomes.append(outcome)
        self.replies += replies
        self.tensors = adapter_tensors(model)
        self._write()

    def finished(self, cases: list[dict[str, Any]]) -> None:
        """Keep a whole block; its adapter is not needed any more."""
        self.cases += cases
        self.outcomes, self.replies, self.tensors = [], [], []
        self._write()

    def forget(self) -> None:
        """The run's line is written: nothing is left to go on with."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def _write(self) -> None:
        if self.file is None:
            return
        done = {"cases": self.cases, "outcomes": self.outcomes, "replies": self.replies, "tensors": len(self.tensors)}
        tensors = {str(i): t.detach().cpu().contiguous().clone() for i, t in enumerate(self.tensors)}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.file, save(tensors, metadata={"progress": json.dumps(done)}))
