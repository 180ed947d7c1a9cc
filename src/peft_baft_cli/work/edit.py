"""`baft edit`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from peft import PeftConfig, PeftModel, get_peft_model
from tqdm import tqdm

from peft_baft import BaftConfig, editor_for
from peft_baft.adapter.registration import BAFT
from peft_baft.adapter.weights import FILE as WEIGHTS
from peft_baft.data.cases import Case, Edit, prompt_words
from peft_baft.data.datasets import read_cases, read_unrelated
from peft_baft.data.unrelated import CANARIES
from peft_baft.editing.attached import AttachedEditor
from peft_baft.editing.baft import UNRELATED_USED
from peft_baft.editing.continual import EditRecord, edit_continually
from peft_baft.editing.journal import LINES, Journal
from peft_baft.editing.presets import Preset
from peft_baft.evaluation.before_after import Report, watch
from peft_baft.evaluation.guard import canary_check
from peft_baft.integrations.card import REPORT
from peft_baft.loading import locate_model
from peft_baft.processes import Processes
from peft_baft.storage import apply_umask_mode
from peft_baft_cli.errors import DONE, NOT_SO, Interrupted
from peft_baft_cli.options import EditCommand
from peft_baft_cli.screen import doing, progress_shown
from peft_baft_cli.work.common import (
    adapter_config,
    attach_adapter,
    chosen_preset,
    chosen_unrelated,
    default_device,
    describe_split,
    load_base,
    require_device,
    require_file,
    type_errors_as_bad_input,
)
from peft_baft_cli.work.edit_report import print_report, summary

SNAPSHOTS = 100  # of a run, at most, unless the command line says how many
EDIT_FILE = "a .jsonl, .json or .csv file of facts, each with prompt and target"
CANARY_FILE = "a .jsonl or .json file of questions, each with prompt and answer"


def edit(options: EditCommand) -> int:
    """Teach the facts of a file to a model, save the adapter and say what became of it; return the exit code."""
    with Processes.started(options.processes) as processes:
        device = default_device(options.device)
        split = describe_split(processes, device, "the facts of each batch")
        if processes.is_main and split:
            print(split, flush=True, file=sys.stderr if options.json else sys.stdout)
        device = processes.device(device)
        require_device(device)
        report = _edit(options, device, processes)
        if processes.is_main and options.json:
            print(json.dumps(report, indent=2))
        elif processes.is_main:
            print_report(report)
    return NOT_SO if options.strict and report["known"] < report["facts"] else DONE


def _edit(options: EditCommand, device: str, processes: Processes) -> dict[str, Any]:
    """Make the edits, by several processes of which the first writes; return the report in each of them."""
    cases = read_cases(require_file(options.edits, "--edits", EDIT_FILE))
    unrelated = chosen_unrelated(options.unrelated or "general")
    canaries = _canaries(options.canaries)
    preset = chosen_preset(options.preset, options.r, options.lr, options.max_steps)
    continued = (
        None
        if options.adapter is None
        else adapter_config(options.adapter, options.adapter_revision)
    )
    if continued is not None and continued.peft_type != BAFT:
        raise ValueError(
            f"baft edit continues BaFT adapters, but {options.adapter} is of type {continued.peft_type}."
        )
    memory, reason = _chosen_method(options, continued)
    if processes.is_main and not options.json:
        print(f"Method: {'memory' if memory else 'plain'}, {reason}.")
    locate_model(options.model, options.revision)  # raises before anything is written
    with processes.barrier():
        if processes.is_main:
            _prepare_output(options)
    with doing(f"loading {options.model}", processes.is_main):
        model, tokenizer = _edited_model(options, device, preset, continued, memory)
    editor = _editor(options, model, tokenizer, preset, unrelated, processes)
    earlier = _earlier_edits(options, editor, cases)
    asked_in = editor.templates[-1]  # of both forms, the chat: what a chat model is asked in
    with doing("asking the model before it is edited", processes.is_main):
        finish_report = watch(model, tokenizer, cases, asked_in)
        check = None
        if options.min_agreement is not None:
            check = canary_check(model, tokenizer, options.min_agreement, canaries, asked_in)
    records = _make_edits(options, editor, cases, check)
    with doing("asking the model after its edits", processes.is_main):
        return processes.on_main(lambda: _saved(options, editor, finish_report(), records, earlier))


def _chosen_method(options: EditCommand, continued: PeftConfig | None) -> tuple[bool, str]:
    """Choose between a memory and a plain adapter.

    Returns:
        Whether the edits go into a memory, and why, in words.

    Raises:
        ValueError: the options do not fit the method, or the adapter that is continued.
    """
    of_plain = _given(
        {
            "--unrelated": options.unrelated is not None,
            "--preset": options.preset != "default",
            "--batch-size": options.batch_size is not None,
            "--one-by-one": options.one_by_one,
            "--r": options.r is not None,
            "--lr": options.lr is not None,
            "--max-steps": options.max_steps is not None,
        }
    )
    of_memory = _given(
        {
            "--statistics": options.statistics is not None,
            "--known": options.known != "replace",
            "--after": options.after is not None,
        }
    )
    if options.one_by_one and options.batch_size is not None:
        raise ValueError("--one-by-one is --batch-size 1: leave one of them out.")
    is_memory, reason = _wanted_method(options, continued, of_plain)
    unfit = of_plain if is_memory else of_memory
    if unfit:
        this, other = ("memory", "plain adapter") if is_memory else ("plain adapter", "memory")
        raise ValueError(f"{unfit[0]} is for a {other}, and this is a {this}: leave it out.")
    if options.statistics is not None and continued is not None:
        raise ValueError(f"{options.adapter} has statistics of its own: leave --statistics out.")
    return is_memory, reason


def _wanted_method(
    options: EditCommand, continued: PeftConfig | None, of_plain: Sequence[str]
) -> tuple[bool, str]:
    wanted = {"auto": None, "plain": False, "memory": True}[options.method]
    if continued is not None:
        kind: Any = getattr(continued, "kind", None)
        is_memory = not kind.trains
        if wanted not in (None, is_memory):
            what = "a memory" if is_memory else "a plain adapter"
            raise ValueError(f"{options.adapter} is {what}; leave --method out to continue it.")
        return is_memory, f"as {options.adapter}, which is continued"
    if wanted is not None:
        return wanted, "as --method says"
    if of_plain:
        return False, f"since {of_plain[0]} is for a plain adapter"
    return True, "since no option asks for a plain adapter"


def _given(options: Mapping[str, bool]) -> list[str]:
    return [name for name, is_given in options.items() if is_given]


def _batch_size(options: EditCommand, memory: bool, facts: int) -> int:
    """Return how many facts are taught at once: all of them to a plain adapter, unless the command line says otherwise."""
    return 1 if memory or options.one_by_one else options.batch_size or facts


def _editor(
    options: EditCommand,
    model: PeftModel,
    tokenizer: Any,
    preset: Preset,
    unrelated: Sequence[Any],
    processes: Processes,
) -> Any:
    """Make the editor of an adapter."""
    settings: dict[str, Any] = {"processes": processes, "template": options.template}
    config: Any = model.peft_config[model.active_adapters[0]]
    if not config.kind.trains:
        return editor_for(model, tokenizer, statistics=options.statistics, **settings)
    return editor_for(
        model,
        tokenizer,
        unrelated,
        preset.objective,
        preset.descent,
        preset.batch_descent,
        unrelated_used=_unrelated_used(options.adapter, options.adapter_revision),
        scope=preset.scope,
        **settings,
    )


def _earlier_edits(
    options: EditCommand, editor: Any, cases: Sequence[Case]
) -> dict[str, list[Any]]:
    """Find the edits in a memory that answer the questions of new ones.

    Returns:
        `replaced`: numbers of those with the same questions, which go. `reworded`: prompts of new facts that others answer, with
        their numbers; these stay.

    Raises:
        ValueError: there are some, and they are not to be replaced.
    """
    if not editor.independent or not editor.numbers:
        return {"replaced": [], "reworded": []}
    facts = [case.edit for case in cases]
    known, reworded = editor.known(facts), editor.reworded(facts)
    answered = known | reworded
    if answered and options.known == "refuse":
        place = min(answered)
        prompt = prompt_words(facts[place].prompt)
        raise ValueError(
            f"{options.adapter} answers the questions of {len(answered)} of these facts; the first is {prompt!r:.80}, "
            f"by its edit {answered[place]}. Leave --known out to teach them all the same, or take them out of {options.edits}."
        )
    return {
        "replaced": sorted(set(known.values())),
        "reworded": [
            {"prompt": prompt_words(facts[place].prompt), "edit": number}
            for place, number in reworded.items()
        ],
    }


def _make_edits(
    options: EditCommand, editor: AttachedEditor, cases: Sequence[Case], check: Any
) -> list[EditRecord]:
    """Make the edits, or go on with a run of them; return a record of each.

    Raises:
        Interrupted: The user stopped it once its journal had begun.
    """
    processes, batch_size = editor.processes, _batch_size(options, editor.independent, len(cases))
    batch_count = -(-len(cases) // batch_size)
    every = options.snapshot_every or max(1, -(-batch_count // SNAPSHOTS))
    journal = Journal(options.output, every)
    if options.overwrite and not options.resume and processes.is_main:
        journal.begin_anew()
    runs_before = _runs(journal)
    batches = edit_continually(
        editor,
        _edits(options, cases),
        batch_size,
        journal=journal,
        resume=options.resume,
        check=check,
        keep_only_good=options.keep_only_good,
    )
    shown = processes.is_main and progress_shown()
    try:
        return _with_progress(batches, batch_count, batch_size, shown)
    except KeyboardInterrupt:
        if _runs(journal) > runs_before or (options.resume and runs_before):
            raise Interrupted from None
        raise


def _edits(options: EditCommand, cases: Sequence[Case]) -> list[Edit]:
    """List the edits of the records, with what `--after` says where a record says nothing."""
    edits = [case.edit for case in cases]
    return [e if e.after else replace(e, after=options.after) for e in edits]


def _runs(journal: Journal) -> int:
    return len(journal.runs())


def _saved(
    options: EditCommand,
    editor: AttachedEditor,
    result: Report,
    records: Sequence[EditRecord],
    earlier: Mapping[str, Any],
) -> dict[str, Any]:
    """Save the adapter with its report; return the report, which is what `--json` prints.

    Args:
        earlier: as `_earlier_edits` returns them.
    """
    output = options.output
    editor.model.save_pretrained(str(output), save_embedding_layers=False)
    apply_umask_mode(output / WEIGHTS)  # safetensors makes its files readable by their owner alone
    report = {
        "model": options.model,
        "adapter": str(output),
        "template": "both" if len(editor.templates) == 2 else editor.templates[0].name,
        "bytes": (output / WEIGHTS).stat().st_size,
        "sha256": sha256((output / WEIGHTS).read_bytes()).hexdigest(),
        **summary(result, records),
        **earlier,
        "method": "memory" if editor.independent else "plain",
        "unrelated_used": getattr(editor, "unrelated_used", 0),
    }
    (output / REPORT).write_text(
        json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    editor.model.create_or_update_model_card(str(output))  # with what the report says
    return report


def _canaries(file: Path | None) -> Sequence[Any]:
    return (
        CANARIES if file is None else read_unrelated(require_file(file, "--canaries", CANARY_FILE))
    )


def _edited_model(
    options: EditCommand,
    device: str,
    preset: Preset,
    continued: PeftConfig | None,
    memory: bool,
) -> tuple[PeftModel, Any]:
    """Return the base model with a fresh adapter, or with the one to continue, and its tokenizer."""
    revision = options.revision
    base, tokenizer = load_base(options.model, revision, options.dtype, device)
    if continued is not None and options.adapter is not None:
        return attach_adapter(
            base, options.adapter, options.adapter_revision, trainable=True
        ), tokenizer
    torch.manual_seed(options.seed)
    with type_errors_as_bad_input():
        settings: dict[str, Any] = {"memory": True} if memory else preset.config
        config = BaftConfig(task_type="CAUSAL_LM", **settings)
    return get_peft_model(base, config, revision=revision).eval(), tokenizer


def _unrelated_used(adapter: str | None, revision: str | None) -> int:
    """Return how many unrelated texts an adapter to continue was trained beside: it goes on with the next one."""
    if adapter is None:
        return 0
    journal = Journal(adapter)
    if journal.snapshots():
        state, _ = journal.load_snapshot(journal.snapshots()[-1])
        return int(state[UNRELATED_USED])
    report = Path(adapter) / REPORT
    if not Path(adapter).is_dir():
        try:
            report = Path(hf_hub_download(adapter, REPORT, revision=revision))
        except (OSError, ValueError):  # the adapter was made, or uploaded, without a report
            return 0
    return int(json.loads(report.read_text("utf-8"))["unrelated_used"]) if report.exists() else 0


def _prepare_output(options: EditCommand) -> None:
    """Make the output folder; raise a ValueError if an adapter or an unfinished run in it would be lost."""
    output, adapter = options.output, options.adapter
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; it takes a folder for the adapter.")
    continues_it = adapter is not None and Path(adapter).resolve() == output.resolve()
    allowed = options.overwrite or options.resume or continues_it
    if (output / WEIGHTS).exists() and not allowed:
        raise ValueError(
            f"{output} holds an adapter: continue it with --adapter {output}, or replace it with --overwrite."
        )
    if (output / LINES).exists() and not allowed:
        raise ValueError(
            f"{output} holds an unfinished run: go on with --resume, or begin anew with --overwrite."
        )
    # So that an unwritable folder stops the work before it begins.
    output.mkdir(parents=True, exist_ok=True)


def _with_progress(
    batches: Iterable[EditRecord], count: int, batch_size: int, shown: bool
) -> list[EditRecord]:
    unit = "edit" if batch_size == 1 else "batch"
    records = []
    with tqdm(total=count, desc="editing", unit=unit, disable=not shown, leave=False) as bar:
        for batch in batches:
            records.append(batch)
            if batch.result is not None:
                bar.set_postfix(
                    steps=batch.result.steps, loss=f"{batch.result.losses['teacher_forcing']:.3f}"
                )
            bar.update()
    return records
