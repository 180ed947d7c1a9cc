"""What the types promise: a user's script passes `mypy --strict`, and a script that misuses the package does not."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import peft_baft

SOURCE = Path(peft_baft.__file__).parents[1]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("mypy") is None, reason="needs the package mypy"
)

# Errors inside the packages are their own; what the script does with them is not.
SETTINGS = """
[mypy]
strict = true
[mypy-peft.*,transformers.*,torch.*,peft_baft.*]
follow_imports = silent
follow_untyped_imports = true
"""

SCRIPT = """
from peft import get_peft_model
import peft_baft
def main(facts: list[peft_baft.Edit]) -> None:
    base, tokenizer = peft_baft.load_model("smollm2")
    model = get_peft_model(base, peft_baft.BaftConfig(task_type="CAUSAL_LM", r=8))
    editor = peft_baft.BaftEditor(model, tokenizer, unrelated=peft_baft.GENERAL, descent=peft_baft.DescentConfig(lr=1e-3))
    learned: bool = editor.edit(facts[:1]).learned
    for record in peft_baft.edit_continually(editor, facts[1:], journal=peft_baft.Journal("edits"), resume=learned):
        print([fact.target for fact in record.edits])
    model.save_pretrained("edits")
"""

# One misuse a line, and the kind of complaint that belongs to it.
MISUSE = """
import peft_baft
def misuse(editor: peft_baft.BaftEditor) -> None:
    editor.edit(["Paris is the capital of"])  # list-item
    editor.edit([peft_baft.Edit("Paris is the capital of")])  # call-arg
    peft_baft.DescentConfig(lr="1e-3")  # arg-type
    peft_baft.Objective(alpha=0.01).alpha = 0.02  # misc
    peft_baft.edit_continually(editor, [], "edits/journal")  # arg-type
    peft_baft.Journal(3)  # arg-type
    steps: str = editor.edit([]).learned  # assignment
    peft_baft.BaftEdit  # attr-defined
"""


def complaints(folder: Path, script: str) -> list[str]:
    """Return the errors that `mypy --strict` finds in a script."""
    (folder / "mypy.ini").write_text(SETTINGS, encoding="utf-8")
    (folder / "script.py").write_text(script.strip() + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "script.py"]
    environment = os.environ | {"MYPYPATH": str(SOURCE), "MYPY_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return [line for line in done.stdout.splitlines() if ": error: " in line]


@pytest.mark.slow
def test_a_users_script_passes_mypy_strict_and_each_misuse_is_named(tmp_path: Path) -> None:
    """Two scripts in one folder: the second run finds what the first has learned about torch and transformers."""
    assert complaints(tmp_path, SCRIPT) == []
    expected = {
        (number, line.partition("# ")[2])
        for number, line in enumerate(MISUSE.strip().splitlines(), 1)
        if "# " in line
    }
    named = [
        re.match(r"script\.py:(\d+): error: .*\[([\w-]+)\]$", line)
        for line in complaints(tmp_path, MISUSE)
    ]
    assert {(int(match[1]), match[2]) for match in named if match} == expected and all(named)


def test_the_packages_say_that_they_are_typed() -> None:
    assert (SOURCE / "peft_baft" / "py.typed").exists() and (
        SOURCE / "peft_baft_cli" / "py.typed"
    ).exists()
