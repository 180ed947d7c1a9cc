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

from peft_baft.data.cases import Edit
from peft_baft.editing.adapter_editor import AdapterEditor, adapter_tensors, snapshot
from peft_baft.editing.journal import Journal, adapter_state, restore_state
from peft_baft.editing.train import Outcome

Check = Callable[[], str | None]  # what is wrong with the model as it is now; None if nothing is


@dataclass(frozen=True)
class Made:
    """One batch of edits that was made, or tried.

    Attributes:
        edits: the facts. outcome: what it cost; None if it broke off. problem: why it is not good; None if it is.
        kept: it is in the adapter now.
    """

    edits: Sequence[Edit]
    outcome: Outcome | None
    problem: str | None
    kept: bool


def edit_continually(
    editor: AdapterEditor,
    edits: Sequence[Edit],
    batch_size: int = 1,
    *,
    journal: Journal | None = None,
    resume: bool = False,
    check: Check | None = None,
    keep_only_good: bool = False,
) -> Iterator[Made]:
    """Make edits in turn, `batch_size` at a time. A batch is made when it is asked for; those of a resumed run that were made
    before are given again, without being made.

    Args:
        journal: where each batch is recorded; an interrupted run then goes on exactly where it was.
        resume: go on with the journal's last run, if there is one, instead of beginning another.
        check: called after each batch; says what harm it did.
        keep_only_good: take a batch back that was not learned, did harm or broke off, and go on with the next.

    Several processes (`editor.processes`) share each batch's facts; the first one checks, and writes the journal.

    Raises:
        ValueError: as `AdapterEditor.edit`; another process writes the journal; or what is to be resumed differs.
        FloatingPointError: a batch broke off, and `keep_only_good` is not set. The adapter is as it was before.
    """
    batches, processes = editor.batches(edits, batch_size), editor.processes
    with ExitStack() as stack:

        def begun() -> tuple[list[dict[str, Any]], int, int]:
            if journal is None:
                return [], 0, editor.unrelated_used
            stack.enter_context(journal.writing())
            done = _begin(journal, editor, resume, batches)
            return done, max((line["edit"] for line in journal.edits()), default=0), editor.unrelated_used

        done, before, used = processes.of_first(begun)
        editor.unrelated_used = used
        processes.spread(adapter_tensors(editor.model))
        for line, batch in zip(done, batches, strict=False):
            yield _recalled(line, batch)
        for number, batch in enumerate(batches[len(done) :], before + 1):
            made = _make(editor, batch, check, keep_only_good)
            if journal is not None:
                last = batch is batches[-1]
                processes.of_first(partial(_write, journal, editor, number, made, last))
            yield made


def _make(editor: AdapterEditor, batch: Sequence[Edit], check: Check | None, keep_only_good: bool) -> Made:
    restore, used = snapshot(editor.model), editor.unrelated_used
    try:
        outcome = editor.edit(batch)
    except FloatingPointError as error:
        if not keep_only_good:
            raise
        return Made(batch, None, str(error), False)
    problem = None if outcome.learned else f"not learned after {outcome.steps} steps"
    problem = problem or (editor.processes.of_first(check) if check is not None else None)
    if problem is not None and keep_only_good:
        restore()
        editor.unrelated_used = used
    return Made(batch, outcome, problem, problem is None or not keep_only_good)


def _begin(
    journal: Journal, editor: AdapterEditor, resume: bool, batches: Sequence[Sequence[Edit]]
) -> list[dict[str, Any]]:
    """Note the run's beginning, or bring the editor to where the last run came to; the lines of its edits."""
    runs, edits = [line for line in journal.lines() if "run" in line], journal.edits()
    settings = _settings(editor, len(batches[0]))
    if not resume or not runs:
        number = edits[-1]["edit"] if edits else 0
        _keep(journal, editor, number)
        journal.add({"run": {"after": number, **settings}})
        return []
    run = runs[-1]["run"]
    different = [name for name, value in settings.items() if run.get(name) != value]
    if different:
        name = different[0]
        raise ValueError(
            f"The run in {journal.folder} cannot be resumed: {name} was {run.get(name)!r:.80} and is "
            f"{settings[name]!r:.80}. Resume it with the same settings, or begin another in another folder."
        )
    reached = max((n for n in journal.snapshots() if run["after"] <= n <= run["after"] + len(edits)), default=None)
    if reached is None:
        raise ValueError(f"{journal.folder} holds no snapshot of its last run; begin another in another folder.")
    done = [line for line in edits if run["after"] < line["edit"] <= reached]
    _require_same(done, batches)
    tensors, state = journal.kept(reached)
    restore_state(editor.model, editor.adapter_name, tensors)
    editor.unrelated_used = state.get("unrelated_used", 0)
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(state["rng"])), dtype=torch.uint8))
    journal.add({"back_to": reached})
    journal.forget_after(reached)
    return done


def _write(journal: Journal, editor: AdapterEditor, number: int, made: Made, last: bool) -> None:
    outcome = made.outcome
    journal.add(
        {
            "edit": number,
            "facts": _told(made.edits),
            "steps": outcome and outcome.steps,
            "loss": outcome and outcome.losses["teacher_forcing"],
            "seconds": outcome and outcome.seconds,
            "learned": bool(outcome and outcome.learned),
            "problem": made.problem,
            "kept": made.kept,
        }
    )
    if number % journal.every == 0 or last:
        _keep(journal, editor, number)


def _keep(journal: Journal, editor: AdapterEditor, number: int) -> None:
    rng = bytes(torch.get_rng_state().tolist()).hex()
    state = {"rng": rng, "unrelated_used": editor.unrelated_used}
    journal.keep(number, adapter_state(editor.model, editor.adapter_name), state)


def _recalled(line: dict[str, Any], batch: Sequence[Edit]) -> Made:
    outcome = None
    if line["steps"] is not None:
        outcome = Outcome(line["steps"], {"teacher_forcing": line["loss"]}, line["seconds"], line["learned"])
    return Made(batch, outcome, line["problem"], line["kept"])


def _require_same(done: Sequence[dict[str, Any]], batches: Sequence[Sequence[Edit]]) -> None:
    for line, batch in zip(done, [*batches, *[()] * len(done)], strict=False):
        if line["facts"] != _told(batch):
            raise ValueError(
                f"Edit {line['edit']} of the run to resume was {line['facts']!r:.120}, but now {_told(batch)!r:.120} stands "
                "in its place. Resume with the same facts, in the same order; more may follow them."
            )


def _told(batch: Sequence[Edit]) -> list[list[str]]:
    return [[edit.prompt, edit.target] for edit in batch]


def _settings(editor: AdapterEditor, batch_size: int) -> dict[str, Any]:
    """What decides how the edits come out, in a form that JSON keeps."""
    named = ("descent", "batch_descent", "objective", "unrelated_per_edit")
    settings = {name: repr(getattr(editor, name)) for name in named if hasattr(editor, name)}
    config = editor.model.peft_config[editor.adapter_name].to_dict() | {"inference_mode": None}
    texts = [row.ids for row in getattr(editor, "_unrelated", ())]
    return settings | {"batch_size": batch_size, "unrelated": _hash(texts), "adapter": _hash(config)}


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=lambda other: sorted(map(str, other)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
