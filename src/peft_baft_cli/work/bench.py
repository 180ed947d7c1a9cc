"""`baft bench`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peft_baft.data.templates import chosen_templates
from peft_baft.editing.presets import find_preset
from peft_baft.loading import locate_model
from peft_baft.processes import Processes
from peft_baft.storage import append_line
from peft_baft_bench.methods.methods import parse_methods
from peft_baft_bench.metrics.metrics import METRICS, piqa_accuracy
from peft_baft_bench.questions.asking import NEIGHBOUR
from peft_baft_bench.questions.neighbour_questions import Neighbours
from peft_baft_bench.questions.probing import FURTHER_KINDS, Probing
from peft_baft_bench.report.tables import tables
from peft_baft_bench.run import plan
from peft_baft_bench.run.results import (
    ResultLine,
    describe_file,
    describe_model,
    sort_by_row,
    versions,
)
from peft_baft_bench.run.runner import Runner
from peft_baft_bench.run.schedule import Schedule
from peft_baft_bench.tasks.tasks import find_benchmark_file, find_task, read_benchmark
from peft_baft_cli.errors import DONE
from peft_baft_cli.options import BenchCommand
from peft_baft_cli.screen import progress_shown
from peft_baft_cli.work.common import (
    ModelChoice,
    attach_adapter,
    chosen_form,
    chosen_model,
    chosen_preset,
    chosen_unrelated,
    default_device,
    describe_split,
    given,
    require_known,
    type_errors_as_bad_input,
)

SPLIT = {"blocks": "blocks and questions", "facts": "the facts of each batch, and questions"}
DEFAULT_EDITS = {"single": "1", "continual": "1,10,100", "batched": "1,10"}


def bench(options: BenchCommand) -> int:
    """Measure editing methods, or an adapter, and print tables of the results; return the exit code."""
    output = options.output or Path("runs") / f"{options.benchmark}.jsonl"
    find_preset(options.preset)  # raises if it is unknown, even if nothing is edited
    task = find_task(options.benchmark)
    for name in _further(options):
        require_known("metric", name, {**METRICS, **FURTHER_KINDS})
    if options.split == "facts" and options.schedule != "batched":
        raise ValueError("--split facts splits batches, and requires --schedule batched.")
    with Processes.started(options.processes) as processes:
        device = default_device(options.device)
        split = describe_split(processes, device, SPLIT[options.split])
        if processes.is_main and split:
            print(split, flush=True)
        device = processes.device(device)
        file = find_benchmark_file(options.benchmark, options.data)
        choice = chosen_model(options, device)
        measure = _editing if task.ask is None else _asking
        lines = measure(options, choice, file, output, processes)
        if processes.is_main:
            _show(lines, output)
    return DONE


def _further(options: BenchCommand) -> list[str]:
    """Return the names given with --also: metrics and kinds of questions in addition to the benchmark's own."""
    return [name for name in options.also.split(",") if name]


def _further_kinds(options: BenchCommand) -> list[str]:
    """Return the kinds of questions given with --also."""
    return [name for name in _further(options) if name in FURTHER_KINDS]


def _show(lines: list[ResultLine], output: Path) -> None:
    for table in tables(lines):
        print(f"\n{table.markdown()}")
    print(f"\n{len(lines)} result lines in {output}. Figures: baft plot {output}")


def _editing(
    options: BenchCommand, choice: ModelChoice, file: Path, output: Path, processes: Processes
) -> list[ResultLine]:
    """Return the result lines of editing methods, or of an edited adapter, on the facts in a file."""
    task = find_task(options.benchmark)
    cases = task.add_canaries(read_benchmark(options.benchmark, file))
    first, last = _rows(options.rows, len(cases))
    preset = chosen_preset(options.preset, options.r, options.lr, options.max_steps)
    with type_errors_as_bad_input():
        overrides = given(lr=options.lr, max_steps=options.max_steps)
        chosen = parse_methods(options.method, preset, overrides)
    schedules = _schedules(options)
    for schedule in schedules:
        schedule.blocks(first, last)  # raises if there are too few rows, before a model is loaded
    if NEIGHBOUR in _further_kinds(options):
        Neighbours(cases)  # likewise, if the data has no subjects
    unrelated = options.unrelated or task.unrelated
    texts = chosen_unrelated(unrelated)
    base, tokenizer = _loaded(choice, processes)
    template = chosen_form(options.template, tokenizer, choice.adapter)
    probing = Probing.for_kinds(_further_kinds(options), cases, tokenizer, template)
    protocol = plan.describe_protocol(template.name, _further(options), probing.describe())
    after_block = None
    if options.piqa is not None:
        items = read_benchmark("piqa", options.piqa)[: options.piqa_items]
        after_block = partial(piqa_accuracy, items=items, template=template)
        protocol["piqa"] = describe_file(options.piqa) | {"items": len(items)}
    common = _common(options, choice, base, tokenizer, file, (first, last), protocol)
    common["unrelated"] = (
        describe_file(unrelated) if Path(unrelated).is_file() else {"file": unrelated}
    )
    with tqdm(unit="row", smoothing=0.05, disable=not _drawn(processes), leave=False) as bar:
        also = [METRICS[name] for name in _further(options) if name in METRICS]
        rows = Runner(base, tokenizer, cases, first, last, texts, template, also, tick=bar.update)
        rows = replace(
            rows,
            probing=probing,
            processes=processes,
            split=options.split,
            after_block=after_block,
        )
        runs = plan.plan_runs(common, chosen, schedules, range(options.seeds))
        if options.adapter:
            model = attach_adapter(base, options.adapter, options.adapter_revision)
            runs = [plan.plan_adapter(common, options.adapter, model)]
        lines, runs = plan.split_off_finished(runs, output, processes)
        bar.reset(total=sum(rows.count_rows(run.schedule) for run in runs))
        for run in runs:
            bar.set_description(run.title)
            lines.append(plan.perform_run(rows, run, task.averaged, output, _command_line()))
    return lines


def _asking(
    options: BenchCommand, choice: ModelChoice, file: Path, output: Path, processes: Processes
) -> list[ResultLine]:
    """Return the result line of the base model, or of an adapter, on a benchmark without edits."""
    ask = find_task(options.benchmark).ask
    assert ask is not None, "the benchmark has no edits"
    if _further_kinds(options):
        raise ValueError(
            f"--also {_further_kinds(options)[0]} asks about edits, and {options.benchmark} has none; leave it out."
        )
    items = read_benchmark(options.benchmark, file)
    first, last = _rows(options.rows, len(items))
    base, tokenizer = _loaded(choice, processes)
    model: PreTrainedModel | PeftModel = base
    # Items other than facts are asked in raw text, independent of the form used for editing.
    (template,) = chosen_templates(tokenizer, options.template, taught="raw")
    protocol = plan.describe_protocol(template.name, _further(options))
    common = _common(options, choice, base, tokenizer, file, (first, last), protocol)
    run = plan.plan_runs(common, [None], [Schedule()], [0])[0]
    if options.adapter:
        model = attach_adapter(base, options.adapter, options.adapter_revision)
        run = plan.plan_adapter(common, options.adapter, model)
    lines, runs = plan.split_off_finished([run], output, processes)
    share, bar = (
        processes.shard(range(first, last)),
        partial(tqdm, disable=not _drawn(processes), leave=False),
    )
    for run in runs:
        cases = sort_by_row(
            processes.all_gather(lambda: ask(model, tokenizer, items, share, bar, template))
        )
        lines.append(plan.result_line(run.head, cases, (), _command_line()))
        with processes.barrier():
            if processes.is_main:
                append_line(output, lines[-1].to_json())
    return lines


def _loaded(
    choice: ModelChoice, processes: Processes
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    locate_model(choice.model, choice.revision)
    return choice.load_base(shown=processes.is_main)


def _drawn(processes: Processes) -> bool:
    return processes.is_main and progress_shown()


def _common(
    options: BenchCommand,
    choice: ModelChoice,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    rows: tuple[int, int],
    protocol: dict[str, Any],
) -> dict[str, Any]:
    """Return what all result lines of a command share. A revision is included only if one was given."""
    model = describe_model(choice.model, base, tokenizer)
    return {
        "benchmark": options.benchmark,
        "model": model if choice.revision is None else model | {"revision": choice.revision},
        "data": describe_file(file) | {"rows": list(rows)},
        "protocol": protocol,
        "versions": versions(),
    }


def _rows(text: str | None, count: int) -> tuple[int, int]:
    """Parse `A:B`, either of which may be left out, to the first row and the one after the last."""
    first, colon, last = (text or ":").partition(":")
    try:
        rows = int(first or 0), int(last or count)
    except ValueError:
        rows = (-1, -1)
    if not colon or not 0 <= rows[0] < rows[1] <= count:
        raise ValueError(
            f"--rows takes A:B with 0 <= A < B <= {count}, the rows of the data, not {text!r}."
        )
    return rows


def _schedules(options: BenchCommand) -> list[Schedule]:
    """Return a schedule for each number in --edits."""
    text = options.edits or DEFAULT_EDITS[options.schedule]
    try:
        ladder = [int(edits) for edits in text.split(",")]
    except ValueError:
        raise ValueError(f"--edits takes numbers like 10,100, not {options.edits!r}.") from None
    if (options.batch_size > 1) is not (options.schedule == "batched"):
        raise ValueError(
            "--schedule batched requires --batch-size N of at least 2, and other schedules do not take it."
        )
    if options.schedule == "single" and ladder != [1]:
        raise ValueError(
            f"--schedule single makes one edit per adapter, not {options.edits}; use --schedule continual."
        )
    return [Schedule(edits, options.batch_size, options.when) for edits in ladder]


def _command_line() -> str:
    return "baft " + shlex.join(sys.argv[1:])
