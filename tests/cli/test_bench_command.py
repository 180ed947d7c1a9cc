"""`baft bench` and `baft plot` from the command line, on a toy model in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import facts
import peft_baft_cli as cli
from facts import CAPITALS, MEALS, FactModel
from peft_baft.evaluation.frames import RAW_FRAMES
from peft_baft_bench.questions import asking
from peft_baft_bench.run.results import read_results

fact_model = facts.fact_model
TRAINING = ["--lr", "0.02", "--max-steps", "40", "--unrelated", "none"]


@pytest.fixture(scope="module")
def folder(fact_model: FactModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model, four of its facts to change, and something to ask that is spared."""
    folder = facts.saved(fact_model, tmp_path_factory.mktemp("toy"))
    with open(folder / "facts.jsonl", "w", encoding="utf-8") as out:
        for n in range(4):
            old, food = CAPITALS[n], MEALS[n]
            record: dict[str, Any] = {
                "prompt": old.prompt,
                "target": CAPITALS[n + 8].answer,
                "subject": facts.COUNTRIES[n],
                "rephrase": [old.rephrase],
            }
            record["unrelated"] = [{"prompt": food.prompt, "answer": food.answer}]
            out.write(json.dumps(record) + "\n")
    return folder


def bench(folder: Path, output: Path, *more: str) -> int:
    data = [
        "--model",
        str(folder / "model"),
        "--data",
        str(folder / "facts.jsonl"),
        "--output",
        str(output),
    ]
    return cli.main(["bench", "facts", *data, *more])


def test_a_benchmark_gives_lines_a_table_and_figures_and_is_not_repeated(
    folder, tmp_path, capsys, monkeypatch
) -> None:
    output = tmp_path / "r.jsonl"
    more = [
        "--method",
        "none,baft,reft:r=4",
        "--schedule",
        "continual",
        "--edits",
        "1,2",
        "--seeds",
        "2",
        *TRAINING,
    ]
    assert bench(folder, output, *more) == 0
    lines = read_results([output])
    assert [(line.method, line.schedule["edits"], line.seed) for line in lines] == [
        ("none", 0, 0),
        ("baft", 1, 0),
        ("reft:r=4", 1, 0),
        ("baft", 1, 1),
        ("reft:r=4", 1, 1),
        ("baft", 2, 0),
        ("reft:r=4", 2, 0),
        ("baft", 2, 1),
        ("reft:r=4", 2, 1),
    ]
    line = lines[1]
    assert line.data["rows"] == [0, 4] and line.data["file"] == "facts.jsonl" and line.seed == 0
    assert line.settings["descent"]["lr"] == 0.02 and line.versions.keys() >= {
        "torch",
        "peft",
        "peft_baft",
    }
    assert line.model["fingerprint"] and line.protocol["template"] == "raw" and len(line.cases) == 4
    assert line.scores["reliability"] > lines[0].scores["reliability"]
    assert not list(tmp_path.glob("*.progress/*"))
    table = capsys.readouterr().out
    assert "baft" in table and "reft" in table
    # Nothing is asked again.
    monkeypatch.setattr(asking, "predicted_in_rows", lambda *_, **__: 1 / 0)
    assert bench(folder, output, *more) == 0
    assert read_results([output]) == lines
    capsys.readouterr()
    pytest.importorskip("matplotlib")
    assert cli.main(["plot", str(output), "--output", str(tmp_path / "figures")]) == 0
    assert {path.suffix for path in (tmp_path / "figures").iterdir()} == {".md", ".csv", ".png"}


def test_an_adapter_is_judged_on_the_model_that_it_names(
    folder: Path, tmp_path: Path, capsys
) -> None:
    edits = ["--model", str(folder / "model"), "--edits", str(folder / "facts.jsonl"), *TRAINING]
    cli.main(["edit", *edits, "--batch-size", "4", "--output", str(tmp_path / "adapter")])
    capsys.readouterr()
    data = ["--data", str(folder / "facts.jsonl"), "--output", str(tmp_path / "r.jsonl")]
    assert cli.main(["bench", "facts", "--adapter", str(tmp_path / "adapter"), *data]) == 0
    (line,) = read_results([tmp_path / "r.jsonl"])
    assert line.method == "adapter" and line.settings["peft_type"] == "BAFT"
    assert line.scores["reliability"] > 0.8 and "locality" in line.scores


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--rows", "3:9"], "0 <= A < B <= 4"),
        (["--rows", "2"], "--rows takes A:B"),
        (["--edits", "5", "--schedule", "continual"], "need 5 rows"),
        (["--edits", "x", "--schedule", "continual"], "--edits takes numbers"),
        (["--batch-size", "3"], "--schedule batched requires"),
        (["--method", "rule"], "Unknown method 'rule'"),
        (["--seeds", "0"], "--seeds"),
        (["--preset", "gpt"], "Unknown preset 'gpt'; known are default, plain, llama-2-7b"),
        (["--also", "fluency,speed"], "Unknown metric 'speed'; known are fluency"),
    ],
)
def test_bad_arguments_are_named_before_a_model_is_loaded(
    folder, tmp_path, capsys, monkeypatch, more, complaint
) -> None:
    monkeypatch.setattr("peft_baft_cli.work.common.load_model", lambda *_, **__: 1 / 0)
    assert bench(folder, tmp_path / "r.jsonl", *more) == 2
    assert complaint in capsys.readouterr().err and not (tmp_path / "r.jsonl").exists()


def test_contexts_and_neighbours_are_asked_where_they_are_wanted(
    folder: Path, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "r.jsonl"
    wanted = ["--method", "none,baft", "--also", "in_context,neighbour", "--rows", "0:2", *TRAINING]
    assert bench(folder, output, *wanted) == 0
    lines = read_results([output])
    for line in lines:
        assert "not the old one" in line.protocol["free_rule"]["contains"]
        assert line.protocol["probes"]["in_context"]["frames"] == list(RAW_FRAMES)
        assert line.protocol["probes"]["neighbour"] == {"subject": 4, "relation": 2}
    unedited, edited = (line.scores for line in lines)
    assert unedited["neighbour_subject"] == 1 and unedited["in_context_contains"] < 1
    assert edited["reliability_contains"] == 1 and "in_context_lowest" in edited
    table = capsys.readouterr().out
    assert "Ctx lowest" in table and "Nb spared" in table and "Rel contains" in table
    assert bench(folder, output, *wanted) == 0
    assert read_results([output]) == lines  # a run that is there is not made again
    # The control: without them nothing of it is asked, and the runs are others.
    capsys.readouterr()
    assert bench(folder, output, "--method", "none", "--rows", "0:2", *TRAINING) == 0
    bare = read_results([output])[-1]
    assert not {"free_rule", "probes"} & bare.protocol.keys() and bare.key != lines[0].key
    assert {probe["kind"] for probe in bare.cases[0]["probes"]} == {
        "reliability",
        "generality",
        "locality",
    }
    assert "Ctx" not in capsys.readouterr().out


def test_what_cannot_be_asked_is_named_before_a_model_is_loaded(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("peft_baft_cli.work.common.load_model", lambda *_, **__: 1 / 0)
    (tmp_path / "facts.jsonl").write_text('{"prompt": "It rains in", "target": "May"}\n')
    (tmp_path / "piqa.jsonl").write_text('{"goal": "a", "sol1": "b", "sol2": "c"}\n')
    (tmp_path / "piqa-labels.lst").write_text("0\n")
    for name, file, complaint in (
        ("facts", "facts.jsonl", "no record of the data names one"),
        ("piqa", "piqa.jsonl", "--also neighbour asks about edits, and piqa has none"),
    ):
        more = [
            "--model",
            str(tmp_path),
            "--also",
            "neighbour",
            "--output",
            str(tmp_path / "r.jsonl"),
        ]
        assert cli.main(["bench", name, "--data", str(tmp_path / file), *more]) == 2
        assert complaint in capsys.readouterr().err


def test_an_unknown_benchmark_is_refused_with_the_known_ones(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("peft_baft_cli.work.common.load_model", lambda *_, **__: 1 / 0)
    assert cli.main(["bench", "zrse", "--output", str(tmp_path / "r.jsonl")]) == 2
    complaint = capsys.readouterr().err
    assert "There is no benchmark 'zrse'; known are zsre, " in complaint and "piqa" in complaint


def test_plot_says_what_is_not_a_result(tmp_path: Path, capsys) -> None:
    (tmp_path / "r.jsonl").write_text('{"prompt": "x"}\n')
    assert cli.main(["plot", str(tmp_path / "r.jsonl"), "--output", str(tmp_path)]) == 2
    assert "r.jsonl:1" in capsys.readouterr().err


def test_training_options_reach_a_method_that_has_no_preset(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "r.jsonl"
    assert bench(folder, output, "--method", "ft-m,ft-m:lr=0.01", "--rows", "0:2", *TRAINING) == 0
    given, own = read_results([output])
    assert given.settings["descent"]["lr"] == 0.02 and own.settings["descent"]["lr"] == 0.01
    assert given.settings["descent"]["max_steps"] == own.settings["descent"]["max_steps"] == 40
    assert given.scores["reliability"] == 1
