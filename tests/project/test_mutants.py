"""What `make mutants` changes and runs is there: its tool is not part of the tests' environment, so its table is read."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def constant(name: str) -> dict[str, list[str]] | list[str]:
    """Return a constant of scripts/mutants.py, without importing what the script imports."""
    for node in ast.parse((ROOT / "scripts" / "mutants.py").read_text(encoding="utf-8")).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            assert isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
            value = ast.literal_eval(node.value)
            assert isinstance(value, dict | list)
            return value
    raise KeyError(name)


def test_every_file_of_the_table_exists_and_so_do_its_tests() -> None:
    files = constant("FILES")
    assert isinstance(files, dict) and len(files) >= 10
    tests = {name for names in files.values() for name in names} | set(constant("SHARED"))
    assert not [name for name in files if not (ROOT / "src" / "peft_baft" / name).exists()]
    assert not [name for name in tests if not (ROOT / "tests" / name).exists()]


def test_the_formula_the_positions_the_adapter_and_the_training_are_among_them() -> None:
    files = set(constant("FILES"))
    parts = [
        "intervention.py",
        "losses.py",
        "span.py",
        "adapter/layer.py",
        "editing/train.py",
    ]
    assert files >= set(parts)


def test_an_unknown_name_of_the_script_would_be_noticed() -> None:
    with pytest.raises(KeyError, match="NO_SUCH_TABLE"):
        constant("NO_SUCH_TABLE")


def test_every_explanation_says_where_it_belongs_and_is_there_once() -> None:
    entries = json.loads((ROOT / "docs" / "mutants.json").read_text(encoding="utf-8"))
    assert entries and all(
        set(entry) == {"file", "function", "before", "after", "why"} for entry in entries
    )
    keys = [
        (entry["file"], entry["function"], entry["before"], entry["after"]) for entry in entries
    ]
    assert len(set(keys)) == len(keys)
