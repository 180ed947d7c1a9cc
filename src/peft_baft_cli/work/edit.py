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
from transformers import PreTrainedTokenizerBase

from peft_baft import BaftConfig, Unrelated, editor_for
from peft_baft.adapter.registration import BAFT
from peft_baft.adapter.weights import FILE as WEIGHTS
from peft_baft.data.cases import Case, Edit, Probe, prompt_words
from peft_baft.data.datasets import read_cases, read_unrelated
from peft_baft.data.unrelated import CANARIES
from peft_baft.editing.attached import AttachedEditor
from peft_baft.editing.baft import UNRELATED_USED
from peft_baft.editing.continual import Check, EditRecord, edit_continually
from peft_baft.editing.journal import LINES, Journal
from peft_baft.editing.presets import Preset
from peft_baft.evaluation.before_after import Report, watch
from peft_baft.evaluation.guard import canary_check
from peft_baft.integrations.card import REPORT
from peft_baft.loading import locate_model
from peft_baft.processes import Processes
from peft_baft.storage import apply_umask_mode
from peft_baft_cli.errors import CHECK_FAILED, DONE, Interrupted
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

SNAPSHOTS = 100  # the most per run, unless the command line sets an interval
EDIT_FILE = "a .jsonl, .json or .csv file of facts, each with prompt and target"
CANARY_FILE = "a .jsonl or .json file of questions, each with prompt and answer"


def edit(options: EditCommand) -> int:
    """Teach a model the facts in a file, save the adapter, and print a report; return the exit code."""
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
    return CHECK_FAILED if options.strict and report["known"] < report["facts"] else DONE


def _edit(options: EditCommand, device: str, processes: Processes) -> dict[str, Any]:
    """Make the edits. Of several processes only the first one writes, but each returns the report."""
    cases = read_cases(require_file(options.edits, "--edits", EDIT_FILE))
    unrelated = chosen_unrelated(options.unrelated or "general")
    canaries = _canaries(options.canaries)
    preset = chosen_preset(options.preset, options.r, options.lr, options.max_steps)
    continued = None
    if options.adapter is not None:
        continued = adapter_config(options.adapter, options.adapter_revision)
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
    template = editor.templates[
        -1
    ]  # with both forms, the chat template, in which chat models are used
    with doing("asking the model before the edits", processes.is_main):
        finish_report = watch(model, tokenizer, cases, template)
        check = None
        if options.min_agreement is not None:
            check = canary_check(model, tokenizer, options.min_agreement, canaries, template)
    records = _make_edits(options, editor, cases, check)
    with doing("asking the model after the edits", processes.is_main):
        return processes.on_main(lambda: _saved(options, editor, finish_report(), records, earlier))


def _chosen_method(options: EditCommand, continued: PeftConfig | None) -> tuple[bool, str]:
    """Choose between a memory and a plain adapter.

    Returns:
        Whether to use a memory, and the reason in words.

    Raises:
        ValueError: the options do not fit the method, or the adapter to continue.
    """
    plain_options = _set_options(
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
    memory_options = _set_options(
        {
            "--statistics": options.statistics is not None,
            "--known": options.known != "replace",
            "--after": options.after is not None,
        }
    )
    if options.one_by_one and options.batch_size is not None:
        raise ValueError("--one-by-one means --batch-size 1: leave one of them out.")
    is_memory, reason = _requested_method(options, continued, plain_options)
    if is_memory and plain_options:
        raise ValueError(
            f"{plain_options[0]} is for a plain adapter, and this is a memory: leave it out."
        )
    if not is_memory and memory_options:
        raise ValueError(
            f"{memory_options[0]} is for a memory, and this is a plain adapter: leave it out."
        )
    if options.statistics is not None and continued is not None:
        raise ValueError(f"{options.adapter} has its own statistics: leave --statistics out.")
    return is_memory, reason


def _requested_method(
    options: EditCommand, continued: PeftConfig | None, plain_options: Sequence[str]
) -> tuple[bool, str]:
    """Return whether to use a memory, and the reason, from --method, the adapter to continue, and options for plain adapters."""
    requested = {"auto": None, "plain": False, "memory": True}[options.method]
    if continued is not None:
        kind: Any = getattr(continued, "kind", None)
        is_memory = not kind.trains
        if requested not in (None, is_memory):
            what = "a memory" if is_memory else "a plain adapter"
            raise ValueError(f"{options.adapter} is {what}; leave --method out to continue it.")
        return is_memory, f"as {options.adapter}, which is continued"
    if requested is not None:
        return requested, "as --method says"
    if plain_options:
        return False, f"since {plain_options[0]} is for a plain adapter"
    return True, "since no option requires a plain adapter"


def _set_options(options: Mapping[str, bool]) -> list[str]:
    return [name for name, is_set in options.items() if is_set]


def _batch_size(options: EditCommand, memory: bool, facts: int) -> int:
    """Return how many facts are taught at once. A plain adapter learns all of them, unless the options say otherwise."""
    return 1 if memory or options.one_by_one else options.batch_size or facts


def _editor(
    options: EditCommand,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    preset: Preset,
    unrelated: Sequence[Unrelated],
    processes: Processes,
) -> AttachedEditor:
    """Return the editor of the adapter."""
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
    options: EditCommand, attached: AttachedEditor, cases: Sequence[Case]
) -> dict[str, list[Any]]:
    """Find the edits in a memory that already answer the questions of the new ones.

    Returns:
        `replaced`: numbers of the edits with the same questions, which will be replaced. `reworded`: prompts of new facts that
        other edits answer, with the numbers of these edits, which stay.

    Raises:
        ValueError: there are such edits, and the options say to refuse them.
    """
    editor: Any = attached  # the methods below are only those of editors with independent edits
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
            f"by its edit {answered[place]}. Leave --known out to teach them anyway, or remove them from {options.edits}."
        )
    return {
        "replaced": sorted(set(known.values())),
        "reworded": [
            {"prompt": prompt_words(facts[place].prompt), "edit": number}
            for place, number in reworded.items()
        ],
    }


def _make_edits(
    options: EditCommand, editor: AttachedEditor, cases: Sequence[Case], check: Check | None
) -> list[EditRecord]:
    """Make the edits, or resume a run of them; return a record of each.

    Raises:
        Interrupted: the user stopped the run after its journal was started.
    """
    processes, batch_size = editor.processes, _batch_size(options, editor.independent, len(cases))
    batch_count = -(-len(cases) // batch_size)
    every = options.snapshot_every or max(1, -(-batch_count // SNAPSHOTS))
    journal = Journal(options.output, every)
    if options.overwrite and not options.resume and processes.is_main:
        journal.clear()
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
    """Return the edits of the records. `--after` applies to those that do not specify it."""
    edits = [case.edit for case in cases]
    return [edit if edit.after else replace(edit, after=options.after) for edit in edits]


def _runs(journal: Journal) -> int:
    return len(journal.state().runs)


def _saved(
    options: EditCommand,
    editor: AttachedEditor,
    result: Report,
    records: Sequence[EditRecord],
    earlier: Mapping[str, Any],
) -> dict[str, Any]:
    """Save the adapter with its report; return the report as `--json` prints it.

    Args:
        earlier: as `_earlier_edits` returns them.
    """
    output = options.output
    editor.model.save_pretrained(str(output), save_embedding_layers=False)
    apply_umask_mode(output / WEIGHTS)  # safetensors makes its files readable only by their owner
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
    editor.model.create_or_update_model_card(str(output))  # reads the report
    return report


def _canaries(file: Path | None) -> Sequence[Unrelated | Probe]:
    if file is None:
        return CANARIES
    return read_unrelated(require_file(file, "--canaries", CANARY_FILE))


def _edited_model(
    options: EditCommand,
    device: str,
    preset: Preset,
    continued: PeftConfig | None,
    memory: bool,
) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the base model with a new adapter, or with the one to continue, and its tokenizer."""
    revision = options.revision
    base, tokenizer = load_base(options.model, revision, options.dtype, device)
    if continued is not None and options.adapter is not None:
        model = attach_adapter(base, options.adapter, options.adapter_revision, trainable=True)
        return model, tokenizer
    torch.manual_seed(options.seed)
    with type_errors_as_bad_input():
        settings: dict[str, Any] = {"memory": True} if memory else preset.config
        config = BaftConfig(task_type="CAUSAL_LM", **settings)
    model = get_peft_model(base, config, revision=revision)
    model.eval()
    return model, tokenizer


def _unrelated_used(adapter: str | None, revision: str | None) -> int:
    """Return how many unrelated texts the adapter to continue was trained with, so that training resumes at the next one."""
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
        except (OSError, ValueError):  # the adapter was made or uploaded without a report
            return 0
    return int(json.loads(report.read_text("utf-8"))["unrelated_used"]) if report.exists() else 0


def _prepare_output(options: EditCommand) -> None:
    """Create the output folder; raise a ValueError if an adapter or an unfinished run in it would be lost."""
    output, adapter = options.output, options.adapter
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output} is a file; it takes a folder for the adapter.")
    continues_it = adapter is not None and Path(adapter).resolve() == output.resolve()
    allowed = options.overwrite or options.resume or continues_it
    if (output / WEIGHTS).exists() and not allowed:
        raise ValueError(
            f"{output} contains an adapter: continue it with --adapter {output}, or replace it with --overwrite."
        )
    if (output / LINES).exists() and not allowed:
        raise ValueError(
            f"{output} contains an unfinished run: continue it with --resume, or start again with --overwrite."
        )
    # Now, so that the command fails early if the folder is not writable.
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
