"""`baft log` and `baft rollback`."""

from __future__ import annotations

from importlib.util import find_spec
from json import dumps
from pathlib import Path
from typing import Any

from peft_baft.editing.journal import LINES, EditLine, Journal
from peft_baft_cli.errors import DONE
from peft_baft_cli.options import LogCommand, RollbackCommand
from peft_baft_cli.screen import print_table
from peft_baft_cli.work.common import adapter_folder


def log(options: LogCommand) -> int:
    """Print the edits of the adapter in a folder, as a table or as JSON; return the exit code."""
    folder = adapter_folder(options.adapter, options.adapter_revision)
    journal = _journal(folder)
    snapshots = set(journal.snapshots())
    state = journal.state()
    edits = [_described(line, snapshots) for line in state.edits]
    numbers = _numbers_in(folder)
    if numbers is not None:  # the adapter's file, not the journal, determines what is in a memory
        for edit in edits:
            edit["in_memory"] = edit["edit"] in numbers
            edit["forgotten"] = edit["edit"] in state.forgotten and not edit["in_memory"]
    if options.json:
        print(dumps({"adapter": options.adapter, "edits": edits}, indent=2))
    else:
        print_table(
            ("edit", "facts", "when", "steps", "learned when made", "state", "snapshot"),
            [_row(edit) for edit in edits],
        )
    return DONE


def _numbers_in(folder: Path) -> list[int] | None:
    """Return the numbers of the edits of the memory in a folder; None for other adapters."""
    if find_spec("peft_baft.memory") is None:
        return None
    from peft_baft.memory.folder import saved_numbers

    return saved_numbers(folder)


def _described(line: EditLine, snapshots: set[int]) -> dict[str, Any]:
    """Return an edit of the journal as `baft log --json` prints it."""
    facts = [{"prompt": prompt, "target": target} for prompt, target in line.facts]
    measured = {
        name: getattr(line, name)
        for name in ("steps", "loss", "seconds", "learned", "problem", "kept", "when")
    }
    return {"edit": line.edit, "facts": facts, **measured, "snapshot": line.edit in snapshots}


def _row(edit: dict[str, Any]) -> tuple[str, ...]:
    state = "in the adapter" if edit["kept"] else "reverted"
    if edit["kept"] and not edit.get("in_memory", True):
        state = "forgotten" if edit["forgotten"] else "replaced by a later edit"
    return (
        str(edit["edit"]),
        "; ".join(f"{fact['prompt']} -> {fact['target']}" for fact in edit["facts"]),
        (edit["when"] or "–").removesuffix("Z").replace("T", " "),
        "–" if edit["steps"] is None else str(edit["steps"]),
        "yes" if edit["learned"] else "NO",
        f"{state}: {edit['problem']}" if edit["problem"] else state,
        "yes" if edit["snapshot"] else "",
    )


def rollback(options: RollbackCommand) -> int:
    """Restore the adapter in a folder to its state after one of its edits; return the exit code."""
    _journal(options.adapter).roll_back(options.to)
    state = f"after edit {options.to}" if options.to else "before its first edit"
    print(f"{options.adapter} is restored to its state {state}.")
    return DONE


def _journal(adapter: Path) -> Journal:
    if not (adapter / LINES).exists():
        raise ValueError(
            f"{adapter} contains no journal ({LINES}): its edits were not made by `baft edit`."
        )
    return Journal(adapter)
