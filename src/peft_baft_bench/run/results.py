"""Result lines: one JSON object a run, which names everything that a reader needs to repeat it."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from peft_baft.loading import fingerprint, short_hash
from peft_baft.storage import read_lines

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class RunHead:
    """How a run is made, with everything that a reader needs to repeat it.

    Attributes:
        benchmark: its name. model: name, class, dtype, device, and hashes of the weights and of the tokenizer.
        data: file, its hash, and rows, the last excluded.
        protocol: how questions are asked. versions: of everything that can move a number.
        method: as the user wrote it. settings: resolved. schedule: name, T, batch size, and when is asked. seed: of the run.
        unrelated: file of the text that edits were trained beside, and its hash; None where nothing was edited.
    """

    benchmark: str
    model: dict[str, Any]
    data: dict[str, Any]
    protocol: dict[str, Any]
    versions: dict[str, str]
    method: str
    settings: dict[str, Any]
    schedule: dict[str, Any]
    seed: int
    unrelated: dict[str, Any] | None = None

    @property
    def key(self) -> str:
        """Hash the head: equal for two runs that should give the same."""
        head = {f.name: getattr(self, f.name) for f in fields(RunHead)}
        present = {name: value for name, value in head.items() if value is not None}
        return short_hash(json.dumps(present, sort_keys=True).encode())


@dataclass(frozen=True, kw_only=True)
class ResultLine(RunHead):
    """One run: how it was made, and what came out. It is one line of a result file.

    Attributes:
        command: that made it. scores: means by name. cases: what each row gave.
        blocks: scores of each block of rows, where there are several. kept, gates: means of these metrics, if asked for.
    """

    command: str
    scores: dict[str, float]
    cases: list[dict[str, Any]]
    blocks: list[dict[str, Any]] | None = None
    kept: Any = None
    gates: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Give the line as it stands in a file, without what is not there."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        cases = values.pop("cases")  # they come last: they are long
        return {
            "format": FORMAT,
            **{k: v for k, v in values.items() if v is not None},
            "cases": cases,
        }

    @classmethod
    def from_json(cls, value: Any) -> ResultLine:
        """Make a line from what stands in a file.

        Raises:
            ValueError: it is no result line of this format.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError(f'wanted a result line with "format": {FORMAT}, made by `baft bench`')
        try:
            return cls(**{name: content for name, content in value.items() if name != "format"})
        except TypeError as error:
            raise ValueError(f"its fields are not those of a result line ({error})") from None


def described_model(name: str, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Name a base model and its tokenizer by what they are, not only by what they are called."""
    return {
        "name": name,
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "fingerprint": fingerprint(model),
        "tokenizer": short_hash(tokenizer.backend_tokenizer.to_str().encode()),
    }


def described_file(path: str | Path) -> dict[str, Any]:
    """Name a data file by name and content."""
    return {"file": Path(path).name, "sha256": short_hash(Path(path).read_bytes())}


def versions() -> dict[str, str]:
    """Give the versions of everything that can move a number."""
    import peft_baft

    packages = {
        module.__name__: module.__version__ for module in (peft_baft, torch, transformers, peft)
    }
    return packages | {"python": platform.python_version()}


def read_results(paths: Iterable[str | Path]) -> list[ResultLine]:
    """Read the lines of result files.

    Raises:
        ValueError: a line is not a result of this format; the message begins with the file and the number of the line.
        FileNotFoundError: there is no such file.
    """
    lines: list[ResultLine] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(2, "No such file or directory", str(path))
        for number, value in read_lines(path):
            try:
                lines.append(ResultLine.from_json(value))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}.") from None
    return lines


def lines_made_already(path: Path, wanted: Sequence[str]) -> dict[str, ResultLine]:
    """Find the lines of a file, which may not be there yet, whose keys are among `wanted`; of equal ones the last."""
    if not path.exists():
        return {}
    return {line.key: line for line in read_results([path]) if line.key in wanted}


def in_order(parts: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Put the entries of all processes in the order of their rows."""
    return sorted((entry for part in parts for entry in part), key=lambda entry: entry["row"])
