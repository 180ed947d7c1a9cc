"""The files of an adapter's folder that a report names: its weights, its settings, pictures of its edits."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME
from safetensors.torch import load_file

from peft_baft.adapter.weights import FILE as WEIGHTS
from peft_baft.editing.editor import CURSOR
from peft_baft.editing.journal import Journal

# The title of a page that `baft inspect` writes.
INSPECTION_TITLE = re.compile(r"<title>(.*?) · what the edits do</title>", re.S)
INSPECTION_FOLDERS = (".", "inspect")
BASE = "base_model_name_or_path"  # may be a folder of this machine; a report names the base itself
HEAD = 4000  # characters of a page that hold its title, unless its prompt is very long


@dataclass(frozen=True)
class Picture:
    """A page of `baft inspect` in the folder: its prompt, its path from the folder, and that of the PNG beside it or None."""

    title: str
    page: str
    image: str | None


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter's folder.

    Attributes:
        path: as the user gave it. sha256, bytes: of the weights. config: what `adapter_config.json` says, without what is
            empty and without the base model. run: the settings of the journal's last run.
        as_journal: whether the weights are those of the journal's last edit; None where there is no journal.
    """

    path: str
    sha256: str
    bytes: int
    config: dict[str, Any]
    run: dict[str, Any]
    as_journal: bool | None
    pictures: tuple[Picture, ...]


def read_folder(folder: str | Path) -> AdapterFolder:
    """Read what a report says about an adapter's folder.

    Raises:
        FileNotFoundError: the folder holds no adapter. ValueError: its config or journal is damaged.
    """
    folder = Path(folder)
    weights = (folder / WEIGHTS).read_bytes()
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_NAME} is damaged: {error}.") from None
    if not isinstance(config, Mapping):
        raise ValueError(f"{folder / CONFIG_NAME} is damaged: it holds no JSON object.")
    journal = Journal(folder)
    runs = journal.state().runs
    return AdapterFolder(
        str(folder),
        hashlib.sha256(weights).hexdigest(),
        len(weights),
        {
            name: value
            for name, value in sorted(config.items())
            if value not in (None, [], {}) and name != BASE
        },
        dict(runs[-1].settings) if runs else {},
        _as_journal(folder, journal),
        tuple(pictures_of(folder)),
    )


def _as_journal(folder: Path, journal: Journal) -> bool | None:
    """Tell whether the adapter's file holds what the journal's last edit left."""
    edits, snapshots = journal.state().edits, journal.snapshots()
    if not edits:
        return None
    if not snapshots or snapshots[-1] != edits[-1].edit:
        return False
    state, _ = journal.load_snapshot(snapshots[-1])
    saved = load_file(folder / WEIGHTS)
    expected = {name: tensor for name, tensor in state.items() if not name.startswith(CURSOR)}
    return saved.keys() == expected.keys() and all(
        torch.equal(tensor, expected[name]) for name, tensor in saved.items()
    )


def pictures_of(folder: Path) -> list[Picture]:
    """Find the pages of `baft inspect`; other HTML files are passed over."""
    pictures = []
    for place in INSPECTION_FOLDERS:
        for page in sorted((folder / place).glob("*.html")):
            with page.open(encoding="utf-8", errors="replace") as file:
                head = file.read(HEAD)
            title = INSPECTION_TITLE.search(head)
            if title is None:
                continue
            image = page.with_suffix(".png")
            pictures.append(
                Picture(
                    unescape(title.group(1)),
                    page.relative_to(folder).as_posix(),
                    image.relative_to(folder).as_posix() if image.exists() else None,
                )
            )
    return pictures
