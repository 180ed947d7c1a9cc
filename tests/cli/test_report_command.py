"""`baft report`, on a toy model in a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import facts
import peft_baft_cli as cli
from facts import CAPITALS, COUNTRIES, MEALS, FactModel
from peft_baft.editing.journal import LINES

fact_model = facts.fact_model
TRAINING = ["--lr", "0.02", "--unrelated", "none", "--preset", "plain"]


@pytest.fixture(scope="module")
def folder(fact_model: FactModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model in `model`, and an adapter in `edits` that was taught two facts of `facts.jsonl`."""
    folder = facts.saved(fact_model, tmp_path_factory.mktemp("toy"))
    records = []
    for number in (0, 1):
        near = {"prompt": MEALS[number].prompt, "answer": MEALS[number].answer}
        records.append(
            {
                "prompt": CAPITALS[number].prompt,
                "target": CAPITALS[number + 8].answer,
                "subject": COUNTRIES[number],
                "rephrase": CAPITALS[number].rephrase,
                "unrelated": near,
            }
        )
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, records)))
    words = ["--model", str(folder / "model"), "--edits", str(folder / "facts.jsonl")]
    words += ["--output", str(folder / "edits"), "--batch-size", "2"]
    assert cli.main(["edit", *words, *TRAINING]) == 0
    return folder


def report(folder: Path, *more: str) -> int:
    return cli.main(["report", str(folder / "edits"), *more])


def test_the_page_lies_in_the_folder_and_the_summary_is_told(folder: Path, capsys) -> None:
    assert report(folder, "--edits", str(folder / "facts.jsonl")) == 0
    told = capsys.readouterr().out
    assert "2 of 2 facts hold. " in told and "report.html: open it in a browser" in told
    html = (folder / "edits" / "report.html").read_text(encoding="utf-8")
    assert CAPITALS[0].rephrase in html and MEALS[0].prompt in html and "trained together with" in html
    assert "differs from the last edit of its journal" not in html
    assert str(folder / "model") not in html  # what is handed on names no folder of this machine
    assert "base model" in html.lower()


def test_json_has_the_same_and_goes_with_a_page_elsewhere(
    folder: Path, tmp_path: Path, capsys
) -> None:
    page = tmp_path / "new" / "page.html"
    words = [
        "--json",
        "--output",
        str(page),
        "--neighbours",
        "1",
        "--limit",
        "1",
        "--template",
        "raw",
    ]
    assert report(folder, *words) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["page"] == str(page) and page.exists() and data["forms"] == ["raw"]
    assert data["counts"]["facts"] == 1 and data["left_out"] == 1
    assert data["facts"][0]["subject"] == COUNTRIES[1] and data["facts"][0]["subject_found"]
    assert len(data["facts"][0]["neighbours"]) == 1 and data["folder"]["as_journal"] is True


def test_a_chat_is_refused_where_the_model_has_none(folder: Path, capsys) -> None:
    assert report(folder, "--template", "chat") == 2
    assert "this tokenizer has none" in capsys.readouterr().err


def test_an_interrupted_run_and_records_that_were_not_taught_are_told(
    folder, tmp_path, capsys
) -> None:
    shutil.copytree(folder / "edits", tmp_path / "edits")
    lines = (tmp_path / "edits" / LINES).read_text().splitlines()
    extra = json.loads(lines[-1]) | {"edit": 2, "facts": [[CAPITALS[5].prompt, "x"]]}
    (tmp_path / "edits" / LINES).write_text("\n".join([*lines, json.dumps(extra)]) + "\n")
    other = tmp_path / "other.json"
    other.write_text(json.dumps([{"prompt": "a", "target": "b"}]))
    words = ["--model", str(folder / "model"), "--edits", str(other), "--neighbours", "0", "--json"]
    assert report(tmp_path, *words) == 0
    notes = " ".join(json.loads(capsys.readouterr().out)["notes"])
    assert "1 of the 1 records" in notes and "differs from the last edit of its journal" in notes


def test_without_a_journal_the_facts_are_those_of_the_edit_file(folder, tmp_path, capsys) -> None:
    shutil.copytree(folder / "edits", tmp_path / "edits")
    (tmp_path / "edits" / LINES).unlink()
    assert report(tmp_path) == 2
    assert "contains no journal (journal.jsonl)" in capsys.readouterr().err
    assert (
        report(tmp_path, "--edits", str(folder / "facts.jsonl"), "--neighbours", "0", "--json") == 0
    )
    data = json.loads(capsys.readouterr().out)
    assert "contains no journal" in data["notes"][0] and data["counts"]["hold"] == 2
    assert data["facts"][0]["fact"]["steps"] is None


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["nowhere"], "nowhere"),
        (["."], "does not contain an adapter"),
        ([".", "--output", "."], "--output . is a folder"),
        ([".", "--neighbours", "-1"], "of at least 0"),
        ([".", "--template", "auto"], "invalid choice: 'auto'"),
    ],
)
def test_bad_input_is_named_in_one_line(words, complaint, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *words]) == 2
    told = capsys.readouterr().err
    assert complaint in told and told.count("\n") == 1
