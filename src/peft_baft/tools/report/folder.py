"""Read what a report shows of an adapter's folder: its weights, its settings and pictures of its edits."""

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

# The title of the pages that `baft inspect` writes.
INSPECTION_TITLE = re.compile(r"<title>(.*?) · what the edits do</title>", re.S)
INSPECTION_FOLDERS = (".", "inspect")
BASE = "base_model_name_or_path"  # may be a local folder; a report names the base model separately
HEAD = 4000  # number of characters of a page to read; they include the title unless the prompt is very long


@dataclass(frozen=True)
class Picture:
    """A page of `baft inspect`: its prompt, its path relative to the folder, and the path of the matching PNG or None."""

    title: str
    page: str
    image: str | None


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter's folder.

    Attributes:
        path: the path as given by the user.
        sha256, bytes: hash and size of the weights.
        config: content of `adapter_config.json`, without empty values and without the base model.
        run: settings of the journal's last run.
        as_journal: whether the weights are those of the journal's last edit; None if there is no journal.
    """

    path: str
    sha256: str
    bytes: int
    config: dict[str, Any]
    run: dict[str, Any]
    as_journal: bool | None
    pictures: tuple[Picture, ...]


def read_folder(folder: str | Path) -> AdapterFolder:
    """Read an adapter's folder.

    Raises:
        FileNotFoundError: the folder has no adapter. ValueError: its config or journal is damaged.
    """
    folder = Path(folder)
    weights = (folder / WEIGHTS).read_bytes()
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG_NAME} is damaged: {error}.") from None
    if not isinstance(config, Mapping):
        raise ValueError(f"{folder / CONFIG_NAME} is damaged: it is not a JSON object.")
    journal = Journal(folder)
    runs = journal.state().runs
    shown = {name: value for name, value in sorted(config.items()) if value not in (None, [], {})}
    shown.pop(BASE, None)
    return AdapterFolder(
        path=str(folder),
        sha256=hashlib.sha256(weights).hexdigest(),
        bytes=len(weights),
        config=shown,
        run=dict(runs[-1].settings) if runs else {},
        as_journal=_is_journal_state(folder, journal),
        pictures=tuple(pictures_of(folder)),
    )


def _is_journal_state(folder: Path, journal: Journal) -> bool | None:
    """Check whether the saved weights are those after the journal's last edit; None if there are no edits."""
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
    """List the pages of `baft inspect` in a folder; other HTML files are ignored."""
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
