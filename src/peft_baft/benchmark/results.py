"""Result lines: one JSON object a run, which names everything that a reader needs to repeat it."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from peft_baft.storage import read_lines

FORMAT = 1
MEASURED = ("format", "command", "scores", "blocks", "cases", "kept", "gates")  # all else says what was measured
DIGITS = 12


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


def fingerprint(model: Any, samples: int = 64) -> str:
    """Hash every parameter's name, shape and dtype and of `samples` evenly spaced values of it: fast at any size."""
    digest = sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        chosen = torch.arange(min(samples, flat.numel())) * (flat.numel() // samples or 1)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(flat[chosen.to(flat.device)].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:DIGITS]


def described_file(path: str | Path) -> dict[str, Any]:
    """Name a data file by name and content."""
    return {"file": Path(path).name, "sha256": short_hash(Path(path).read_bytes())}


def versions() -> dict[str, str]:
    """Give the versions of everything that can move a number."""
    import peft_baft

    found = {module.__name__: module.__version__ for module in (peft_baft, torch, transformers, peft)}
    return found | {"python": platform.python_version()}


def short_hash(data: bytes) -> str:
    return sha256(data).hexdigest()[:DIGITS]


def identity(line: dict[str, Any]) -> str:
    """Hash what a line measured, without what came out: equal for two runs that should give the same."""
    what = {key: value for key, value in line.items() if key not in MEASURED}
    return short_hash(json.dumps(what, sort_keys=True).encode())


def read_results(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Read the lines of result files.

    Raises:
        ValueError: a line is not a result of this format; the message begins with `path:line`.
        FileNotFoundError: there is no such file.
    """
    return [line for path in paths for line in _lines(Path(path))]


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        raise FileNotFoundError(2, "No such file or directory", str(path))
    lines = []
    for number, line in read_lines(path):
        if not isinstance(line, dict) or line.get("format") != FORMAT:
            raise ValueError(f'{path}:{number}: wanted a result line with "format": {FORMAT}, made by `baft bench`.')
        lines.append(line)
    return lines


def lines_made_already(path: Path, wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Find the lines of a file that are among the identities `wanted`."""
    lines = [line for _, line in read_lines(path)]
    return {key: line for line in lines if (key := identity(line)) in wanted}


def in_order(parts: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Put the entries of all processes in the order of their rows."""
    return sorted((entry for part in parts for entry in part), key=lambda entry: entry["row"])
