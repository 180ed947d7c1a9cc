"""Several processes at one job give what one gives, and end together. Each test looks at what `process_worker.py` left."""

# mypy: disable-error-code="arg-type"
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model

import facts
import peft_baft_cli as cli
import process_worker as worker
from facts import CAPITALS, MEALS, FactModel, edits
from peft_baft.loading import load_model
from peft_baft.processes import Processes
from peft_baft_bench.run.results import read_results

fact_model = facts.fact_model
LIMIT = 150  # seconds for all cases of one launch
OF_TWO = (  # cases that one launch goes through: starting processes takes longer than most of them
    "batches",
    "without_gates",
    "in_contexts",
    "lora",
    "ordered",
    "failing",
    "stopped",
    "lines",
    "interrupted",
    "command",
    "editing",
    "sharded",
)
FLOAT_NOISE: dict[str, Any] = {"atol": 2e-3, "rtol": 1e-3}


@pytest.fixture(scope="module")
def folder(fact_model: FactModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model, and four facts to change."""
    folder = facts.saved(fact_model, tmp_path_factory.mktemp("toy"))
    with open(folder / "facts.jsonl", "w", encoding="utf-8") as out:
        for n in range(4):
            probe = {"prompt": MEALS[n].prompt, "answer": MEALS[n].answer}
            record = {
                "prompt": CAPITALS[n].prompt,
                "target": CAPITALS[n + 8].answer,
                "unrelated": [probe],
            }
            out.write(json.dumps(record) + "\n")
    stay = [{"prompt": old.prompt, "answer": old.answer} for old in CAPITALS[20:]]
    (folder / "stay.jsonl").write_text("\n".join(map(json.dumps, stay)))
    return folder


def launched(folder: Path, count: int, names: tuple[str, ...]) -> Callable[[str], list[Any]]:
    """Run cases in so many processes; the result gives what each of them left of a case."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)]
    source = str(Path(__file__).parents[1] / "src")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run(
        [*run, worker.__file__, str(folder), *names],
        env=environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "printed").write_text(done.stdout)
    return lambda name: [
        torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(count)
    ]


@pytest.fixture(scope="module")
def of_two(folder: Path) -> Callable[[str], list[Any]]:
    return launched(folder, 2, OF_TWO)


@pytest.fixture
def toy(folder: Path) -> FactModel:
    """As each process loads it."""
    toy = FactModel(*load_model(str(folder / "model")))
    toy.base.generation_config.eos_token_id = None
    return toy


def require_same_edit(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found["steps"] == wanted["steps"]
    for one, other in zip(found["losses"], wanted["losses"], strict=True):
        assert one == pytest.approx(other, rel=1e-3)
    torch.testing.assert_close(found["tensors"], wanted["tensors"], **FLOAT_NOISE)


@pytest.mark.parametrize("name", ["batches", "without_gates", "in_contexts", "lora"])
def test_facts_of_a_batch_shared_by_two_processes_are_learned_as_by_one(
    toy, of_two, name: str
) -> None:
    one, found = getattr(worker, name)(toy, Processes(), Path()), of_two(name)
    require_same_edit(found[0], one)
    # To the bit: they take the same steps.
    assert all(map(torch.equal, found[0]["tensors"], found[1]["tensors"]))


def test_what_is_gathered_is_in_order(of_two) -> None:
    for found in of_two("ordered"):
        assert found == {"shares": [[0, 2, 4, 6], [1, 3, 5]], "on_main": 0, "few": [["a"], []]}


def require_same_failures(found: list[dict[str, Any]]) -> None:
    assert {one["row"] for one in found} == {"ValueError: row 2 is broken"}
    assert {one["odd"] for one in found[:-1]} == {"RuntimeError: Unsendable: 1 and 2"}
    assert found[-1]["odd"] == "Unsendable: 1 and 2"  # its own error stays what it is
    assert all("must have the same edits" in one["other edits"] for one in found)
    assert all(one["as it was"] and one["learned"] for one in found)


def test_an_error_of_one_process_is_raised_by_all_and_leaves_the_adapter_as_it_was(
    of_two, tally
) -> None:
    require_same_failures(of_two("failing"))
    tally("an error in one of two processes", failures=3)


@pytest.mark.slow
def test_three_processes_share_five_facts_two_facts_and_one(
    toy: FactModel, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "model").symlink_to(folder / "model")
    of_three = launched(tmp_path, 3, ("batches", "ordered", "failing"))
    found = of_three("batches")
    require_same_edit(found[0], worker.batches(toy, Processes(), Path()))
    assert all(all(map(torch.equal, found[0]["tensors"], other["tensors"])) for other in found[1:])
    assert of_three("ordered")[1]["shares"] == [[0, 3, 6], [1, 4], [2, 5]]
    require_same_failures(of_three("failing"))


def test_independent_work_stops_soon_after_another_process_has_failed(of_two) -> None:
    for found in of_two("stopped"):
        assert found == {"errors": ["KeyError: 'a share is broken'"] * 2, "ended": []}


def test_a_benchmark_by_two_processes_has_the_lines_of_one(
    toy: FactModel, tmp_path: Path, folder, of_two
) -> None:
    one, found = worker.lines(toy, Processes(), tmp_path), of_two("lines")
    assert found[0].keys() == one.keys() and all(
        found[0][name]["scores"] == one[name]["scores"] for name in one
    )
    rows = {name: [case["row"] for case in line["cases"]] for name, line in one.items()}
    for name, line in found[0].items():
        assert (
            line["cases"] == one[name]["cases"]
            and [case["row"] for case in line["cases"]] == rows[name]
        )
    assert found[1] == found[0]
    assert len(read_results([folder / "2.jsonl"])) == len(one)  # each is written once
    assert not list((folder / "2.progress").iterdir())


def test_what_two_processes_began_one_goes_on_with(
    toy: FactModel, tmp_path: Path, folder: Path, of_two
) -> None:
    assert {found["error"] for found in of_two("interrupted")} == {"ValueError: no more"}
    ticks: list[int] = []
    rows, schedule = (
        worker.bench(toy, Processes(), tick=ticks.append),
        worker.SCHEDULES["continual"],
    )
    resumed = worker.line(rows, schedule, folder / "interrupted.jsonl")
    # A block of the first, and the second's if it came so far.
    assert ticks[0] in (2, 4) and sum(ticks) == 6
    assert resumed == worker.line(rows, schedule, tmp_path / "whole.jsonl")
    assert not list((folder / "interrupted.progress").iterdir())


def test_the_command_says_how_many_run_and_fails_with_fewer(
    folder: Path, of_two, capsys, monkeypatch
) -> None:
    assert of_two("command") == [{"good": 0, "fewer": 2, "unreadable": 2}] * 2
    printed = (folder / "printed").read_text()
    assert printed.count("2 processes: the facts of each batch, and questions split over them") == 2
    assert printed.count("1 result lines in") == 1
    (line,) = read_results([folder / "c.jsonl"])
    assert line.scores["reliability"] == 1 and len(line.cases) == 3
    monkeypatch.setattr("peft_baft_cli.work.common.load_model", lambda *_, **__: 1 / 0)
    begin = ["bench", "facts", "--model", "m", "--data", str(folder / "facts.jsonl")]
    assert cli.main([*begin, "--processes", "2"]) == 2
    assert (
        "2 processes were requested, but the number of running processes is 1"
        in capsys.readouterr().err
    )
    assert (
        cli.main([*begin, "--split", "facts"]) == 2
        and "--schedule batched" in capsys.readouterr().err
    )


def test_edits_by_two_processes_are_resumed_and_taken_back_as_by_one(
    toy: FactModel, tmp_path, folder, of_two
) -> None:
    for name in ("model", "facts.jsonl", "stay.jsonl"):
        (tmp_path / name).symlink_to(folder / name)
    one = worker.editing(toy, Processes(), tmp_path)
    assert (one["cut"], one["log"]) == (2, [True, True])
    assert False in one["strict log"]
    for found in of_two("editing"):
        torch.testing.assert_close(found.pop("tensors"), one["tensors"], **FLOAT_NOISE)
        assert found == {name: value for name, value in one.items() if name != "tensors"}
    printed = (folder / "printed").read_text()
    assert printed.count("2 processes: the facts of each batch split over them") == 3


def test_one_model_sharded_over_two_processes_learns_what_a_whole_one_does(
    toy: FactModel, of_two
) -> None:
    one = worker.sharded(toy, Processes(), Path())
    for found in of_two("sharded"):
        require_same_edit(found, one)


def offloaded(model: Any, where: str, folder: Path) -> None:
    """Take the weights of the base model, or of some of its blocks, to memory of the host or to disk."""
    if where == "cpu":
        cpu_offload(model, torch.device("cpu"))
        return
    places = {name: "cpu" for name, _ in model.named_children() if name != "model"}
    places |= {
        f"model.{name}": "cpu" for name, _ in model.model.named_children() if name != "layers"
    }
    places |= {f"model.layers.{i}": "disk" if i in (1, 2) else "cpu" for i in range(4)}
    dispatch_model(model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True)


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_an_offloaded_model_learns_what_a_whole_one_does(
    toy: FactModel, tmp_path: Path, where: str
) -> None:
    one = worker.sharded(toy, Processes(), Path())
    offloaded(toy.base, where, tmp_path)
    assert any(parameter.is_meta for parameter in toy.base.parameters())
    config: dict[str, Any] = {"layers_to_transform": [0, 3]} if where == "disk" else {}
    if where == "disk":
        whole = FactModel(facts.trained().base, toy.tokenizer)
        one = worker.edited(worker.baft(whole, Processes(), **config), edits(0, 3), edits(7))
    require_same_edit(
        worker.edited(worker.baft(toy, Processes(), **config), edits(0, 3), edits(7)), one
    )
