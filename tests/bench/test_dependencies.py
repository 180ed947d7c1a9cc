"""The comparison imports nothing that `pip install peft-baft` does not install."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "src" / "peft_baft_bench").rglob("*.py"))


def base_dependencies() -> set[str]:
    """Return the import names of the dependencies of the package without extras."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.M | re.S)
    assert block is not None
    return {name.replace("-", "_") for name in re.findall(r'"([\w-]+)', block[1])}


def imported(source: str) -> set[str]:
    """Return the top-level packages that a file imports when it is itself imported."""
    found: set[str] = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module.partition(".")[0])
    return found


def test_files_import_base_dependencies_only() -> None:
    allowed = base_dependencies() | {"peft_baft", "peft_baft_bench"} | set(sys.stdlib_module_names)
    others = {path.name: imported(path.read_text(encoding="utf-8")) - allowed for path in FILES}
    assert FILES and not {name: found for name, found in others.items() if found}


def test_an_optional_dependency_would_be_noticed() -> None:
    assert "torch" in base_dependencies() and "matplotlib" not in base_dependencies()
    assert imported("from matplotlib.figure import Figure\nimport torch.nn") == {
        "matplotlib",
        "torch",
    }
