"""`baft bench`: the judge."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel
from tqdm import tqdm

from peft_baft.bench import judge
from peft_baft.bench.measures import MEASURES, piqa_cases
from peft_baft.bench.methods import GROUPS, METHODS, methods
from peft_baft.bench.results import described_file, described_model, in_order, versions
from peft_baft.bench.run import SPLITS, Bench
from peft_baft.bench.schedule import WHEN, Schedule
from peft_baft.bench.suite import BENCHMARKS, PIQA
from peft_baft.cli.common import (
    add_process_arguments,
    add_training_arguments,
    chosen_preset,
    chosen_unrelated,
    command,
    described,
    model_name,
)
from peft_baft.data.benchmarks import locate, read_benchmark, read_piqa
from peft_baft.evaluation.asking import TEMPLATES
from peft_baft.models import load_model
from peft_baft.processes import Processes
from peft_baft.show.tables import tables

SPLIT = {"blocks": "blocks and questions", "facts": "the facts of each batch, and questions"}
DEFAULT_EDITS = {"single": "1", "continual": "1,10,100", "batched": "1,10"}


def bench(args: argparse.Namespace) -> int:
    """Measure editing methods, or an adapter, on a benchmark or on your own facts."""
    if args.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, not {args.seeds}.")
    args.output = args.output or Path("runs") / f"{args.benchmark}.jsonl"
    if args.split == "facts" and args.schedule != "batched":
        raise ValueError("--split facts splits batches: it needs --schedule batched.")
    with Processes.started(args.processes) as processes:
        if processes.first:
            print(described(processes, args.device, SPLIT[args.split]), flush=True)
        args.device = processes.device(args.device)
        file = locate(args.benchmark, args.data)
        lines = (_piqa if args.benchmark == PIQA else _editing)(args, file, processes)
        if processes.first:
            _show(lines, args.output)
    return 0


def _show(lines: list[dict[str, Any]], output: Path) -> None:
    for table in tables(lines):
        print(f"\n{table.markdown()}")
    print(f"\n{len(lines)} result lines in {output}. Figures: baft plot {output}")


def _editing(args: argparse.Namespace, file: Path, processes: Processes) -> list[dict[str, Any]]:
    """Lines of methods that edit, or of an adapter that has edited, on the facts of a file."""
    suite = BENCHMARKS[args.benchmark]
    cases = suite.prepared(read_benchmark(args.benchmark, file))
    first, last = _rows(args.rows, len(cases))
    chosen, schedules = methods(args.method, chosen_preset(args)), _schedules(args)
    for schedule in schedules:
        schedule.blocks(first, last)  # complains before a model is loaded
    unrelated = args.unrelated or suite.unrelated
    texts = chosen_unrelated(unrelated)
    base, tokenizer = load_model(model_name(args), args.dtype, device_map=args.device)
    common = _common(args, base, tokenizer, file, (first, last))
    common["unrelated"] = described_file(unrelated) if Path(unrelated).is_file() else {"file": unrelated}
    with tqdm(unit="row", smoothing=0.05, disable=not processes.first) as bar:
        also = [MEASURES[name] for name in args.also]
        rows = Bench(base, tokenizer, cases, first, last, texts, args.template, also, bar.update)
        rows = replace(rows, processes=processes, split=args.split)
        runs = judge.planned(common, chosen, schedules, range(args.seeds))
        if args.adapter:
            runs = [judge.adapter_run(common, args.adapter, PeftModel.from_pretrained(base, args.adapter).eval())]
        lines, runs = judge.split(runs, args.output, processes)
        bar.reset(total=sum(rows.amount(run.schedule) for run in runs))
        for run in runs:
            bar.set_description(run.title)
            lines.append(judge.perform(rows, run, suite.averaged, args.output, _command_line()))
    return lines


def _piqa(args: argparse.Namespace, file: Path, processes: Processes) -> list[dict[str, Any]]:
    """The line of the unedited model, or of an adapter, on PIQA."""
    items = read_piqa(file)
    first, last = _rows(args.rows, len(items))
    model, tokenizer = load_model(model_name(args), args.dtype, device_map=args.device)
    common = _common(args, model, tokenizer, file, (first, last))
    run = judge.planned(common, [None], [Schedule()], [0])[0]
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter).eval()
        run = judge.adapter_run(common, args.adapter, model)
    lines, runs = judge.split([run], args.output, processes)
    share, bar = processes.share(range(first, last)), partial(tqdm, disable=not processes.first)
    for run in runs:
        cases = in_order(processes.gather(lambda: piqa_cases(model, tokenizer, items, share, bar)))
        lines.append(judge.finished(run.head, cases, (), _command_line()))
        with processes.together():
            if processes.first:
                judge.kept(lines[-1], args.output)
    return lines


def _common(args: argparse.Namespace, base: Any, tokenizer: Any, file: Path, rows: tuple[int, int]) -> dict[str, Any]:
    """What all lines of a command share."""
    return {
        "benchmark": args.benchmark,
        "model": described_model(model_name(args), base, tokenizer),
        "data": described_file(file) | {"rows": list(rows)},
        "protocol": judge.protocol(args.template, args.also),
        "versions": versions(),
    }


def _rows(text: str | None, count: int) -> tuple[int, int]:
    """`A:B` to the numbers A and B, either of which may be left out."""
    first, colon, last = (text or ":").partition(":")
    try:
        rows = int(first or 0), int(last or count)
    except ValueError:
        rows = (-1, -1)
    if not colon or not 0 <= rows[0] < rows[1] <= count:
        raise ValueError(f"--rows wants A:B with 0 <= A < B <= {count}, the rows of the data, not {text!r}.")
    return rows


def _schedules(args: argparse.Namespace) -> list[Schedule]:
    """The ladder of --edits in the chosen schedule."""
    try:
        ladder = [int(edits) for edits in (args.edits or DEFAULT_EDITS[args.schedule]).split(",")]
    except ValueError:
        raise ValueError(f"--edits wants numbers like 10,100, not {args.edits!r}.") from None
    if (args.batch_size > 1) is not (args.schedule == "batched"):
        raise ValueError("--batch-size N, of 2 or more, belongs to --schedule batched, and that one needs it.")
    if args.schedule == "single" and ladder != [1]:
        raise ValueError(f"--schedule single makes 1 edit a time, not {args.edits}; take --schedule continual.")
    return [Schedule(edits, args.batch_size, args.when) for edits in ladder]


def _command_line() -> str:
    return "baft " + shlex.join(sys.argv[1:])


def _names(text: str) -> list[str]:
    """The further measures of --also."""
    chosen = [name for name in text.split(",") if name]
    unknown = [name for name in chosen if name not in MEASURES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown measure {unknown[0]!r}; known are {', '.join(MEASURES)}")
    return chosen


def add_commands(commands: Any) -> None:
    """Put `bench` among the commands."""
    parser = command(commands, "bench", bench, model_required=False)
    parser.add_argument("benchmark", choices=[*BENCHMARKS, PIQA], help="what is asked")
    parser.add_argument("--data", help="the benchmark's file, or a file name of the Hub data set zjunlp/KnowEdit")
    known = ", ".join((judge.UNEDITED, *METHODS, *GROUPS))
    parser.add_argument("--method", default="baft", help=f"of {known}, with commas; settings as in baft:lr=0.001;r=4")
    parser.add_argument("--adapter", help="judge this adapter, of any PEFT type (folder or Hub id), instead of editing")
    parser.add_argument("--schedule", choices=DEFAULT_EDITS, default="single", help="how edits follow each other")
    parser.add_argument("--edits", help="T: edits (or batches) of one adapter; several with commas")
    parser.add_argument("--batch-size", type=int, default=1, help="facts of a batch, with --schedule batched")
    parser.add_argument("--when", choices=WHEN, default=WHEN[0], help="ask after all T edits, or right after each")
    parser.add_argument("--rows", help="A:B, rows of the data from 0, B excluded; by default all")
    parser.add_argument("--seeds", type=int, default=1, help="repeat with so many seeds")
    parser.add_argument("--template", choices=TEMPLATES, default=TEMPLATES[0], help="raw text or the chat template")
    parser.add_argument("--also", type=_names, default=[], help=f"further measures, of {', '.join(MEASURES)}")
    parser.add_argument(
        "--split", choices=SPLITS, default=SPLITS[0], help="what processes share: blocks, or the facts of each batch"
    )
    add_process_arguments(parser)
    parser.add_argument("--output", type=Path, help="result lines are added here; runs that are there are not repeated")
    add_training_arguments(parser)
    parser.set_defaults(unrelated=None)
