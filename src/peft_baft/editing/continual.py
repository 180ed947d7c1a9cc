"""Sequential edits for production: each is recorded, checked, reverted if it does harm, and never repeated after a restart."""

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

Check = Callable[[], str | None]  # returns a problem of the current model; None if there is none
RNG = "rng"  # key of a snapshot's header: the state of torch's random number generator


@dataclass(frozen=True)
class EditRecord:
    """The outcome of one batch of edits.

    Attributes:
        edits: the facts.
        result: the result; None if training was aborted by a NaN or infinity.
        problem: why the batch was rejected; None if it was accepted.
        kept: whether the batch is in the adapter.
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
    """Make edits one after another, `batch_size` at a time.

    A batch is made when its record is requested. In a resumed run, the records of earlier batches come from the journal. If
    there are several processes (`editor.processes`), they share the facts of each batch; the first one runs the check and
    writes the journal.

    Args:
        journal: records each batch, so that an interrupted run can be resumed exactly where it stopped.
        resume: continue the journal's last run, if there is one, instead of starting another.
        check: called after each batch; returns a description of the harm it did, or None.
        keep_only_good: revert a batch that was not learned, did harm or was aborted, and continue with the next.

    Raises:
        ValueError: as the editor's `edit`; another process is writing the journal; or the run to resume has other settings
            or facts.
        FloatingPointError: a batch was aborted by a NaN or infinity and `keep_only_good` is not set. The adapter is restored.
    """
    batches, processes = editor.batches(edits, batch_size), editor.processes
    with ExitStack() as stack:
        lines, last_number = _start(stack, editor, batches, journal, resume)
        for line, batch in zip(lines, batches, strict=False):
            yield _record_of(line, batch)
        for number, batch in enumerate(batches[len(lines) :], last_number + 1):
            record = _make(editor, batch, number, check, keep_only_good)
            if journal is not None:
                is_last = number == last_number + len(batches) - len(lines)
                processes.on_main(partial(_write, journal, editor, number, record, is_last))
            yield record


def _start(
    stack: ExitStack,
    editor: AttachedEditor,
    batches: Sequence[Sequence[Edit]],
    journal: Journal | None,
    resume: bool,
) -> tuple[list[EditLine], int]:
    """Start or resume a run. The journal is locked until the stack is closed.

    Returns:
        The lines of the batches that were made before, and the last edit number in the journal.
    """

    def start_in_first() -> tuple[list[EditLine], int]:
        if journal is None:
            return [], 0
        stack.enter_context(journal.writing())
        lines = _start_run(journal, editor, resume, batches)
        return lines, journal.state().last_number

    lines, last_number = editor.processes.on_main(start_in_first)
    _synchronise(editor)
    for line, batch in zip(lines, batches, strict=False):
        # An editor's state has only tensors, so the prompt format comes from the facts.
        if line.kept:
            editor.remember_form(editor.adapter_name, batch)
    return lines, last_number


def _synchronise(editor: AttachedEditor) -> None:
    """Copy the adapters and cursors of the first process to all others."""
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
    """Make one batch and check it; revert a rejected batch if `keep_only_good` is set."""
    restore = editor.snapshot()
    try:
        result = _edit(editor, batch, number)
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


def _edit(editor: Any, batch: Sequence[Edit], number: int) -> EditResult:
    """Make one batch. An independent edit gets the number that it has in the journal.

    Raises:
        ValueError: the editor's edits are independent and the batch has more than one.
    """
    if editor.independent and len(batch) > 1:
        raise ValueError("The edits of this adapter are independent: make them with batch_size=1.")
    result: EditResult
    if editor.independent:
        (result,) = editor.edit_independently(batch, [number])
    else:
        result = editor.edit(batch)
    return result


def _start_run(
    journal: Journal, editor: AttachedEditor, resume: bool, batches: Sequence[Sequence[Edit]]
) -> list[EditLine]:
    """Record the start of a run, or load the last snapshot of the run to resume.

    Returns:
        The lines of the resumed run's edits up to that snapshot.
    """
    state = journal.state()
    settings = _settings(editor, len(batches[0]))
    if not resume or not state.runs:
        _save_snapshot(journal, editor, state.last_number)
        journal.add(RunLine(state.last_number, settings))
        return []
    run = state.runs[-1]
    for name, value in settings.items():
        if run.settings.get(name) != value:
            raise ValueError(
                f"The run in {journal.folder} cannot be resumed: {name} was {run.settings.get(name)!r:.80} and is "
                f"{value!r:.80}. Resume it with the same settings, or start another run in another folder."
            )
    last = run.after + len(state.edits)
    own_snapshots = [number for number in journal.snapshots() if run.after <= number <= last]
    if not own_snapshots:
        raise ValueError(
            f"{journal.folder} has no snapshot of its last run; start another run in another folder."
        )
    reached = max(own_snapshots)
    lines = [line for line in state.edits if run.after < line.edit <= reached]
    _require_same_facts(lines, batches)
    tensors, header = journal.load_snapshot(reached)
    editor.load_state_dict(tensors)
    # From here on, random numbers are those of an uninterrupted run.
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(header[RNG])), dtype=torch.uint8))
    journal.add(ReturnLine(reached))
    journal.delete_snapshots_after(reached)
    return lines


def _write(
    journal: Journal, editor: AttachedEditor, number: int, record: EditRecord, is_last: bool
) -> None:
    """Write the line of a batch, followed by a snapshot if one is due."""
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
    """Restore the record of an earlier batch from its line."""
    result = None
    if line.steps is not None and line.loss is not None and line.seconds is not None:
        result = EditResult(line.steps, {STOP_TERM: line.loss}, line.seconds, line.learned)
    return EditRecord(batch, result, line.problem, line.kept)


def _require_same_facts(lines: Sequence[EditLine], batches: Sequence[Sequence[Edit]]) -> None:
    """Raise a ValueError unless the batches begin with those recorded in the lines."""
    for number, line in enumerate(lines):
        facts = _facts_of(batches[number]) if number < len(batches) else []
        if line.facts != facts:
            raise ValueError(
                f"Edit {line.edit} of the run to resume was {line.facts!r:.120}, but is now {facts!r:.120}. "
                "Resume with the same facts in the same order; more may follow them."
            )


def _facts_of(batch: Sequence[Edit]) -> list[list[Any]]:
    return [[prompt_in_json(edit.prompt), edit.target] for edit in batch]


def _settings(editor: AttachedEditor, batch_size: int) -> dict[str, Any]:
    """Return everything that affects the outcome of edits, in a form that survives JSON."""
    config = editor.model.peft_config[editor.adapter_name].to_dict() | {"inference_mode": None}
    for name in (*FIELDS, "base_sample"):  # filled in by the package, not set by the user
        config.pop(name, None)
    text = json.dumps(config, sort_keys=True, default=lambda other: sorted(map(str, other)))
    adapter = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {**editor.described(), "batch_size": batch_size, "adapter": adapter}
