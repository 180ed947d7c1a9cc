"""`baft log` and `baft rollback`."""

from __future__ import annotations

from json import dumps
from pathlib import Path
from typing import Any

from peft_baft.editing.journal import LINES, EditLine, Journal
from peft_baft_cli.screen import print_table


def log(adapter: Path, json: bool = False) -> int:
    """Print the edits of the adapter in a folder, as a table or as JSON; the exit code."""
    journal = _journal(adapter)
    snapshots = set(journal.snapshots())
    edits = [_described(line, snapshots) for line in journal.edits()]
    if json:
        print(dumps({"adapter": str(adapter), "edits": edits}, indent=2))
    else:
        print_table(
            ("edit", "facts", "steps", "learned when made", "state", "snapshot"), [_row(edit) for edit in edits]
        )
    return 0


def _described(line: EditLine, snapshots: set[int]) -> dict[str, Any]:
    """A line of the journal as `baft log --json` gives it."""
    facts = [{"prompt": prompt, "target": target} for prompt, target in line.facts]
    measured = {name: getattr(line, name) for name in ("steps", "loss", "seconds", "learned", "problem", "kept")}
    return {"edit": line.edit, "facts": facts, **measured, "snapshot": line.edit in snapshots}


def _row(edit: dict[str, Any]) -> tuple[str, ...]:
    state = "in the adapter" if edit["kept"] else "taken back"
    return (
        str(edit["edit"]),
        "; ".join(f"{fact['prompt']} -> {fact['target']}" for fact in edit["facts"]),
        "–" if edit["steps"] is None else str(edit["steps"]),
        "yes" if edit["learned"] else "NO",
        f"{state}: {edit['problem']}" if edit["problem"] else state,
        "yes" if edit["snapshot"] else "",
    )


def rollback(adapter: Path, to: int) -> int:
    """Bring the adapter in a folder back to what it was after edit `to`; the exit code."""
    _journal(adapter).roll_back(to)
    print(f"{adapter} is as it was after edit {to}." if to else f"{adapter} is as it was before its first edit.")
    return 0


def _journal(adapter: Path) -> Journal:
    if not (adapter / LINES).exists():
        raise ValueError(f"{adapter} holds no journal ({LINES}): its edits were not made by `baft edit`.")
    return Journal(adapter)
