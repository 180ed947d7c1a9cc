"""`baft log` and `baft rollback`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from peft_baft.cli.common import print_table
from peft_baft.editing.journal import LINES, Journal


def log(args: argparse.Namespace) -> int:
    """List the edits of an adapter."""
    journal = _journal(args.adapter)
    kept = set(journal.snapshots())
    print_table(
        ("edit", "facts", "steps", "learned?", "state", "snapshot"),
        [
            (
                str(line["edit"]),
                "; ".join(f"{prompt} -> {target}" for prompt, target in line["facts"]),
                str(line["steps"]),
                "yes" if line["learned"] else "NO",
                ("kept" if line["kept"] else "taken back") + (f": {line['problem']}" if line["problem"] else ""),
                "yes" if line["edit"] in kept else "",
            )
            for line in journal.edits()
        ],
    )
    return 0


def rollback(args: argparse.Namespace) -> int:
    """Bring an adapter back to what it was after one of its edits; 0 is before the first."""
    _journal(args.adapter).roll_back(args.to)
    print(f"{args.adapter} is as it was after edit {args.to}.")
    return 0


def _journal(adapter: Path) -> Journal:
    if not (adapter / LINES).exists():
        raise ValueError(f"{adapter} holds no journal ({LINES}): its edits were not made by `baft edit`.")
    return Journal(adapter)


def add_commands(commands: Any) -> None:
    """Put `log` and `rollback` among the commands."""
    logging = commands.add_parser("log", help=log.__doc__, description=log.__doc__)
    logging.set_defaults(run=log)
    back = commands.add_parser("rollback", help=rollback.__doc__, description=rollback.__doc__)
    back.set_defaults(run=rollback)
    back.add_argument("--to", required=True, type=int, metavar="N", help="number of the last edit to keep")
    for parser in (logging, back):
        parser.add_argument("adapter", type=Path, help="folder of the adapter")
