"""`baft edit` and `baft ask`."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tqdm import tqdm

from peft_baft import BaftConfig, BaftEditor, Outcome
from peft_baft.adapter.weights import FILE as WEIGHTS
from peft_baft.cli.common import add_training_arguments, chosen_preset, chosen_unrelated, command, print_table
from peft_baft.data.datasets import read_cases
from peft_baft.evaluation.report import Report, watch
from peft_baft.evaluation.scoring import greedy_answers
from peft_baft.models import load_model
from peft_baft.presets import Preset

REPORT = "report.json"
HOW_TO_LOAD = """
## How to load this adapter

`pip install peft-baft`, and `import peft_baft` before `PeftModel.from_pretrained`; without it, loading ends in
`KeyError: 'BAFT'`.
"""


def edit(args: argparse.Namespace) -> int:
    """Teach the facts of a file to a model and save the adapter."""
    _prepare_output(args.output, args.adapter, args.overwrite)
    cases = read_cases(args.edits)
    unrelated = chosen_unrelated(args.unrelated)
    preset = chosen_preset(args)
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
    print_table(
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
    print_table(
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


def add_commands(commands: Any) -> None:
    """Put `edit` and `ask` among the commands."""
    edits = command(commands, "edit", edit)
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
    edits.add_argument("--seed", type=int, default=0, help="of a new adapter's first weights")
    edits.add_argument("--overwrite", action="store_true", help="replace an adapter in the output folder")
    add_training_arguments(edits)
    asking = command(commands, "ask", ask)
    asking.add_argument("--adapter", required=True, type=Path, help="folder of the adapter")
    asking.add_argument("--max-new-tokens", type=int, default=16, help="length of an answer")
    asking.add_argument("prompts", nargs="+", metavar="PROMPT")
