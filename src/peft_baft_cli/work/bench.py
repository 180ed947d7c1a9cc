"""`baft bench`."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from peft_baft.data.templates import chosen_templates
from peft_baft.editing.presets import find_preset
from peft_baft.loading import locate_model
from peft_baft.processes import Processes
from peft_baft.storage import append_line
from peft_baft_bench.methods.methods import parse_methods
from peft_baft_bench.metrics.metrics import METRICS, piqa_accuracy
from peft_baft_bench.questions.neighbour_questions import Neighbours
from peft_baft_bench.questions.probing import FURTHER_KINDS, NEIGHBOUR, Probing
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
    Subject,
    attach_adapter,
    chosen_form,
    chosen_preset,
    chosen_subject,
    chosen_unrelated,
    default_device,
    describe_split,
    require_known,
    type_errors_as_bad_input,
)

SPLIT = {"blocks": "blocks and questions", "facts": "the facts of each batch, and questions"}
DEFAULT_EDITS = {"single": "1", "continual": "1,10,100", "batched": "1,10"}


def bench(options: BenchCommand) -> int:
    """Measure editing methods, or an adapter, and print tables of what came out; return the exit code."""
    output = options.output or Path("runs") / f"{options.benchmark}.jsonl"
    find_preset(options.preset)  # raises for an unknown one, also where nothing is edited
    task = find_task(options.benchmark)
    for name in _also(options):
        require_known("metric", name, {**METRICS, **FURTHER_KINDS})
    if options.split == "facts" and options.schedule != "batched":
        raise ValueError("--split facts splits batches: it needs --schedule batched.")
    with Processes.started(options.processes) as processes:
        device = default_device(options.device)
        split = describe_split(processes, device, SPLIT[options.split])
        if processes.first and split:
            print(split, flush=True)
        device = processes.device(device)
        file = find_benchmark_file(options.benchmark, options.data)
        subject = chosen_subject(options, device)
        measure = _editing if task.ask is None else _asking
        lines = measure(options, subject, file, output, processes)
        if processes.first:
            _show(lines, output)
    return DONE


def _also(options: BenchCommand) -> list[str]:
    """Return the names of what is asked for besides what the benchmark has: further metrics and probes."""
    return [name for name in options.also.split(",") if name]


def _further_kinds(options: BenchCommand) -> list[str]:
    """Return the kinds of questions among them."""
    return [name for name in _also(options) if name in FURTHER_KINDS]


def _show(lines: list[ResultLine], output: Path) -> None:
    for table in tables(lines):
        print(f"\n{table.markdown()}")
    print(f"\n{len(lines)} result lines in {output}. Figures: baft plot {output}")


def _editing(
    options: BenchCommand, subject: Subject, file: Path, output: Path, processes: Processes
) -> list[ResultLine]:
    """Return the lines of methods that edit, or of an adapter that was edited before, on the facts of a file."""
    task = find_task(options.benchmark)
    cases = task.add_canaries(read_benchmark(options.benchmark, file))
    first, last = _rows(options.rows, len(cases))
    preset = chosen_preset(options.preset, options.r, options.lr, options.max_steps)
    with type_errors_as_bad_input():
        overrides = {"lr": options.lr, "max_steps": options.max_steps}
        given = {name: value for name, value in overrides.items() if value is not None}
        chosen = parse_methods(options.method, preset, given)
    schedules = _schedules(options)
    for schedule in schedules:
        schedule.blocks(first, last)  # raises before a model is loaded
    if NEIGHBOUR in _further_kinds(options):
        Neighbours(cases)  # so does this, for data that names no subjects
    unrelated = options.unrelated or task.unrelated
    texts = chosen_unrelated(unrelated)
    base, tokenizer = _loaded(subject, processes)
    template = chosen_form(options.template, tokenizer, subject.adapter)
    probing = Probing.for_kinds(_further_kinds(options), cases, tokenizer, template)
    protocol = plan.describe_protocol(template.name, _also(options), probing.describe())
    after_block = None
    if options.piqa is not None:
        items = read_benchmark("piqa", options.piqa)[: options.piqa_items]
        after_block = partial(piqa_accuracy, items=items, template=template)
        protocol["piqa"] = describe_file(options.piqa) | {"items": len(items)}
    common = _common(options, subject, base, tokenizer, file, (first, last), protocol)
    common["unrelated"] = (
        describe_file(unrelated) if Path(unrelated).is_file() else {"file": unrelated}
    )
    with tqdm(unit="row", smoothing=0.05, disable=not _drawn(processes), leave=False) as bar:
        also = [METRICS[name] for name in _also(options) if name in METRICS]
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
    options: BenchCommand, subject: Subject, file: Path, output: Path, processes: Processes
) -> list[ResultLine]:
    """Return the line of the unedited model, or of an adapter, on a benchmark that edits nothing."""
    ask = find_task(options.benchmark).ask
    assert ask is not None, "the benchmark asks a model as it is"
    if _further_kinds(options):
        raise ValueError(
            f"--also {_further_kinds(options)[0]} asks about edits, and {options.benchmark} edits nothing; leave it out."
        )
    items = read_benchmark(options.benchmark, file)
    first, last = _rows(options.rows, len(items))
    model, tokenizer = _loaded(subject, processes)
    # Items that are no facts are asked in raw text, whatever an adapter was taught in.
    (template,) = chosen_templates(tokenizer, options.template, taught="raw")
    protocol = plan.describe_protocol(template.name, _also(options))
    common = _common(options, subject, model, tokenizer, file, (first, last), protocol)
    run = plan.plan_runs(common, [None], [Schedule()], [0])[0]
    if options.adapter:
        model = attach_adapter(model, options.adapter, options.adapter_revision)
        run = plan.plan_adapter(common, options.adapter, model)
    lines, runs = plan.split_off_finished([run], output, processes)
    share, bar = (
        processes.share(range(first, last)),
        partial(tqdm, disable=not _drawn(processes), leave=False),
    )
    for run in runs:
        cases = sort_by_row(
            processes.gather(lambda: ask(model, tokenizer, items, share, bar, template))
        )
        lines.append(plan.result_line(run.head, cases, (), _command_line()))
        with processes.together():
            if processes.first:
                append_line(output, lines[-1].to_json())
    return lines


def _loaded(subject: Subject, processes: Processes) -> tuple[Any, Any]:
    locate_model(subject.model, subject.revision)
    return subject.load_base(shown=processes.first)


def _drawn(processes: Processes) -> bool:
    return processes.first and progress_shown()


def _common(
    options: BenchCommand,
    subject: Subject,
    base: Any,
    tokenizer: Any,
    file: Path,
    rows: tuple[int, int],
    protocol: dict[str, Any],
) -> dict[str, Any]:
    """Return what all lines of a command share; a revision stands in them where one was asked for."""
    model = describe_model(subject.model, base, tokenizer)
    return {
        "benchmark": options.benchmark,
        "model": model if subject.revision is None else model | {"revision": subject.revision},
        "data": describe_file(file) | {"rows": list(rows)},
        "protocol": protocol,
        "versions": versions(),
    }


def _rows(text: str | None, count: int) -> tuple[int, int]:
    """Return the numbers of `A:B`, either of which may be left out."""
    first, colon, last = (text or ":").partition(":")
    try:
        rows = int(first or 0), int(last or count)
    except ValueError:
        rows = (-1, -1)
    if not colon or not 0 <= rows[0] < rows[1] <= count:
        raise ValueError(
            f"--rows wants A:B with 0 <= A < B <= {count}, the rows of the data, not {text!r}."
        )
    return rows


def _schedules(options: BenchCommand) -> list[Schedule]:
    """Return a schedule for each number of --edits."""
    try:
        ladder = [
            int(edits) for edits in (options.edits or DEFAULT_EDITS[options.schedule]).split(",")
        ]
    except ValueError:
        raise ValueError(f"--edits wants numbers like 10,100, not {options.edits!r}.") from None
    if (options.batch_size > 1) is not (options.schedule == "batched"):
        raise ValueError(
            "--batch-size N, of 2 or more, belongs to --schedule batched, and that one needs it."
        )
    if options.schedule == "single" and ladder != [1]:
        raise ValueError(
            f"--schedule single makes 1 edit a time, not {options.edits}; take --schedule continual."
        )
    return [Schedule(edits, options.batch_size, options.when) for edits in ladder]


def _command_line() -> str:
    return "baft " + shlex.join(sys.argv[1:])
