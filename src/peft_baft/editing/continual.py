"""Edits one after another, as a production act: each recorded, checked, taken back if it does harm, and never made twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from peft_baft.adapter.state import adapter_tensors
from peft_baft.adapter.taught_form import FIELDS, form_fields
from peft_baft.data.cases import Edit, prompt_in_json
from peft_baft.editing.attached import AttachedEditor
from peft_baft.editing.editor import CURSOR, EditResult
from peft_baft.editing.journal import FORM, EditLine, Journal, ReturnLine, RunLine, now
from peft_baft.editing.train import STOP_TERM

Check = Callable[[], str | None]  # what is wrong with the model as it is now; None if nothing is
RNG = "rng"  # in a snapshot's header: the state of torch's random numbers


@dataclass(frozen=True)
class EditRecord:
    """One batch of edits that was made, or tried.

    Attributes:
        edits: the facts.
        result: what they cost; None if the batch broke off.
        problem: why it is not good; None if it is.
        kept: whether it is in the adapter now.
    """

    edits: Sequence[Edit]
    result: EditResult | None
    problem: str | None
    kept: bool


def edit_continually(
    editor: AttachedEditor,
    edits: Sequence[Edit],
    batch_size: int = 1,
    *,
    journal: Journal | None = None,
    resume: bool = False,
    check: Check | None = None,
    keep_only_good: bool = False,
) -> Iterator[EditRecord]:
    """Make edits in turn, `batch_size` at a time.

    A batch is made when it is asked for. Batches of a resumed run that were made before are given from the journal.
    Several processes (`editor.processes`) share each batch's facts; the first one checks, and writes the journal.

    Args:
        journal: where each batch is recorded; an interrupted run then goes on exactly where it was.
        resume: go on with the journal's last run, if there is one, instead of beginning another.
        check: called after each batch; says what harm it did.
        keep_only_good: take a batch back that was not learned, did harm or broke off, and go on with the next.

    Raises:
        ValueError: as the editor's `edit`; another process writes the journal; or what is to be resumed differs.
        FloatingPointError: a batch broke off, and `keep_only_good` is not set. The adapter is as it was before.
    """
    batches, processes = editor.batches(edits, batch_size), editor.processes
    with ExitStack() as stack:
        lines, last_number = _begun(stack, editor, batches, journal, resume)
        for line, batch in zip(lines, batches, strict=False):
            yield _record_of(line, batch)
        for number, batch in enumerate(batches[len(lines) :], last_number + 1):
            record = _make(editor, batch, number, check, keep_only_good)
            if journal is not None:
                is_last = number == last_number + len(batches) - len(lines)
                processes.on_main(partial(_write, journal, editor, number, record, is_last))
            yield record


def _begun(
    stack: ExitStack,
    editor: AttachedEditor,
    batches: Sequence[Sequence[Edit]],
    journal: Journal | None,
    resume: bool,
) -> tuple[list[EditLine], int]:
    """Begin a run, or go on with one; the journal is this process's until the stack is closed.

    Returns:
        The batches that were made before, and the last number in the journal.
    """

    def begin() -> tuple[list[EditLine], int]:
        """In the first process alone."""
        if journal is None:
            return [], 0
        stack.enter_context(journal.writing())
        lines = _begin_run(journal, editor, resume, batches)
        return lines, max((line.edit for line in journal.edits()), default=0)

    lines, last_number = editor.processes.on_main(begin)
    _follow_first(editor)
    for line, batch in zip(lines, batches, strict=False):
        if line.kept:  # an editor's state is tensors alone, so the form comes from the facts
            editor.remember_form(editor.adapter_name, batch)
    return lines, last_number


def _follow_first(editor: AttachedEditor) -> None:
    """Bring the adapters and cursors of all processes to those of the first one."""
    processes = editor.processes
    if processes.world_size == 1:
        return
    processes.broadcast(adapter_tensors(editor.model))
    state = editor.state_dict()
    cursors = {name: value for name, value in state.items() if name.startswith(CURSOR)}
    editor.load_state_dict({**state, **processes.on_main(lambda: cursors)})


def _not_learned(result: EditResult) -> str | None:
    return None if result.learned else f"not learned after {result.steps} steps"


def _make(
    editor: AttachedEditor,
    batch: Sequence[Edit],
    number: int,
    check: Check | None,
    keep_only_good: bool,
) -> EditRecord:
    """Make one batch, check it, and take it back if it is not good and only good ones are kept."""
    restore = editor.snapshot()
    try:
        result = _edited(editor, batch, number)
    except FloatingPointError as error:
        if not keep_only_good:
            raise
        return EditRecord(batch, None, str(error), False)
    problem = _not_learned(result)
    if problem is None and check is not None:
        problem = editor.processes.on_main(check)
    if problem is not None and keep_only_good:
        restore()
        return EditRecord(batch, result, problem, False)
    return EditRecord(batch, result, problem, True)


def _edited(editor: Any, batch: Sequence[Edit], number: int) -> EditResult:
    """Make one batch; an independent edit keeps the number that the journal gives it.

    Raises:
        ValueError: a batch of independent edits has several.
    """
    if not editor.independent:
        return editor.edit(batch)
    if len(batch) > 1:
        raise ValueError("The edits of this adapter are independent: make them with batch_size=1.")
    return editor.edit_independently(batch, [number])[0]


def _begin_run(
    journal: Journal, editor: AttachedEditor, resume: bool, batches: Sequence[Sequence[Edit]]
) -> list[EditLine]:
    """Note the run's beginning, or bring the editor to where the last run came to; gives the lines of that run's edits."""
    runs, edits = journal.runs(), journal.edits()
    settings = _settings(editor, len(batches[0]))
    if not resume or not runs:
        number = edits[-1].edit if edits else 0
        _save_snapshot(journal, editor, number)
        journal.add(RunLine(number, settings))
        return []
    run = runs[-1]
    for name, value in settings.items():
        if run.settings.get(name) != value:
            raise ValueError(
                f"The run in {journal.folder} cannot be resumed: {name} was {run.settings.get(name)!r:.80} and is "
                f"{value!r:.80}. Resume it with the same settings, or begin another in another folder."
            )
    last = run.after + len(edits)
    reached = max(
        (number for number in journal.snapshots() if run.after <= number <= last), default=None
    )
    if reached is None:
        raise ValueError(
            f"{journal.folder} holds no snapshot of its last run; begin another in another folder."
        )
    lines = [line for line in edits if run.after < line.edit <= reached]
    _require_same_facts(lines, batches)
    state, header = journal.load_snapshot(reached)
    editor.load_state_dict(state)
    # Whatever is drawn from here on is what an uninterrupted run would have drawn.
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(header[RNG])), dtype=torch.uint8))
    journal.add(ReturnLine(reached))
    journal.delete_snapshots_after(reached)
    return lines


def _write(
    journal: Journal, editor: AttachedEditor, number: int, record: EditRecord, is_last: bool
) -> None:
    """Write the line of a batch, and a snapshot after it if it is time for one."""
    result = record.result
    line = EditLine(
        edit=number,
        facts=_facts_of(record.edits),
        steps=None if result is None else result.steps,
        loss=None if result is None else result.losses[STOP_TERM],
        seconds=None if result is None else result.seconds,
        learned=result is not None and result.learned,
        problem=record.problem,
        kept=record.kept,
        when=now(),
    )
    journal.add(line)
    if is_last or number % journal.every == 0:
        _save_snapshot(journal, editor, number)


def _save_snapshot(journal: Journal, editor: AttachedEditor, number: int) -> None:
    rng = bytes(torch.get_rng_state().tolist()).hex()
    form = form_fields(editor.model.peft_config[editor.adapter_name])
    journal.save_snapshot(number, editor.state_dict(), {RNG: rng, FORM: form})


def _record_of(line: EditLine, batch: Sequence[Edit]) -> EditRecord:
    """Make the record of a batch that was made before from its line."""
    result = None
    if line.steps is not None and line.loss is not None and line.seconds is not None:
        result = EditResult(line.steps, {STOP_TERM: line.loss}, line.seconds, line.learned)
    return EditRecord(batch, result, line.problem, line.kept)


def _require_same_facts(lines: Sequence[EditLine], batches: Sequence[Sequence[Edit]]) -> None:
    """Raise a ValueError unless the batches begin with those that the lines record."""
    for number, line in enumerate(lines):
        facts = _facts_of(batches[number]) if number < len(batches) else []
        if line.facts != facts:
            raise ValueError(
                f"Edit {line.edit} of the run to resume was {line.facts!r:.120}, but now {facts!r:.120} stands in its place. "
                "Resume with the same facts, in the same order; more may follow them."
            )


def _facts_of(batch: Sequence[Edit]) -> list[list[Any]]:
    return [[prompt_in_json(edit.prompt), edit.target] for edit in batch]


def _settings(editor: AttachedEditor, batch_size: int) -> dict[str, Any]:
    """Collect what decides how the edits come out, in a form that JSON keeps."""
    config = editor.model.peft_config[editor.adapter_name].to_dict() | {"inference_mode": None}
    for name in (*FIELDS, "base_sample"):  # what is filled in is no setting
        config.pop(name, None)
    text = json.dumps(config, sort_keys=True, default=lambda other: sorted(map(str, other)))
    adapter = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {**editor.described(), "batch_size": batch_size, "adapter": adapter}
