"""`baft edit` and `baft ask`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tqdm import tqdm

from peft_baft import BaftConfig, BaftEditor, Outcome
from peft_baft.adapter.weights import FILE as WEIGHTS
from peft_baft.cli.common import (
    add_process_arguments,
    add_training_arguments,
    chosen_preset,
    chosen_unrelated,
    command,
    described,
    print_table,
)
from peft_baft.data.datasets import read_cases, read_unrelated
from peft_baft.data.unrelated import CANARIES
from peft_baft.editing.continual import Made, edit_continually
from peft_baft.editing.journal import LINES, Journal
from peft_baft.evaluation.guard import canary_check
from peft_baft.evaluation.report import Report, watch
from peft_baft.evaluation.scoring import greedy_answers
from peft_baft.models import load_model
from peft_baft.presets import Preset
from peft_baft.processes import Processes

REPORT = "report.json"
HOW_TO_LOAD = """
## How to load this adapter

`pip install peft-baft`, and `import peft_baft` before `PeftModel.from_pretrained`; without it, loading ends in
`KeyError: 'BAFT'`.
"""


def edit(args: argparse.Namespace) -> int:
    """Teach the facts of a file to a model and save the adapter."""
    with Processes.started(args.processes) as processes:
        if processes.first:
            print(described(processes, args.device, "the facts of each batch"), flush=True)
        args.device = processes.device(args.device)
        return _edit(args, processes)


def _edit(args: argparse.Namespace, processes: Processes) -> int:
    """`edit` by several processes, of which the first reports and writes."""
    with processes.together():
        if processes.first:
            _prepare_output(args.output, args.adapter, args.overwrite, args.resume)
    cases = read_cases(args.edits)
    unrelated = chosen_unrelated(args.unrelated)
    preset = chosen_preset(args)
    model, tokenizer = _edited_model(args, preset)
    editor = BaftEditor(model, tokenizer, unrelated, preset.objective, preset.descent, preset.batch_descent)
    editor.processes, editor.unrelated_used = processes, _unrelated_used(args.adapter)
    report = watch(model, tokenizer, cases)
    check = None
    if args.min_agreement is not None:
        canaries: Sequence[Any] = CANARIES if args.canaries is None else read_unrelated(args.canaries)
        check = canary_check(model, tokenizer, args.min_agreement, canaries)
    if args.overwrite and not args.resume and processes.first:
        Journal(args.output).begin_anew()
    batches = edit_continually(
        editor,
        [case.edit for case in cases],
        args.batch_size,
        journal=Journal(args.output, args.snapshot_every),
        resume=args.resume,
        check=check,
        keep_only_good=args.keep_only_good,
    )
    made = _with_progress(batches, -(-len(cases) // args.batch_size), processes.first)
    return processes.of_first(lambda: _report(args, editor, report(), made))


def _report(args: argparse.Namespace, editor: BaftEditor, result: Report, made: Sequence[Made]) -> int:
    """Save the adapter, tell what became of the model; 0 if all is learned."""
    model, output = editor.model, args.output
    outcomes = [batch.outcome for batch in made if batch.outcome is not None]
    model.save_pretrained(str(output), save_embedding_layers=False)
    summary = asdict(result) | {"unrelated_used": editor.unrelated_used}
    (output / REPORT).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _append(output / "README.md", HOW_TO_LOAD)
    _print_report(result, outcomes, args.model, output)
    _print_problems(made)
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
    if adapter is None:
        return 0
    journal = Journal(adapter)
    if journal.snapshots():
        return int(journal.kept(journal.snapshots()[-1])[1].get("unrelated_used", 0))
    report = adapter / REPORT
    return int(json.loads(report.read_text("utf-8"))["unrelated_used"]) if report.exists() else 0


def _prepare_output(output: Path, continued: Path | None, overwrite: bool, resume: bool) -> None:
    """Make the output folder; a ValueError if an adapter or an unfinished run in it would be lost."""
    same = continued is not None and continued.resolve() == output.resolve()
    if (output / WEIGHTS).exists() and not (overwrite or resume or same):
        raise ValueError(
            f"{output} holds an adapter: continue it with --adapter {output}, or replace it with --overwrite."
        )
    if (output / LINES).exists() and not (overwrite or resume or same):
        raise ValueError(f"{output} holds an unfinished run: go on with --resume, or begin anew with --overwrite.")
    output.mkdir(parents=True, exist_ok=True)  # a folder that cannot be written is found out before the work, not after


def _append(file: Path, text: str) -> None:
    """Add `text` to a file once, however often the adapter is saved."""
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    if text not in before:
        file.write_text(before + text, encoding="utf-8")


def _with_progress(batches: Iterable[Made], count: int, shown: bool) -> list[Made]:
    made = []
    with tqdm(total=count, desc="editing", unit="edit" if count else "", disable=not shown) as bar:
        for batch in batches:
            made.append(batch)
            if batch.outcome is not None:
                bar.set_postfix(steps=batch.outcome.steps, loss=f"{batch.outcome.losses['teacher_forcing']:.3f}")
            bar.update()
    return made


def _print_problems(made: Sequence[Made]) -> None:
    """How many edits are in the adapter and good, in it and bad, and left out; and which are not good."""
    bad = [batch for batch in made if batch.problem is not None]
    failed, skipped = (sum(len(batch.edits) for batch in bad if batch.kept is kept) for kept in (True, False))
    learned = sum(len(batch.edits) for batch in made) - failed - skipped
    print(f"\nlearned {learned}, failed {failed}, skipped {skipped}")
    for batch in bad:
        state = "kept" if batch.kept else "taken back"
        for edit in batch.edits:
            print(f"  {edit.prompt!r:.60} -> {edit.target!r:.40}: {batch.problem} ({state})")


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
    edits.add_argument("--resume", action="store_true", help="go on with the output folder's interrupted run")
    edits.add_argument(
        "--snapshot-every", type=int, default=1, metavar="K", help="keep the adapter after every K edits"
    )
    edits.add_argument(
        "--min-agreement", type=float, metavar="A", help="an edit does harm if canaries agree less than this, 0 to 1"
    )
    edits.add_argument(
        "--canaries", type=Path, help="what should stay, as for --unrelated; by default the package's own"
    )
    edits.add_argument(
        "--keep-only-good", action="store_true", help="take edits back that were not learned or did harm"
    )
    add_training_arguments(edits)
    add_process_arguments(edits)
    asking = command(commands, "ask", ask)
    asking.add_argument("--adapter", required=True, type=Path, help="folder of the adapter")
    asking.add_argument("--max-new-tokens", type=int, default=16, help="length of an answer")
    asking.add_argument("prompts", nargs="+", metavar="PROMPT")
