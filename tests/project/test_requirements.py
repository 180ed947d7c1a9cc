"""What the environments are made of: the files in requirements/ agree with pyproject.toml, the Makefile and the CI workflow."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from peft_baft.adapter.model_call import TESTED_TRANSFORMERS

ROOT = Path(__file__).parents[2]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]
STAGES = {"test", "test-across", "test-newest", "test-oldest"}


def load(name: str) -> ModuleType:
    """Return a script of requirements/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "requirements" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


lock = load("lock")


def read(name: str) -> list[Requirement]:
    """Return the lines of a file of requirements/, comments left out."""
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if not line.startswith("#")]


def versions(name: str, python: str) -> dict[str, str]:
    """Return the version that a file pins of each package under one Python; each at most once."""
    pinned: dict[str, str] = {}
    for requirement in read(name):
        if requirement.marker and not requirement.marker.evaluate({"python_version": python}):
            continue
        (specifier,) = requirement.specifier
        assert specifier.operator == "==" and requirement.name not in pinned, requirement
        pinned[requirement.name] = specifier.version
    return pinned


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_is_pinned_at_its_floor_or_above(python: str) -> None:
    tested = versions("tested.txt", python)
    floors = lock.floors(lock.read_project(), "dev")
    # Every extra is among them.
    assert {"torch", "gguf", "matplotlib", "torchao", "pytest", "mypy"} <= set(floors)
    below = {
        name: tested.get(name)
        for name in floors
        if Version(tested.get(name, "0")) < Version(floors[name])
    }
    assert not below


def test_a_floor_above_the_tested_version_would_be_noticed() -> None:
    tested = versions("tested.txt", "3.11")
    project = {"name": "p", "dependencies": ["torch>=99"], "optional-dependencies": {}}
    floors = lock.floors(project)
    assert floors == {"torch": "99"} and Version(tested["torch"]) < Version(floors["torch"])


def test_the_lowest_versions_are_the_floors_of_pyproject() -> None:
    """`make lock` writes them; who changes a floor by hand is told here."""
    assert versions("oldest.txt", "3.11") == lock.floors(lock.read_project(), lock.OLDEST_EXTRA)


def test_floors_have_no_caps() -> None:
    capped = {"name": "p", "dependencies": ["transformers>=5.20,<6"], "optional-dependencies": {}}
    with pytest.raises(ValueError, match="without a cap"):
        lock.floors(capped)


def test_an_extra_that_names_others_has_their_floors_and_the_higher_of_two() -> None:
    project = {
        "name": "some-package",
        "dependencies": ["torch>=2.6"],
        "optional-dependencies": {
            "fast": ["torch>=2.10"],
            "slow": ["tqdm>=4"],
            "all": ["some-package[fast,slow]"],
        },
    }
    assert lock.floors(project) == {"torch": "2.6"}
    assert lock.floors(project, "all") == {"torch": "2.10", "tqdm": "4"}


def test_where_interpreters_differ_the_lines_say_which_is_for_whom() -> None:
    resolved = {
        (3, 10): {"numpy": "2.2", "torch": "2.13", "tomli": "2.5"},
        (3, 11): {"numpy": "2.4", "torch": "2.13"},
        (3, 12): {"numpy": "2.5", "torch": "2.13"},
        (3, 13): {"numpy": "2.5", "torch": "2.13"},
    }
    assert list(lock.constraint_lines(resolved)) == [
        'numpy==2.2 ; python_version < "3.11"',
        'numpy==2.4 ; python_version >= "3.11" and python_version < "3.12"',
        'numpy==2.5 ; python_version >= "3.12"',
        "tomli==2.5",
        "torch==2.13",
    ]


@pytest.mark.parametrize("name", ["tested.txt", "oldest.txt"])
def test_the_files_hold_names_and_versions_alone(name: str) -> None:
    assert read(name)
    for requirement in read(name):
        assert requirement.url is None and not requirement.extras
        assert requirement.name == lock.canonical(requirement.name)
        assert "+" not in str(requirement.specifier)  # no label of one build, such as +cpu
        assert not requirement.name.startswith(lock.OF_ONE_PLATFORM)
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    assert not re.search(r"://|--|@|sha256", text)


def test_the_newest_tested_transformers_is_the_one_that_users_are_warned_above() -> None:
    newest = max(
        (versions("tested.txt", python)["transformers"] for python in PYTHONS), key=Version
    )
    assert newest == TESTED_TRANSFORMERS


def test_torch_is_named_in_one_place() -> None:
    """The Makefile takes its version from tested.txt, and `make lock` keeps that one."""
    assert lock.tested_torch() == f"torch=={versions('tested.txt', '3.11')['torch']}"
    assert not re.search(r"torch==\d", (ROOT / "Makefile").read_text(encoding="utf-8"))


def test_the_workflow_and_the_script_run_what_the_makefile_offers() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    offered = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.M))
    (matrix,) = re.findall(r"selection: \[(.*)\]", workflow)
    called = set(re.findall(r"run: make ([a-z-]+)$", workflow, re.M)) | set(matrix.split(", "))
    stages = " ".join(re.findall(r"^run ([a-z -]+)", script, re.M))
    assert sorted(stages.split()) == sorted(STAGES)
    assert STAGES <= called <= offered
    assert called - STAGES == {"check", "demo", "test-main"}
    # Weekly.
    assert "github.event_name == 'schedule'" in workflow.partition("transformers-main:")[2]


def test_the_selection_names_files_that_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", "")
    (names,) = re.findall(r"^VERSION_TESTS = (.*)$", makefile, re.M)
    subjects = {name.rpartition("test_")[2] for name in names.split()}
    assert {"positions", "repeated_texts", "adapter", "saving", "journal", "model_call"} <= subjects
    assert not [name for name in names.split() if not (ROOT / "tests" / f"{name}.py").exists()]


def test_the_demo_installs_neither_what_the_tests_need_nor_what_quantises() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^\$\(VENV\)/ready:.*\n\t(.*)", makefile, re.M)
    assert "[gguf]" in recipe
    demo, everything = (
        lock.floors(lock.read_project(), "gguf"),
        lock.floors(lock.read_project(), "dev"),
    )
    assert not {"pytest", "mypy", "torchao", "bitsandbytes", "matplotlib"} & set(demo)
    assert {"pytest", "mypy", "torchao", "bitsandbytes", "matplotlib"} <= set(everything)


def test_every_workflow_action_is_pinned_by_its_major_version() -> None:
    workflow = (ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    actions = re.findall(r"uses: (\S+)", workflow)
    assert actions and all(re.fullmatch(r"[\w-]+/[\w-]+@v\d+", action) for action in actions)


def test_newer_versions_than_the_tested_ones_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = load("newer")
    file = tmp_path / "tested.txt"
    here = "".join(f"{name}=={newer.version(name).partition('+')[0]}\n" for name in newer.WATCHED)
    file.write_text("# a comment\n" + here + 'peft==0.1 ; python_version < "3"\n')
    assert newer.main(str(file)) == 1 and "Nothing is newer" in capsys.readouterr().out
    file.write_text(re.sub("^peft==.*$", "peft==0.1", here, flags=re.M))
    assert newer.main(str(file)) == 0 and "(tested: 0.1)" in capsys.readouterr().out
