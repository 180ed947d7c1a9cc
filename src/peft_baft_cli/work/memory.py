"""`baft forget`, `baft merge`, and the explanations of `baft ask --explain`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from peft_baft.data.templates import Template
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

NO_MEMORY = "{} is not a memory of edits; `baft edit --method memory` makes one."


def forget(options: ForgetCommand) -> int:
    """Remove edits from the memory in a folder; return the exit code."""
    try:
        numbers = [int(part) for part in options.edit.split(",")]
    except ValueError:
        raise ValueError(
            f"--edit takes numbers separated by commas, such as 37 or 3,5, not {options.edit!r}."
        ) from None
    _require_memory(options.adapter)
    forget_saved(options.adapter, numbers)
    remaining = len(saved_numbers(options.adapter) or ())
    what = f"edit {numbers[0]}" if len(numbers) == 1 else f"{len(set(numbers))} edits"
    print(f"{options.adapter} has forgotten {what}; {_edits(remaining)} left.")
    return DONE


def merge(options: MergeCommand) -> int:
    """Merge two memories; return the exit code."""
    for folder in (options.first, options.second):
        _require_memory(folder)
    replaced = merge_saved(options.first, options.second, options.output)
    for old, new in replaced.items():
        print(f"edit {old} has the same question as edit {new}, which replaces it")
    print(f"{options.output} contains {_edits(len(saved_numbers(options.output) or ()))}.")
    return DONE


def explained(editor: MemoryEditor, prompts: Sequence[str], folder: Path) -> list[dict[str, Any]]:
    """Return for each prompt which edit answers it, with the scores, as `--json` prints them.

    Args:
        folder: of the memory. If it has a journal, the facts are taken from it.
    """
    facts = facts_by_number(Journal(folder).state().edits)
    matches = []
    for prompt in prompts:
        match = editor.matches(prompt)
        fact = facts.get(match.best) if match.best is not None else None
        matches.append({"prompt": prompt, **asdict(match), "fact": fact})
    return matches


def print_explained(matches: Sequence[Mapping[str, Any]]) -> None:
    """Print what `explained` returned."""
    header = (
        "prompt",
        "answered by",
        "best edit",
        "subject",
        "relation",
        "asks for",
        "runner-up",
    )
    print_table(header, [_explained_row(match) for match in matches])
    if matches:
        print(
            "An edit answers if its question is similar to the prompt in subject (above "
            f"{matches[0]['least_subject']}) and in relation (above {matches[0]['strictness']}, or clearly the same common "
            "relation), and the prompt asks for nothing else."
        )


def _explained_row(match: Mapping[str, Any]) -> tuple[str, ...]:
    best = _or_dash(match["best"])
    if match["fact"]:
        prompt, target = match["fact"]
        best += f": {prompt} -> {target}"
    asks_for = _or_dash(match["asks_for"])
    if match["differs"]:
        asks_for += f" (differs: {match['differs']})"
    return (
        match["prompt"],
        "none" if match["edit"] is None else str(match["edit"]),
        best,
        f"{match['subject']:.2f}",
        f"{match['relation']:.2f}",
        asks_for,
        _or_dash(match["runner_up"]),
    )


def _or_dash(value: object) -> str:
    return "–" if value is None else str(value)


def require_memory_editor(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, template: Template, adapter: str
) -> MemoryEditor:
    """Return the editor of a memory, which can explain its matches.

    Raises:
        ValueError: the adapter is not a memory of edits.
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
