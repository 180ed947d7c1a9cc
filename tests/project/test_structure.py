"""The package's own rules, held by tests."""

# mypy: disable-error-code="union-attr"
from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "peft_baft"
COMMAND_LINE = SOURCE.with_name("peft_baft_cli")  # stands above every level
# each may import those on lower levels, and its own
LEVELS = [
    {"intervention", "losses", "span", "storage", "processes", "running"},
    {"adapter", "data", "loading"},
    {"editing"},
    {"memory"},
    {"evaluation"},
    {"tools"},
    {"integrations"},
    {"__init__"},
    {"run"},
]
FORBIDDEN = {
    *(
        ("adapter", "data"),
        ("data", "adapter"),
        ("losses", "adapter"),
        ("losses", "data"),
    ),
    ("evaluation", "editing"),
}
FILES = sorted(SOURCE.rglob("*.py"))
BENCH_FILES = sorted(SOURCE.with_name("peft_baft_bench").rglob("*.py"))
COMMAND_LINE_FILES = sorted(COMMAND_LINE.rglob("*.py"))


def part_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def level(part: str) -> int:
    return next(i for i, parts in enumerate(LEVELS) if part in parts)


def imported_parts(path: Path) -> set[str]:
    parts = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peft_baft."):
            parts.add(node.module.split(".")[1])
    return parts


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down_only(path: Path) -> None:
    mine = part_of(path)
    for other in imported_parts(path) - {mine}:
        assert level(other) <= level(mine), f"{path.name} imports {other}"
        assert (mine, other) not in FORBIDDEN, f"{path.name} imports {other}"


def test_nothing_in_the_package_imports_the_command_line() -> None:
    imports = re.compile(r"^\s*(from|import) peft_baft_cli\b", re.M)
    assert imports.search((COMMAND_LINE / "run.py").read_text())
    assert not [path.name for path in FILES if imports.search(path.read_text())]


def test_what_a_user_installs_does_not_import_the_comparison() -> None:
    imports = re.compile(r"^\s*(from|import) peft_baft_bench\b", re.M)
    assert any(imports.search(path.read_text()) for path in BENCH_FILES)
    assert not [path.name for path in FILES if imports.search(path.read_text())]


def test_no_file_imports_a_private_name_of_another() -> None:
    private = re.compile(r"^from peft_baft\S* import .*\b_[a-z]", re.M)
    assert private.search("from peft_baft.data import Edit, _hidden")
    assert not [
        path.name
        for path in (*FILES, *BENCH_FILES, *COMMAND_LINE_FILES)
        if private.search(path.read_text())
    ]


def test_the_import_rule_would_notice_a_violation() -> None:
    assert level("tools") > level("adapter") and "losses" in imported_parts(
        SOURCE / "editing" / "objective.py"
    )


def test_only_the_command_line_prints() -> None:
    printing = [
        path
        for path in (*FILES, *BENCH_FILES, *COMMAND_LINE_FILES)
        if re.search(r"^\s*print\(", path.read_text(), re.M)
    ]
    assert printing and {path.relative_to(SOURCE.parent).parts[0] for path in printing} == {
        "peft_baft_cli"
    }


def test_every_public_name_is_documented() -> None:
    import peft_baft

    without = [
        name
        for name in peft_baft.__all__
        if callable(getattr(peft_baft, name)) and not getattr(peft_baft, name).__doc__
    ]
    assert not without
