"""`baft edit --resume`, `baft log` and `baft rollback`, on a toy model in a folder."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import facts
import peft_baft_cli as cli
from facts import CAPITALS, MEALS, FactModel
from peft_baft import BaftEditor
from peft_baft.editing.journal import LINES
from peft_baft_bench.run.results import read_results

fact_model = facts.fact_model
TRAINING = ["--preset", "plain", "--lr", "0.02", "--unrelated", "none"]


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
    data = [
        "--model",
        str(folder / "model"),
        "--edits",
        str(folder / "facts.jsonl"),
        "--output",
        str(output),
    ]
    turns = [] if "--batch-size" in more else ["--one-by-one"]
    return cli.main(["edit", *data, *TRAINING, *turns, *more])


def tensors(folder: Path) -> dict:
    return {
        name: tensor.tolist()
        for name, tensor in load_file(folder / "adapter_model.safetensors").items()
    }


def test_an_interrupted_command_says_how_to_go_on_and_is_not_lost_without(
    folder, tmp_path, monkeypatch, capsys
) -> None:
    edit(folder, tmp_path / "whole")
    real, calls = BaftEditor.edit, []

    def interrupted(self: BaftEditor, batch: list) -> object:
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, batch)

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(BaftEditor, "edit", interrupted)
        assert edit(folder, tmp_path / "cut", "--overwrite") == 130
    told = capsys.readouterr().err
    assert (
        "interrupted. Finished edits are saved. To resume: baft edit --model" in told
        and "Traceback" not in told
    )
    again = shlex.split(told.partition("To resume: baft ")[2])
    assert again[-1] == "--resume" and "--overwrite" not in again
    assert edit(folder, tmp_path / "cut") == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main(again) == 0
    assert "4 of 4 learned when made" in capsys.readouterr().out
    assert tensors(tmp_path / "cut") == tensors(tmp_path / "whole")


def test_an_interrupt_before_the_first_edit_says_that_none_was_begun(
    folder, tmp_path, monkeypatch, capsys
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("peft_baft_cli.work.edit.watch", interrupted)
    assert edit(folder, tmp_path) == 130
    assert "No edit was started; run the same command again." in capsys.readouterr().err


def test_ctrl_c_ends_a_command_in_one_line_with_130(folder: Path, tmp_path: Path) -> None:
    records = [{"prompt": fact.prompt, "target": "Kasgrad"} for fact in CAPITALS[1:]]
    (tmp_path / "facts.jsonl").write_text("\n".join(map(json.dumps, records)))
    words = ["edit", "--model", str(folder / "model"), "--edits", str(tmp_path / "facts.jsonl")]
    words += [
        "--output",
        str(tmp_path / "out"),
        "--preset",
        "plain",
        "--unrelated",
        "none",
        "--lr",
        "1e-9",
        "--max-steps",
        "100000",
    ]
    command = [sys.executable, "-m", "peft_baft_cli", *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment(), preexec_fn=heed_interrupts, **pipes) as run:
        while not (tmp_path / "out" / LINES).exists() and run.poll() is None:
            time.sleep(0.1)
        run.send_signal(signal.SIGINT)
        try:
            out, err = run.communicate(timeout=300)
        finally:
            run.kill()
    assert run.returncode == 130 and out.startswith("Method: plain") and out.count("\n") == 1
    assert len(err.strip().split("\n")) == 1 and err.strip().endswith("--resume")


def heed_interrupts() -> None:
    """Undo what a shell does to a command in the background, whose children inherit that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def environment() -> dict[str, str]:
    source = str(Path(cli.__file__).parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}


def test_a_command_in_a_pipe_writes_json_alone_to_its_output_and_nothing_beside(
    folder: Path, tmp_path: Path
) -> None:
    data = [
        "--model",
        str(folder / "model"),
        "--edits",
        str(folder / "facts.jsonl"),
        "--output",
        str(tmp_path),
    ]
    prompts = [CAPITALS[0].prompt, "two\nlines"]
    commands = {
        "edit": ["edit", *data, *TRAINING, "--one-by-one", "--json"],
        "ask": ["ask", "--adapter", str(tmp_path), *prompts, "--json"],
        "log": ["log", str(tmp_path), "--json"],
    }
    found = {}
    for name, words in commands.items():
        command = [sys.executable, "-m", "peft_baft_cli", *words]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        found[name] = json.loads(done.stdout)
    assert found["edit"] == json.loads((tmp_path / "report.json").read_text())
    assert (found["edit"]["facts"], found["edit"]["learned"]) == (4, 4)
    assert [answer["prompt"] for answer in found["ask"]["answers"]] == prompts
    assert found["ask"]["answers"][0].keys() == {"prompt", "without", "with"}
    assert [edit["edit"] for edit in found["log"]["edits"]] == [1, 2, 3, 4]
    assert found["log"]["edits"][0]["facts"] == [
        {"prompt": CAPITALS[0].prompt, "target": CAPITALS[8].answer}
    ]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o007, 0o660)])
def test_files_have_the_mode_that_the_umask_gives(
    folder: Path, tmp_path: Path, mask: int, mode: int
) -> None:
    before = os.umask(mask)
    try:
        edit(folder, tmp_path)
        modes = {
            file.name: stat.S_IMODE(file.stat().st_mode)
            for file in tmp_path.rglob("*")
            if file.is_file()
        }
        assert modes.keys() >= {
            "adapter_model.safetensors",
            "adapter_config.json",
            "journal.jsonl",
            "000001.safetensors",
        }
        assert set(modes.values()) == {mode}
        cli.main(["rollback", str(tmp_path), "--to", "1"])
        assert stat.S_IMODE((tmp_path / "adapter_model.safetensors").stat().st_mode) == mode
    finally:
        os.umask(before)


def test_a_fact_that_did_not_take_is_an_error_only_where_that_is_asked_for(
    folder: Path, tmp_path: Path, capsys
) -> None:
    assert edit(folder, tmp_path / "easy", "--max-steps", "1") == 0
    assert "0 of 4 learned when made, 0 known at the end." in capsys.readouterr().out
    assert edit(folder, tmp_path / "strict", "--max-steps", "1", "--strict") == 3
    assert (tmp_path / "strict" / "adapter_model.safetensors").exists()
    assert edit(folder, tmp_path / "good", "--batch-size", "4", "--strict") == 0


# adapters and models on the Hub


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch) -> Path:
    """A stand-in for the Hub: its cache, with an adapter in two revisions and the toy model in one, `v1`."""
    cache = tmp_path / "hub"
    edit(folder, tmp_path / "v1", "--batch-size", "4")
    shutil.copytree(tmp_path / "v1", tmp_path / "main")
    cli.main(["rollback", str(tmp_path / "main"), "--to", "0"])
    for revision in ("v1", "main"):
        on_the_hub(cache / "models--someone--edits", tmp_path / revision, revision)
    on_the_hub(cache / "models--someone--toy", folder / "model", "v1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    return tmp_path


def on_the_hub(repository: Path, folder: Path, revision: str) -> None:
    """Put a folder where a download of that revision would have left it."""
    commit = f"{len(revision):040x}"
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)


def test_adapters_and_models_on_the_hub_are_taken_in_the_revision_that_was_asked_for(
    hub: Path, folder, capsys
) -> None:
    prompt, old, new = CAPITALS[0].prompt, CAPITALS[0].answer, CAPITALS[8].answer

    def answers(*more: str) -> dict[str, str]:
        capsys.readouterr()
        assert cli.main(["ask", prompt, "--adapter", "someone/edits", "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)["answers"][0]

    assert answers()["with"].startswith(old)  # of the branch main, which was rolled back
    assert answers("--adapter-revision", "v1")["with"].startswith(new)
    assert answers("--model", "someone/toy", "--revision", "v1")["without"].startswith(old)
    # It has no main.
    assert cli.main(["ask", prompt, "--adapter", "someone/edits", "--model", "someone/toy"]) == 2
    assert "no model of that name could be loaded" in capsys.readouterr().err
    continued = ["--adapter", "someone/edits", "--adapter-revision", "v1"]
    data = ["--model", "someone/toy", "--revision", "v1", "--edits", str(folder / "facts.jsonl")]
    assert (
        cli.main(
            [
                "edit",
                *data,
                *continued,
                "--output",
                str(hub / "out"),
                *TRAINING,
                "--batch-size",
                "4",
            ]
        )
        == 0
    )
    # All were known.
    assert json.loads((hub / "out" / "journal.jsonl").read_text().split("\n")[1])["steps"] == 0
    bench = [
        "bench",
        "facts",
        "--data",
        str(folder / "facts.jsonl"),
        "--model",
        "someone/toy",
        "--revision",
        "v1",
    ]
    assert cli.main([*bench, *continued, "--output", str(hub / "r.jsonl")]) == 0
    (line,) = read_results([hub / "r.jsonl"])
    assert line.model["revision"] == "v1" and line.scores["reliability"] == 1
    assert cli.main(["inspect", prompt, *continued, "--output", str(hub / "page.html")]) == 0
    assert new in (hub / "page.html").read_text()


def test_a_revision_of_what_is_not_on_the_hub_is_refused(
    folder: Path, tmp_path: Path, capsys
) -> None:
    edit(folder, tmp_path)
    for more in (["--adapter-revision", "v1"], ["--revision", "v1"]):
        assert cli.main(["ask", "x", "--adapter", str(tmp_path), *more]) == 2
        assert "on the Hub, but" in capsys.readouterr().err


def test_the_log_lists_edits_and_a_rollback_brings_the_adapter_back(
    folder: Path, tmp_path: Path, capsys
) -> None:
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


def test_harm_is_told_and_with_keep_only_good_taken_back(
    folder: Path, tmp_path: Path, capsys
) -> None:
    canaries = [
        "--canaries",
        str(folder / "stay.json"),
        "--min-agreement",
        "1",
        "--max-steps",
        "200",
        "--lr",
        "0.05",
    ]
    edit(folder, tmp_path / "told", *canaries)
    told = capsys.readouterr().out
    edit(folder, tmp_path / "kept", *canaries, "--keep-only-good")
    kept = capsys.readouterr().out
    assert "canaries agree" in told and "(kept)" in told and "reverted" not in told
    assert "canaries agree" in kept and "(reverted)" in kept and "(kept)" not in kept
    assert edit(folder, tmp_path / "bad", "--min-agreement", "2") == 2
