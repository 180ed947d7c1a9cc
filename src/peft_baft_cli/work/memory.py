"""`baft forget`, `baft merge`, and what `baft ask --explain` says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft_baft.editing.journal import Journal
from peft_baft.memory.editor import MemoryEditor
from peft_baft.memory.folder import (
    facts_by_number,
    forget_saved,
    merge_saved,
    saved_numbers,
)
from peft_baft_cli.errors import DONE
from peft_baft_cli.options import ForgetCommand, MergeCommand
from peft_baft_cli.screen import print_table

NO_MEMORY = "{} is no memory of edits; `baft edit --method memory` makes one."


def forget(options: ForgetCommand) -> int:
    """Take edits out of the memory in a folder; return the exit code."""
    try:
        numbers = [int(part) for part in options.edit.split(",")]
    except ValueError:
        raise ValueError(
            f"--edit takes numbers with commas, such as 37 or 3,5, not {options.edit!r}."
        ) from None
    _require_memory(options.adapter)
    forget_saved(options.adapter, numbers)
    left = len(saved_numbers(options.adapter) or ())
    what = f"edit {numbers[0]}" if len(numbers) == 1 else f"{len(set(numbers))} edits"
    print(f"{options.adapter} has forgotten {what}; {_edits(left)} left.")
    return DONE


def merge(options: MergeCommand) -> int:
    """Put two memories into one; return the exit code."""
    for folder in (options.first, options.second):
        _require_memory(folder)
    replaced = merge_saved(options.first, options.second, options.output)
    for old, new in replaced.items():
        print(f"edit {old} has the same question as edit {new}, which replaces it")
    print(f"{options.output} holds {_edits(len(saved_numbers(options.output) or ()))}.")
    return DONE


def explained(editor: MemoryEditor, prompts: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Say of each prompt which edit answers it, and how near the best one came.

    Args:
        folder: of the memory, whose journal tells the facts where it has one.
    """
    facts = facts_by_number(Journal(folder).state().edits)
    listed = []
    for prompt in prompts:
        match = editor.matches(prompt)
        fact = facts.get(match.best) if match.best is not None else None
        listed.append({"prompt": prompt, **asdict(match), "fact": fact})
    return listed


def print_explained(listed: Sequence[dict[str, Any]]) -> None:
    """Print what `explained` found."""
    rows = []
    for one in listed:
        fact = one["fact"]
        rows.append(
            (
                one["prompt"],
                "none" if one["edit"] is None else str(one["edit"]),
                "–"
                if one["best"] is None
                else f"{one['best']}{f': {fact[0]} -> {fact[1]}' if fact else ''}",
                f"{one['subject']:.2f}",
                f"{one['relation']:.2f}",
                _asked_for(one),
                "–" if one["runner_up"] is None else str(one["runner_up"]),
            )
        )
    print_table(
        (
            "prompt",
            "answered by",
            "likeliest edit",
            "subject",
            "relation",
            "asked for",
            "runner-up",
        ),
        rows,
    )
    if listed:
        print(
            f"An edit answers if the prompt is alike to its own in subject (above {listed[0]['least_subject']}) and in relation "
            f"(above {listed[0]['strictness']}, or clearly the same one of the list), and asks for nothing else."
        )


def _asked_for(match: Mapping[str, Any]) -> str:
    """Say what a prompt asks for, where the memory's list of relations tells."""
    asked = match["asks_for"] or "–"
    return f"{asked} (differs: {match['differs']})" if match["differs"] else asked


def require_memory_editor(model: Any, tokenizer: Any, template: Any, adapter: str) -> MemoryEditor:
    """Make the editor of a memory, which tells what matches.

    Raises:
        ValueError: the adapter is no memory of edits.
    """
    config = model.peft_config[model.active_adapters[0]]
    if getattr(config, "memory", None) is None:
        raise ValueError(NO_MEMORY.format(adapter))
    return MemoryEditor(model, tokenizer, template=template)


def _edits(count: int) -> str:
    return f"{count} edit" if count == 1 else f"{count} edits"


def _require_memory(folder: Path) -> None:
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}.")
    if saved_numbers(folder) is None:
        raise ValueError(NO_MEMORY.format(folder))
