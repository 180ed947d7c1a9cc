"""Independent edits side by side: seconds an edit with N lanes, N = 1 … 32, against one at a time."""

from __future__ import annotations

import torch
from common import alternated, arguments, editor, facts, load, machine, seconds, table

import peft_baft

LANES = (1, 2, 4, 8, 16, 32)


def edit_seconds(edited, edits, lanes: int, device: str) -> float:
    """Seconds an edit; the adapters are thrown away afterwards."""
    names: list[str] = []
    edited.unrelated_used = 0
    spent = seconds(
        lambda: names.extend(name for name, _ in edited.edit_each(edits, lanes)), device
    )
    for name in names:
        edited.model.delete_adapter(name)
    return spent / len(edits)


def main() -> None:
    options = arguments(__doc__, rows=32)
    base, tokenizer = load(options)
    machine(options)
    edits = facts(options, 0, options.rows)
    for method, unrelated in (("reft", ()), ("baft", ()), ("baft", peft_baft.GENERAL)):
        edited = editor(base, tokenizer, method, unrelated, lr=2e-3)
        works = {
            f"{lanes} lane(s)": lambda edited=edited, lanes=lanes: edit_seconds(
                edited, edits, lanes, options.device
            )
            for lanes in LANES
        }
        beside = ", an unrelated text beside each" if unrelated else ""
        table(
            f"{method}, ZsRE rows 0-{options.rows - 1}{beside}",
            "s an edit",
            alternated(works, options.rounds),
            "1 lane(s)",
        )
        edited.model.unload()


if __name__ == "__main__":
    with torch.random.fork_rng():
        main()
