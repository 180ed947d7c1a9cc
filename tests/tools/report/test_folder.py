"""What a report reads from an adapter's folder: its weights, its journal's state, pictures of its edits."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from peft_baft.adapter.weights import FILE as WEIGHTS
from peft_baft.editing.journal import EditLine, Journal, RunLine
from peft_baft.tools.report.folder import Picture, read_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of one tensor."""
    (tmp_path / "adapter_config.json").write_text(
        '{"r": 4, "a": null, "peft_type": "BAFT", "b": []}'
    )
    save_file({"w": torch.ones(2)}, tmp_path / WEIGHTS)
    return tmp_path


def test_weights_and_settings_are_those_of_the_files(folder: Path) -> None:
    read = read_folder(folder)
    data = (folder / WEIGHTS).read_bytes()
    assert (read.bytes, read.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert (
        read.config == {"peft_type": "BAFT", "r": 4} and read.run == {} and read.as_journal is None
    )


@pytest.mark.parametrize(
    ("saved", "at", "same"), [(1.0, 1, True), (2.0, 1, False), (1.0, 0, False)]
)
def test_weights_that_the_journal_did_not_leave_are_noticed(folder, saved, at, same) -> None:
    journal = Journal(folder)
    journal.add(RunLine(0, {"lr": 1}))
    journal.add(EditLine(1, [["a", "b"]], 1, 0.1, 0.1, True, None, True))
    journal.save_snapshot(at, {"w": torch.full((2,), saved), "editor.used": torch.ones(1)}, {})
    read = read_folder(folder)
    assert read.as_journal is same and read.run == {"lr": 1}


def test_pages_of_inspections_are_found_and_no_other_ones(folder: Path) -> None:
    (folder / "inspect").mkdir()
    title = "<title>a &lt;b&gt; · what the edits do</title>"
    (folder / "inspect" / "a.html").write_text(f"<!doctype html>{title}", encoding="utf-8")
    (folder / "inspect" / "a.png").write_bytes(b"")
    (folder / "c.html").write_text(title, encoding="utf-8")
    (folder / "report.html").write_text(
        "<title>adapter · what its edits did</title>", encoding="utf-8"
    )
    assert read_folder(folder).pictures == (
        Picture("a <b>", "c.html", None),
        Picture("a <b>", "inspect/a.html", "inspect/a.png"),
    )


def test_the_title_is_the_one_that_inspect_writes() -> None:
    from peft_baft.tools.inspect import page
    from peft_baft.tools.report.folder import INSPECTION_TITLE

    template = Path(page.__file__).with_name("page.html").read_text(encoding="utf-8")
    assert INSPECTION_TITLE.search(template)


@pytest.mark.parametrize("text", ["{", json.dumps([1])])
def test_a_damaged_config_is_named(folder: Path, text: str) -> None:
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"adapter_config\.json is damaged"):
        read_folder(folder)
