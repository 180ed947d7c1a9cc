"""Each command: its arguments, and the function of `peft_baft.cli` that does its work with their plain values."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_baft_cli.arguments import (
    LARGEST_SEED,
    METHODS,
    METRICS,
    SCHEDULES,
    SPLITS,
    TEMPLATES,
    WHEN,
    add_adapter_arguments,
    add_json_argument,
    add_model_arguments,
    add_process_arguments,
    add_training_arguments,
    measures,
    share,
    whole_number,
)

Run = Callable[[argparse.Namespace], int]


def add_commands(commands: Any) -> None:
    """Give the parser every command."""
    for add in (_add_edit, _add_ask, _add_log, _add_rollback, _add_bench, _add_plot, _add_inspect, _add_check):
        add(commands)


def _command(commands: Any, name: str, run: Run, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _values(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of a command by name, without what chose it."""
    return {name: value for name, value in vars(args).items() if name not in ("command", "run")}


def _add_edit(commands: Any) -> None:
    parser = _command(commands, "edit", _run_edit, "Teach the facts of a file to a model and save the adapter.")
    parser.add_argument(
        "--edits",
        required=True,
        type=Path,
        metavar="FILE",
        help="facts: .jsonl, .json or .csv with prompt, target and optionally rephrase, unrelated",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="folder for the adapter")
    add_adapter_arguments(parser, False, "an adapter to continue: folder or Hub id")
    parser.add_argument(
        "--batch-size",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="facts learned at once; 1, the default, is one after another",
    )
    parser.add_argument(
        "--seed", type=whole_number(0, LARGEST_SEED), default=0, help="of a new adapter's first weights; default: 0"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter in the output folder")
    parser.add_argument("--strict", action="store_true", help="exit with 3 unless every fact is known at the end")
    add_json_argument(parser)
    add_process_arguments(parser)
    add_model_arguments(parser, required=True)
    add_training_arguments(parser)
    journal = parser.add_argument_group("journal and checks")
    journal.add_argument("--resume", action="store_true", help="go on with the output folder's interrupted run")
    journal.add_argument(
        "--snapshot-every", type=whole_number(1), default=1, metavar="K", help="keep the adapter after every K edits"
    )
    journal.add_argument(
        "--min-agreement", type=share, metavar="A", help="an edit does harm if canaries agree less than this, 0 to 1"
    )
    journal.add_argument(
        "--canaries",
        type=Path,
        metavar="FILE",
        help="questions whose answers should stay; by default the package's own",
    )
    journal.add_argument(
        "--keep-only-good", action="store_true", help="take edits back that were not learned or did harm"
    )


def _run_edit(args: argparse.Namespace) -> int:
    from peft_baft.cli.edit import EditOptions, edit

    return edit(EditOptions(**_values(args)))


def _add_ask(commands: Any) -> None:
    parser = _command(commands, "ask", _run_ask, "Answer prompts without and with the edits, side by side.")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    add_adapter_arguments(parser, True, "the adapter: folder or Hub id")
    parser.add_argument(
        "--max-new-tokens", type=whole_number(1), default=16, metavar="N", help="length of an answer; default: 16"
    )
    add_json_argument(parser)
    add_model_arguments(parser, required=False)


def _run_ask(args: argparse.Namespace) -> int:
    from peft_baft.cli.ask import ask

    return ask(**_values(args))


def _add_log(commands: Any) -> None:
    parser = _command(commands, "log", _run_log, "List the edits of an adapter.")
    parser.add_argument("adapter", type=Path, help="folder of the adapter")
    add_json_argument(parser)


def _run_log(args: argparse.Namespace) -> int:
    from peft_baft.cli.journal import log

    return log(**_values(args))


def _add_rollback(commands: Any) -> None:
    text = "Bring an adapter back to what it was after one of its edits; 0 is before the first."
    parser = _command(commands, "rollback", _run_rollback, text)
    parser.add_argument("adapter", type=Path, help="folder of the adapter")
    parser.add_argument(
        "--to", required=True, type=whole_number(0), metavar="N", help="number of the last edit to keep"
    )


def _run_rollback(args: argparse.Namespace) -> int:
    from peft_baft.cli.journal import rollback

    return rollback(**_values(args))


def _add_bench(commands: Any) -> None:
    text = "Measure editing methods, or an adapter, on a benchmark or on your own facts."
    parser = _command(commands, "bench", _run_bench, text)
    parser.add_argument(
        "benchmark", metavar="BENCHMARK", help="what is asked, such as zsre or facts; docs/benchmarking.md lists them"
    )
    parser.add_argument("--data", help="the benchmark's file, or a file name of the Hub data set zjunlp/KnowEdit")
    known = ", ".join(METHODS)
    parser.add_argument("--method", default="baft", help=f"of {known}, with commas; settings as in baft:lr=0.001;r=4")
    add_adapter_arguments(parser, False, "judge this adapter, of any PEFT type (folder or Hub id), instead of editing")
    parser.add_argument("--schedule", choices=SCHEDULES, default="single", help="how edits follow each other")
    parser.add_argument("--edits", metavar="T", help="edits (or batches) of one adapter; several with commas")
    parser.add_argument(
        "--batch-size", type=whole_number(1), default=1, metavar="N", help="facts of a batch, with --schedule batched"
    )
    parser.add_argument("--when", choices=WHEN, default=WHEN[0], help="ask after all T edits, or right after each")
    parser.add_argument("--rows", metavar="A:B", help="rows of the data from 0, B excluded; by default all")
    parser.add_argument("--seeds", type=whole_number(1), default=1, metavar="N", help="repeat with so many seeds")
    parser.add_argument("--template", choices=TEMPLATES, default=TEMPLATES[0], help="raw text or the chat template")
    parser.add_argument("--also", type=measures, default=[], help=f"further metrics, of {', '.join(METRICS)}")
    parser.add_argument(
        "--split", choices=SPLITS, default=SPLITS[0], help="what processes share: blocks, or the facts of each batch"
    )
    add_process_arguments(parser)
    parser.add_argument("--output", type=Path, help="result lines are added here; runs that are there are not repeated")
    add_model_arguments(parser, required=False)
    add_training_arguments(parser)


def _run_bench(args: argparse.Namespace) -> int:
    from peft_baft.cli.bench import BenchOptions, bench

    return bench(BenchOptions(**_values(args)))


def _add_plot(commands: Any) -> None:
    parser = _command(commands, "plot", _run_plot, "Turn result lines into tables (markdown, csv) and figures.")
    parser.add_argument("results", nargs="+", type=Path, help="files of result lines, from `baft bench`")
    parser.add_argument("--output", type=Path, default=Path("figures"), help="a folder; by default figures/")
    parser.add_argument("--no-figures", action="store_true", help="tables alone, which need no matplotlib")


def _run_plot(args: argparse.Namespace) -> int:
    from peft_baft.cli.show import plot

    return plot(**_values(args))


def _add_inspect(commands: Any) -> None:
    text = "Draw what an adapter does to a prompt: gates and updates by token and block, and the changed next tokens."
    parser = _command(commands, "inspect", _run_inspect, text)
    parser.add_argument("prompt")
    add_adapter_arguments(parser, True, "a BaFT adapter: folder or Hub id")
    parser.add_argument("--max-new-tokens", type=whole_number(1), default=12, metavar="N", help="length of the answer")
    parser.add_argument(
        "--output", type=Path, help="the HTML page; the PNG goes beside it. By default inspect/PROMPT.html"
    )
    add_model_arguments(parser, required=False)


def _run_inspect(args: argparse.Namespace) -> int:
    from peft_baft.cli.show import inspect

    return inspect(**_values(args))


def _add_check(commands: Any) -> None:
    text = "Prove on a model that edits are trained, kept and applied at the right tokens; takes about a minute."
    parser = _command(commands, "check", _run_check, text)
    add_adapter_arguments(parser, False, "a BaFT adapter to check with: folder or Hub id; by default a random one")
    add_json_argument(parser)
    add_model_arguments(parser, required=False)


def _run_check(args: argparse.Namespace) -> int:
    from peft_baft.cli.check import check

    return check(**_values(args))
