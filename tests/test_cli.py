"""The commands' manners: bad input is named before a model is loaded, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from peft_baft import cli
from peft_baft.cli import bench as bench_command
from peft_baft.cli import edit as edit_command
from peft_baft.evaluation.report import Answered


@pytest.fixture(autouse=True)
def no_model(monkeypatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    for module in (edit_command, bench_command):
        monkeypatch.setattr(module, "load_model", refuse)


def edit(facts: Path, output: Path, *more: str) -> int:
    return cli.main(["edit", "--model", "none", "--edits", str(facts), "--output", str(output), *more])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"prompt": "a", "target": "b"}\n{"prompt": "a"}', ":2: the field 'target' is missing"),
        ('{"prompt": "a", "targt": "b"}', "'targt'"),
        ("nonsense", ":1: this is not JSON"),
        ("", "no record"),
    ],
)
def test_a_bad_record_is_named_with_its_line_before_a_model_is_loaded(tmp_path, capsys, text, complaint) -> None:
    facts = tmp_path / "facts.jsonl"
    facts.write_text(text)
    assert edit(facts, tmp_path / "out") == 2
    assert complaint in capsys.readouterr().err


def test_a_missing_file_is_named(tmp_path: Path, capsys) -> None:
    assert edit(tmp_path / "absent.jsonl", tmp_path / "out") == 2
    assert "absent.jsonl" in capsys.readouterr().err


def test_an_adapter_in_the_output_folder_is_kept_unless_it_is_named_or_given_up(tmp_path: Path, capsys) -> None:
    facts, output = tmp_path / "facts.jsonl", tmp_path / "out"
    facts.write_text(json.dumps({"prompt": "a", "target": "b"}))
    output.mkdir()
    (output / edit_command.WEIGHTS).write_text("precious")
    assert edit(facts, output) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (output / edit_command.WEIGHTS).read_text() == "precious"
    for choice in (["--overwrite"], ["--adapter", str(output)]):
        with pytest.raises(AssertionError, match="a model was loaded"):  # it went on
            edit(facts, output, *choice)


def test_a_failed_run_with_overwrite_does_not_lose_the_old_adapter(tmp_path: Path) -> None:
    facts, output = tmp_path / "facts.jsonl", tmp_path / "out"
    facts.write_text("nonsense")
    output.mkdir()
    (output / edit_command.WEIGHTS).write_text("precious")
    assert edit(facts, output, "--overwrite") == 2
    assert (output / edit_command.WEIGHTS).read_text() == "precious"


def test_an_answer_is_learned_if_it_begins_with_the_target() -> None:
    assert Answered("q", "Paris", "Lyon, of course", "Lyon").learned
    assert Answered("q", "Paris", "lyon", " Lyon ").learned
    assert not Answered("q", "Paris", "Paris, not Lyon", "Lyon").learned
