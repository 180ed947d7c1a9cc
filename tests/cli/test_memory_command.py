"""A memory of edits from the command line: edit, log, forget, ask --explain, merge, and runs that are cut short."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import facts
import peft_baft_cli as cli
from facts import CAPITALS, FactModel
from peft_baft.editing import continual
from peft_baft.memory import folder as memory_folder
from peft_baft.memory.folder import SavedMemory, saved_numbers
from peft_baft.memory.tensors import PER_MODEL

fact_model = facts.fact_model
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def folder(fact_model: FactModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model, twelve of its facts to change, and a memory of these."""
    folder = facts.saved(fact_model, tmp_path_factory.mktemp("toy"))
    write_facts(folder / "facts.jsonl", range(12))
    assert edit(folder, folder / "memory", "facts.jsonl") == 0
    return folder


def write_facts(file: Path, numbers: range) -> None:
    records = [
        {"prompt": CAPITALS[n].prompt, "target": CAPITALS[(n + 8) % 24].answer} for n in numbers
    ]
    file.write_text("\n".join(map(json.dumps, records)))


def edit(folder: Path, output: Path, file: str, *more: str) -> int:
    data = ["--model", str(folder / "model"), "--edits", str(folder / file)]
    return cli.main(["edit", *data, "--output", str(output), *more])


@pytest.fixture
def memory(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder / "memory", tmp_path / "memory")
    return tmp_path / "memory"


def logged(memory: Path, capsys: Any) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert cli.main(["log", str(memory), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["edits"]


def test_facts_go_into_a_memory_however_many_they_are(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    assert saved_numbers(folder / "memory") == list(range(1, 13))
    report = json.loads((folder / "memory" / "report.json").read_text())
    assert report["method"] == "memory" and report["known"] == report["facts"] == 12
    write_facts(folder / "one.jsonl", range(1))
    capsys.readouterr()
    assert edit(folder, tmp_path / "one", "one.jsonl") == 0
    told = capsys.readouterr().out
    assert "Method: memory, since no option requires a plain adapter." in told
    assert "a memory of" in told and "steps" not in told
    assert saved_numbers(tmp_path / "one") == [1]


@pytest.mark.parametrize(
    ("options", "batches", "reason"),
    [
        (["--method", "plain"], 1, "as --method says"),
        (["--one-by-one"], 3, "since --one-by-one is for a plain adapter"),
        (["--batch-size", "2"], 2, "since --batch-size is for a plain adapter"),
        (["--lr", "0.01"], 1, "since --lr is for a plain adapter"),
    ],
)
def test_a_plain_adapter_learns_all_facts_at_once_unless_told_otherwise(
    options: list[str], batches: int, reason: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    write_facts(folder / "three.jsonl", range(3))
    capsys.readouterr()
    assert edit(folder, tmp_path / "plain", "three.jsonl", *options, "--max-steps", "1") == 0
    assert saved_numbers(tmp_path / "plain") is None
    report = json.loads((tmp_path / "plain" / "report.json").read_text())
    assert (report["method"], report["batches"]) == ("plain", batches)
    assert f"Method: plain, {reason}." in capsys.readouterr().out


def test_an_answer_can_be_followed_by_the_models_own_words(folder: Path, tmp_path: Path) -> None:
    records = [
        {"prompt": CAPITALS[n].prompt, "target": CAPITALS[n + 8].answer, **extra}
        for n, extra in ((0, {}), (1, {"after": "stop"}))
    ]
    (folder / "after.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert edit(folder, tmp_path / "goes-on", "after.jsonl", "--after", "continue") == 0
    edits = SavedMemory.read(tmp_path / "goes-on").tensors["edits"]
    assert edits[1:, 1].tolist() == [0, 1]


def test_a_new_memory_takes_what_was_measured_of_the_model_from_another_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_facts(folder / "two.jsonl", range(2))
    monkeypatch.setenv("PEFT_BAFT_CACHE", "")
    monkeypatch.setattr("peft_baft.memory.editor.measure", lambda *_: pytest.fail("was measured"))
    of_first = ("--method", "memory", "--statistics", str(folder / "memory"))
    assert edit(folder, tmp_path / "second", "two.jsonl", *of_first) == 0
    first, second = (SavedMemory.read(one) for one in (folder / "memory", tmp_path / "second"))
    for name in PER_MODEL:
        assert torch.equal(first.tensors[name], second.tensors[name]), name


def test_a_forgotten_edit_is_gone_and_the_log_says_so(
    folder: Path, memory: Path, capsys: Any
) -> None:
    whole = SavedMemory.read(memory)
    assert cli.main(["forget", str(memory), "--edit", "3,5"]) == 0
    assert "has forgotten 2 edits; 10 edits left." in capsys.readouterr().out
    left = SavedMemory.read(memory)
    kept = [n for n in range(1, 13) if n not in (3, 5)]
    assert left.numbers == kept
    expected = whole.without((3, 5))
    assert {k: t.tolist() for k, t in left.tensors.items()} == {
        k: t.tolist() for k, t in expected.tensors.items()
    }
    edits = {edit["edit"]: edit for edit in logged(memory, capsys)}
    assert edits[3]["forgotten"] and not edits[4]["forgotten"] and edits[4]["when"]
    assert cli.main(["forget", str(memory), "--edit", "3"]) == 2
    assert "has no edit 3 in its memory" in capsys.readouterr().err
    # What goes on from here does not bring it back, and numbers are not given again.
    write_facts(folder / "more.jsonl", range(12, 14))
    assert edit(folder, memory, "more.jsonl", "--adapter", str(memory)) == 0
    assert saved_numbers(memory) == [*kept, 13, 14]
    # A fact with a known question replaces its edit, and that is said.
    write_facts(folder / "again.jsonl", range(12, 13))
    capsys.readouterr()
    before = (memory / WEIGHTS).read_bytes()
    onto = ["--adapter", str(memory)]
    assert edit(folder, memory, "again.jsonl", *onto, "--known", "refuse") == 2
    assert "answers the questions of 1 of these facts" in capsys.readouterr().err
    assert (memory / WEIGHTS).read_bytes() == before
    assert edit(folder, memory, "again.jsonl", "--adapter", str(memory)) == 0
    assert "replace its edits 13." in capsys.readouterr().out
    assert saved_numbers(memory) == [*kept, 14, 15]
    # A return to what it was before does.
    assert cli.main(["rollback", str(memory), "--to", "0"]) == 0
    assert saved_numbers(memory) == []


def test_a_fact_in_other_words_than_an_edit_is_said_and_can_be_refused(
    folder: Path, memory: Path, capsys: Any
) -> None:
    same, other = CAPITALS[2].rephrase, CAPITALS[20].prompt
    records = [{"prompt": prompt, "target": CAPITALS[5].answer} for prompt in (same, other)]
    (folder / "reworded.jsonl").write_text("\n".join(map(json.dumps, records)))
    onto, before = ["--adapter", str(memory)], (memory / WEIGHTS).read_bytes()
    assert edit(folder, memory, "reworded.jsonl", *onto, "--known", "refuse") == 2
    told = capsys.readouterr().err
    assert "answers the questions of 1 of these facts" in told
    (number,) = re.findall(r"by its edit (\d+)", told)
    assert (memory / WEIGHTS).read_bytes() == before
    assert edit(folder, memory, "reworded.jsonl", *onto) == 0
    assert f"baft forget {memory} --edit {number}" in capsys.readouterr().out
    assert saved_numbers(memory) == list(range(1, 15))


def test_ask_explains_which_edit_answered(folder: Path, memory: Path, capsys: Any) -> None:
    capsys.readouterr()
    questions = [CAPITALS[4].prompt, "the food of a bodran is"]
    asked = ["ask", "--adapter", str(memory), "--explain", "--json", *questions]
    assert cli.main(asked) == 0
    first, second = json.loads(capsys.readouterr().out)["answers"]
    assert first["match"]["edit"] == 5 and first["match"]["fact"][0] == CAPITALS[4].prompt
    assert first["with"].startswith(CAPITALS[12].answer) and second["match"]["edit"] is None
    assert second["with"] == second["without"]
    assert cli.main(["ask", "--adapter", str(memory), "--explain", *questions]) == 0
    assert "answered by" in capsys.readouterr().out


def test_two_memories_become_one(folder: Path, memory: Path, tmp_path: Path, capsys: Any) -> None:
    write_facts(folder / "others.jsonl", range(11, 13))
    assert edit(folder, tmp_path / "others", "others.jsonl", "--method", "memory") == 0
    merge = ["merge", str(memory), str(tmp_path / "others"), "--output", str(tmp_path / "both")]
    capsys.readouterr()
    assert cli.main(merge) == 0
    told = capsys.readouterr().out
    assert "edit 12 has the same question as edit 13, which replaces it" in told
    assert saved_numbers(tmp_path / "both") == [*range(1, 12), 13, 14]
    assert (
        cli.main(["ask", "--adapter", str(tmp_path / "both"), "--explain", CAPITALS[12].prompt])
        == 0
    )
    assert CAPITALS[20].answer in capsys.readouterr().out
    assert cli.main(merge) == 2 and "is not empty" in capsys.readouterr().err


def test_a_run_that_is_cut_short_goes_on_and_ends_with_the_same_bytes(
    folder: Path, memory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, write, numbers = tmp_path / "cut", continual._write, []

    def cut(*given: Any) -> None:
        numbers.append(given[2])
        if len(numbers) == 3:
            raise KeyboardInterrupt
        write(*given)

    assert edit(folder, tmp_path / "whole", "facts.jsonl") == 0
    with monkeypatch.context() as patch:
        patch.setattr(continual, "_write", cut)
        assert edit(folder, output, "facts.jsonl") == 130
    assert numbers == [1, 2, 3]
    assert edit(folder, output, "facts.jsonl", "--resume") == 0
    assert (output / WEIGHTS).read_bytes() == (tmp_path / "whole" / WEIGHTS).read_bytes()
    # The control: cut at another place, all edits are there as well.
    assert load_file(output / WEIGHTS).keys() == load_file(memory / WEIGHTS).keys()


def test_a_memory_can_go_back_to_each_of_its_edits(memory: Path) -> None:
    whole = SavedMemory.read(memory)
    assert cli.main(["rollback", str(memory), "--to", "7"]) == 0
    assert saved_numbers(memory) == list(range(1, 8))
    left = SavedMemory.read(memory)
    expected = whole.without(range(8, 13)).tensors["tokens"]
    assert torch.equal(left.tensors["tokens"], expected)


@pytest.mark.parametrize("step", ["save_snapshot", "write", "add"])
def test_a_kill_while_forgetting_loses_no_other_edit(
    memory: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    target = {"save_snapshot": memory_folder.Journal, "add": memory_folder.Journal}.get(
        step, SavedMemory
    )

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(target, step, killed)
        assert cli.main(["forget", str(memory), "--edit", "3"]) == 130
    numbers = saved_numbers(memory)
    assert numbers is not None and set(numbers) >= set(range(1, 13)) - {3}
    SavedMemory.read(memory)  # it is whole
    if 3 in numbers:
        assert cli.main(["forget", str(memory), "--edit", "3"]) == 0
    assert saved_numbers(memory) == [1, 2, *range(4, 13)]


def test_what_does_not_fit_a_memory_is_refused(folder: Path, memory: Path, capsys: Any) -> None:
    refused = {
        "is a memory; leave --method out": ["--adapter", str(memory), "--method", "plain"],
        "--unrelated is for a plain adapter": ["--method", "memory", "--unrelated", "general"],
        "--preset is for a plain adapter": ["--adapter", str(memory), "--preset", "plain"],
        "--batch-size is for a plain adapter": ["--method", "memory", "--batch-size", "2"],
        "--r is for a plain adapter": ["--method", "memory", "--r", "2"],
        "--known is for a memory": ["--method", "plain", "--known", "refuse"],
        "--after is for a memory": ["--one-by-one", "--after", "stop"],
        "--statistics is for a memory": ["--method", "plain", "--statistics", str(memory)],
        "leave --statistics out": ["--adapter", str(memory), "--statistics", str(memory)],
        "leave one of them out": ["--one-by-one", "--batch-size", "2"],
    }
    for message, options in refused.items():
        capsys.readouterr()
        assert edit(folder, memory, "facts.jsonl", *options) == 2
        assert message in capsys.readouterr().err
    for command in (["forget", str(folder), "--edit", "1"], ["forget", str(memory), "--edit", "x"]):
        assert cli.main(command) == 2
    assert "--edit takes numbers" in capsys.readouterr().err
