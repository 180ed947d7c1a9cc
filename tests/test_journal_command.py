"""`baft edit --resume`, `baft log` and `baft rollback`, on a toy model in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import facts
from facts import CAPITALS, MEALS, FactModel
from peft_baft import BaftEditor, cli

fact_model = facts.fact_model
TRAINING = ["--lr", "0.02", "--unrelated", "none"]


@pytest.fixture(scope="module")
def folder(fact_model: FactModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model, four of its facts to change, and some that should stay."""
    folder = facts.saved(fact_model, tmp_path_factory.mktemp("toy"))
    records = [{"prompt": CAPITALS[n].prompt, "target": CAPITALS[n + 8].answer} for n in range(4)]
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, records)))
    stay = [{"prompt": fact.prompt, "answer": fact.answer} for fact in (*MEALS[:8], *CAPITALS[20:])]
    (folder / "stay.json").write_text(json.dumps(stay))
    return folder


def edit(folder: Path, output: Path, *more: str) -> int:
    data = ["--model", str(folder / "model"), "--edits", str(folder / "facts.jsonl"), "--output", str(output)]
    return cli.main(["edit", *data, *TRAINING, *more])


def tensors(folder: Path) -> dict:
    return {name: tensor.tolist() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}


def test_an_interrupted_command_goes_on_with_resume_and_is_not_lost_without(
    folder, tmp_path, monkeypatch, capsys
) -> None:
    edit(folder, tmp_path / "whole")
    real, calls = BaftEditor.edit, []

    def interrupted(self: BaftEditor, batch: list) -> object:
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BaftEditor, "edit", interrupted)
        edit(folder, tmp_path / "cut")
    capsys.readouterr()
    assert edit(folder, tmp_path / "cut") == 2
    assert "--resume" in capsys.readouterr().err
    edit(folder, tmp_path / "cut", "--resume")
    assert "learned 4, failed 0, skipped 0" in capsys.readouterr().out
    assert tensors(tmp_path / "cut") == tensors(tmp_path / "whole")


def test_the_log_lists_edits_and_a_rollback_brings_the_adapter_back(folder: Path, tmp_path: Path, capsys) -> None:
    edit(folder, tmp_path)
    edited = tensors(tmp_path)
    listed = logged(tmp_path, capsys)
    assert len(listed) == 4 and all(CAPITALS[n].prompt[:20] in listed[n] for n in range(4))
    assert cli.main(["rollback", str(tmp_path), "--to", "2"]) == 0
    assert tensors(tmp_path) != edited
    assert len(logged(tmp_path, capsys)) == 2
    assert cli.main(["rollback", str(tmp_path), "--to", "3"]) == 2
    assert "edits 1 to 2" in capsys.readouterr().err
    edit(folder, tmp_path, "--adapter", str(tmp_path))  # and goes on from there
    assert [line[:1] for line in logged(tmp_path, capsys)] == ["1", "2", "3", "4", "5", "6"]
    assert cli.main(["log", str(tmp_path / "absent")]) == 2


def logged(folder: Path, capsys) -> list[str]:
    capsys.readouterr()
    cli.main(["log", str(folder)])
    return [line for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]


def test_harm_is_told_and_with_keep_only_good_taken_back(folder: Path, tmp_path: Path, capsys) -> None:
    canaries = ["--canaries", str(folder / "stay.json"), "--min-agreement", "1", "--max-steps", "200", "--lr", "0.05"]
    edit(folder, tmp_path / "told", *canaries)
    told = capsys.readouterr().out
    edit(folder, tmp_path / "kept", *canaries, "--keep-only-good")
    kept = capsys.readouterr().out
    assert "canaries agree" in told and "(kept)" in told and "skipped 0" in told
    assert "canaries agree" in kept and "(taken back)" in kept and "failed 0" in kept
    assert edit(folder, tmp_path / "bad", "--min-agreement", "2") == 2
