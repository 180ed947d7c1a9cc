"""`baft report`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from json import dumps
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from peft_baft.data.cases import Case
from peft_baft.data.datasets import read_cases
from peft_baft.data.templates import Template, chosen_templates
from peft_baft.editing.journal import LINES, Journal
from peft_baft.tools.report.folder import AdapterFolder, read_folder
from peft_baft.tools.report.gather import gather
from peft_baft.tools.report.page import page, summary
from peft_baft.tools.report.taught import (
    TaughtFact,
    facts_of_cases,
    facts_of_journal,
    unknown_cases,
    with_cases,
)
from peft_baft_cli.errors import DONE
from peft_baft_cli.options import ReportCommand
from peft_baft_cli.screen import doing, progress_shown, shown
from peft_baft_cli.work.common import adapter_folder, attach_adapter, chosen_model, require_file

PAGE = "report.html"
EDIT_FILE = "the .jsonl, .json or .csv file of `baft edit`"


def report(options: ReportCommand) -> int:
    """Write the page of an adapter with its journal; return the exit code."""
    local = Path(options.adapter)
    output = options.output or (local / PAGE if local.is_dir() else Path(PAGE))
    if output.is_dir():
        raise ValueError(
            f"--output {output} is a folder; it takes a file, such as {output / PAGE}."
        )
    directory = adapter_folder(options.adapter, options.adapter_revision)
    choice = chosen_model(options)
    cases: Sequence[Case] = ()
    if options.edits is not None:
        cases = read_cases(require_file(options.edits, "--edits", EDIT_FILE))
    folder = read_folder(directory)
    facts = _facts(directory, cases)
    base, tokenizer = choice.load_base()
    forms = _forms(tokenizer, options.template)
    with ExitStack() as stack:
        result = gather(
            attach_adapter(base, str(directory)),
            tokenizer,
            facts,
            forms,
            folder,
            _public_name(choice.model),
            limit=options.limit,
            neighbours=options.neighbours,
            notes=_notes(directory, folder, facts, cases, forms, options.edits),
            begin=lambda total: _bar(stack, total),
        )
    root = os.path.relpath(directory.resolve(), output.resolve().parent)
    with doing("writing"):
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page(result, "" if root == "." else Path(root).as_posix()), "utf-8")
    if options.json:
        print(dumps({"page": str(output), **result.to_dict()}, indent=2))
    else:
        print(summary(result))
        print(f"{shown(str(output))}: open it in a browser")
    return DONE


def _public_name(model: str) -> str:
    """Return a base model's name for readers elsewhere: of a local folder or file, only the last part of its path."""
    return Path(model).name if Path(model).exists() else model


def _facts(directory: Path, cases: Sequence[Case]) -> list[TaughtFact]:
    """Return the facts of the journal; without a journal, those of the edit file."""
    if (directory / LINES).exists():
        return with_cases(facts_of_journal(Journal(directory)), cases)
    if not cases:
        raise ValueError(
            f"{directory} contains no journal ({LINES}), so its facts are unknown. Give them with --edits FILE."
        )
    return facts_of_cases(cases)


def _forms(tokenizer: PreTrainedTokenizerBase, chosen: str | None) -> tuple[Template, ...]:
    """Return the forms of prompts: the chosen ones, or all that the tokenizer supports."""
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    return chosen_templates(tokenizer, chosen or ("both" if has_chat else "raw"))


def _notes(
    directory: Path,
    folder: AdapterFolder,
    facts: Sequence[TaughtFact],
    cases: Sequence[Case],
    forms: Sequence[Template],
    edits: Path | None,
) -> list[str]:
    """Return what readers of the page should know about the source of its facts."""
    notes = []
    if not (directory / LINES).exists():
        notes.append(
            f"The folder contains no journal. The facts are those of {edits}; when and how they were taught is unknown."
        )
    elif unknown := unknown_cases(facts, cases):
        notes.append(
            f"{unknown} of the {len(cases)} records of {edits} are not in the journal, and were not asked about."
        )
    if folder.as_journal is False:
        notes.append(
            "The adapter's file differs from the last edit of its journal: the run was interrupted (`baft edit --resume` "
            "continues it), or something else has written the file."
        )
    asked = {form.name for form in forms}
    elsewhere = sum(bool(fact.forms) and not asked & set(fact.forms) for fact in facts)
    if elsewhere:
        notes.append(
            f"{elsewhere} of the facts were taught in a prompt format that was not used here; an edit works only in its own "
            "format."
        )
    return notes


def _bar(stack: ExitStack, total: int) -> Callable[[int], object]:
    """Show a progress bar until the stack is closed; return the function that advances it."""
    bar = stack.enter_context(
        tqdm(total=total, desc="asking", unit="answer", disable=not progress_shown(), leave=False)
    )
    return bar.update
