"""`baft edit` and `baft ask`: the one file that prints."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from peft_baft import BaftConfig, BaftEditor, Outcome, Unrelated
from peft_baft.adapter.weights import FILE as WEIGHTS
from peft_baft.data.datasets import read_cases, read_unrelated
from peft_baft.data.unrelated import GENERAL
from peft_baft.evaluation.report import Report, watch
from peft_baft.evaluation.scoring import greedy_answers
from peft_baft.models import load_model
from peft_baft.presets import PRESETS, Preset

REPORT = "report.json"
HOW_TO_LOAD = """
## How to load this adapter

`pip install peft-baft`, and `import peft_baft` before `PeftModel.from_pretrained`; without it, loading ends in
`KeyError: 'BAFT'`.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it did what it was asked, 1 if an edit did not take, 2 for bad input."""
    args = _parser().parse_args(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        return args.run(args)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"baft {args.command}: {error}", file=sys.stderr)
        return 2


def edit(args: argparse.Namespace) -> int:
    """Teach the facts of a file to a model and save the adapter."""
    _prepare_output(args.output, args.adapter, args.overwrite)
    cases = read_cases(args.edits)
    unrelated = _unrelated(args.unrelated)
    preset = _preset(args)
    model, tokenizer = _edited_model(args, preset)
    editor = BaftEditor(model, tokenizer, unrelated, preset.objective, preset.descent, preset.batch_descent)
    editor.unrelated_used = _unrelated_used(args.adapter)
    report = watch(model, tokenizer, cases)
    batches = editor.edit_in_turn([case.edit for case in cases], args.batch_size)
    outcomes = _with_progress(batches, -(-len(cases) // args.batch_size))
    result, output = report(), args.output
    model.save_pretrained(str(output), save_embedding_layers=False)
    summary = asdict(result) | {"unrelated_used": editor.unrelated_used}
    (output / REPORT).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _append(output / "README.md", HOW_TO_LOAD)
    _print_report(result, outcomes, args.model, output)
    return 0 if all(answer.learned for answer in result.answers) else 1


def ask(args: argparse.Namespace) -> int:
    """Answer prompts without and with the edits, side by side."""
    model, tokenizer = load_model(args.model, args.dtype, device_map=args.device)
    without = greedy_answers(model, tokenizer, args.prompts, args.max_new_tokens)
    edited = PeftModel.from_pretrained(model, args.adapter)
    answers = greedy_answers(edited, tokenizer, args.prompts, args.max_new_tokens)
    _print_table(
        ("prompt", "without the edits", "with the edits"), list(zip(args.prompts, without, answers, strict=True))
    )
    return 0


def _edited_model(args: argparse.Namespace, preset: Preset) -> tuple[PeftModel, Any]:
    """The base model with a fresh adapter, or with the one to continue."""
    base, tokenizer = load_model(args.model, args.dtype, device_map=args.device)
    torch.manual_seed(args.seed)
    if args.adapter is None:
        return get_peft_model(base, BaftConfig(task_type="CAUSAL_LM", **preset.config)).eval(), tokenizer
    return PeftModel.from_pretrained(base, args.adapter, is_trainable=True).eval(), tokenizer


def _preset(args: argparse.Namespace) -> Preset:
    """The chosen preset with what the command line overrides."""
    preset = PRESETS[args.preset]
    chosen = {name: getattr(args, name) for name in ("lr", "max_steps") if getattr(args, name) is not None}
    return replace(
        preset,
        config=preset.config | ({} if args.r is None else {"r": args.r}),
        descent=replace(preset.descent, **chosen),
        batch_descent=replace(preset.batch_descent, **chosen),
    )


def _unrelated(choice: str) -> Sequence[Unrelated]:
    """The text that edits should leave alone: the package's own, none, or a file's."""
    return {"general": GENERAL, "none": ()}[choice] if choice in ("general", "none") else read_unrelated(choice)


def _unrelated_used(adapter: Path | None) -> int:
    """How many unrelated texts an adapter to continue has been trained beside: it goes on with the next one."""
    report = None if adapter is None else adapter / REPORT
    return 0 if report is None or not report.exists() else int(json.loads(report.read_text("utf-8"))["unrelated_used"])


def _prepare_output(output: Path, continued: Path | None, overwrite: bool) -> None:
    """Make the output folder; a ValueError if saving would lose an adapter that is neither continued nor given up."""
    kept = (output / WEIGHTS).exists() and not overwrite
    if kept and (continued is None or continued.resolve() != output.resolve()):
        raise ValueError(
            f"{output} holds an adapter: continue it with --adapter {output}, or replace it with --overwrite."
        )
    output.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written is found out before the work, not after


def _append(file: Path, text: str) -> None:
    """Add `text` to a file once, however often the adapter is saved."""
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    if text not in before:
        file.write_text(before + text, encoding="utf-8")


def _with_progress(batches: Any, count: int) -> list[Outcome]:
    outcomes = []
    with tqdm(total=count, desc="editing", unit="edit" if count else "") as bar:
        for outcome in batches:
            outcomes.append(outcome)
            bar.set_postfix(steps=outcome.steps, loss=f"{outcome.losses['teacher_forcing']:.3f}")
            bar.update()
    return outcomes


def _print_report(report: Report, outcomes: list[Outcome], model: str, output: Path) -> None:
    _print_table(
        ("prompt", "before", "after", "wanted", "learned?"),
        [(a.prompt, a.before, a.after, a.wanted, "yes" if a.learned else "NO") for a in report.answers],
    )
    for name, value in (
        ("reliability", report.reliability),
        ("generality", report.generality),
        ("locality", report.locality),
    ):
        print(f"{name:<12}{'not asked: no record has such a prompt' if value is None else f'{value:.3f}'}")
    steps = sum(outcome.steps for outcome in outcomes)
    size = (output / WEIGHTS).stat().st_size / 1000
    print(
        f"\n{steps} steps, {sum(outcome.seconds for outcome in outcomes):.1f} s. Adapter: {output} ({size:.0f} kB). To use it:\n"
    )
    print(f'    baft ask --model {model} --adapter {output} "{report.answers[0].prompt}"\n')
    print("    import peft_baft                              # makes PEFT know the type BAFT")
    print("    from peft import PeftModel")
    print(f'    model = PeftModel.from_pretrained(base_model, "{output}")')


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A plain table as wide as the terminal; longer cells are cut."""
    room = max(12, (shutil.get_terminal_size((120, 24)).columns - 3 * len(header)) // len(header) + 8)
    cells = [[cell if len(cell) <= room else cell[: room - 1] + "…" for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    print("\n" + "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]]) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="baft", description="Change what a language model knows, and keep the change as a PEFT adapter."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    edits = _command(commands, "edit", edit)
    edits.add_argument(
        "--edits",
        required=True,
        type=Path,
        help="facts: .jsonl, .json or .csv with prompt, target and optionally rephrase, unrelated",
    )
    edits.add_argument("--output", required=True, type=Path, help="folder for the adapter")
    edits.add_argument("--adapter", type=Path, help="an adapter to continue")
    edits.add_argument(
        "--batch-size", type=int, default=1, help="facts learned at once; 1, the default, is one after another"
    )
    edits.add_argument(
        "--unrelated", default="general", help="text to leave alone: a file, `general` (default) or `none`"
    )
    edits.add_argument("--preset", choices=PRESETS, default="default", help="settings by name")
    edits.add_argument("--r", type=int, help="rank of a new adapter")
    edits.add_argument("--lr", type=float, help="learning rate")
    edits.add_argument("--max-steps", type=int, help="at most so many steps an edit")
    edits.add_argument("--seed", type=int, default=0, help="of a new adapter's first weights")
    edits.add_argument("--overwrite", action="store_true", help="replace an adapter in the output folder")
    asking = _command(commands, "ask", ask)
    asking.add_argument("--adapter", required=True, type=Path, help="folder of the adapter")
    asking.add_argument("--max-new-tokens", type=int, default=16, help="length of an answer")
    asking.add_argument("prompts", nargs="+", metavar="PROMPT")
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
    """One command with the arguments that all share."""
    parser = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
    parser.set_defaults(run=run)
    parser.add_argument("--model", required=True, help="Hub id, local folder, GGUF file, or smollm2")
    parser.add_argument("--dtype", default="auto", help="of the base model: float32, bfloat16, float16 or auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="a device, or auto")
    return parser


if __name__ == "__main__":
    sys.exit(main())
