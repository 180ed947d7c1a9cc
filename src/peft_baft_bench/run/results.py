"""Result lines: one JSON object per run, with everything that is needed to repeat it."""

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
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_baft.loading import fingerprint, short_hash
from peft_baft.storage import read_lines

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class RunHead:
    """How a run is made, with everything that is needed to repeat it.

    Attributes:
        benchmark: its name.
        model: name, class, dtype, device, and hashes of the weights and of the tokenizer.
        data: file, its hash, and the rows, the last excluded.
        protocol: how questions are asked.
        versions: of every package that can change a result.
        method: as the user wrote it.
        settings: the resolved settings of the method.
        schedule: name, T, batch size, and when questions are asked.
        seed: the seed of the run.
        unrelated: the file of the unrelated training text and its hash; None where nothing is edited.
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
        """Hash of the head; equal for runs that should give the same result."""
        head = {f.name: getattr(self, f.name) for f in fields(RunHead)}
        present = {name: value for name, value in head.items() if value is not None}
        return short_hash(json.dumps(present, sort_keys=True).encode())


@dataclass(frozen=True, kw_only=True)
class ResultLine(RunHead):
    """How a run was made and what it measured; one line of a result file.

    Attributes:
        command: the command that made the run.
        scores: means by name.
        cases: the results of each row.
        blocks: scores of each block of rows, where there are several.
        kept, gates: means of these metrics, if they were asked for.
    """

    command: str
    scores: dict[str, float]
    cases: list[dict[str, Any]]
    blocks: list[dict[str, Any]] | None = None
    kept: list[float] | dict[str, float] | None = None
    gates: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the line as it is written to a file, without absent fields."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        cases = values.pop("cases")  # written last, because they are long
        return {
            "format": FORMAT,
            **{k: v for k, v in values.items() if v is not None},
            "cases": cases,
        }

    @classmethod
    def from_json(cls, value: Any) -> ResultLine:
        """Create a line from its JSON object.

        Raises:
            ValueError: it is not a result line of this format.
        """
        if not isinstance(value, dict) or value.get("format") != FORMAT:
            raise ValueError(
                f'expected a result line with "format": {FORMAT}, made by `baft bench`'
            )
        try:
            return cls(**{name: content for name, content in value.items() if name != "format"})
        except TypeError as error:
            raise ValueError(f"its fields are not those of a result line ({error})") from None


def describe_model(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """Identify a base model and its tokenizer by content, in addition to the name."""
    return {
        "name": name,
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "fingerprint": fingerprint(model),
        "tokenizer": short_hash(tokenizer.backend_tokenizer.to_str().encode()),
    }


def describe_file(path: str | Path) -> dict[str, Any]:
    """Identify a data file by name and content."""
    return {"file": Path(path).name, "sha256": short_hash(Path(path).read_bytes())}


def versions() -> dict[str, str]:
    """Return the version of every package that can change a result."""
    import peft_baft

    packages = {
        module.__name__: module.__version__ for module in (peft_baft, torch, transformers, peft)
    }
    return packages | {"python": platform.python_version()}


def read_results(paths: Iterable[str | Path]) -> list[ResultLine]:
    """Read the lines of result files.

    Raises:
        ValueError: a line is not a result of this format; the message begins with the file and the line
            number.
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


def find_finished(path: Path, wanted: Sequence[str]) -> dict[str, ResultLine]:
    """Find the lines of a file with the keys `wanted`, the last one for each key; empty if the file does not exist."""
    if not path.exists():
        return {}
    return {line.key: line for line in read_results([path]) if line.key in wanted}


def sort_by_row(parts: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Merge the entries of all processes, sorted by row."""
    return sorted((entry for part in parts for entry in part), key=lambda entry: entry["row"])
