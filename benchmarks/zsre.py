"""Editing ZsRE, one fact after another: a fresh adapter for each block of T rows, asked after the last edit of the block.

    python benchmarks/zsre.py --data zsre_edit.json --unrelated nq_irrelevant_train.json --rows 0:50 \
        --variants baft,reft --seeds 0,1,2 --output results.jsonl

T = 1 (`--edits 1`, the default) is single editing. Reliability, generality and locality are teacher-forced token matches, the
last against the unedited model. A variant is `baft` or `reft`, with settings of BaftConfig, Objective and DescentConfig if
wanted: `baft:gate_norm=none;lr=0.002`. One JSON line per variant and seed, then a table.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from dataclasses import fields
from hashlib import sha256
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import peft
import torch
import transformers
from peft import get_peft_model
from tqdm import tqdm

import peft_baft
from peft_baft import BaftConfig, BaftEditor, Case, DescentConfig, Objective, Unrelated
from peft_baft.data.datasets import read_cases, read_unrelated
from peft_baft.evaluation.scoring import agreement, predicted_tokens, token_match

MEASURES = ("reliability", "generality", "locality")


def settings_of(variant: str) -> dict[str, Any]:
    """`baft:lr=0.002;gate_norm=none` to keyword arguments by name."""
    name, _, rest = variant.partition(":")
    given = {"weighting": {"baft": "basis", "reft": "none"}[name]}
    for item in filter(None, rest.split(";")):
        key, value = item.split("=")
        try:
            given[key] = json.loads(value)
        except json.JSONDecodeError:
            given[key] = value
    return given


def accepted(cls: type, given: dict[str, Any]) -> dict[str, Any]:
    return {f.name: given[f.name] for f in fields(cls) if f.name in given}


def pairs(cases: list[Case], kind: str) -> list[tuple[str, str]]:
    return [(probe.prompt, probe.answer) for case in cases for probe in case.of_kind(kind)]


def run_block(base: Any, tokenizer: Any, cases: list[Case], unrelated: list[Unrelated], given: dict) -> dict[str, Any]:
    """Edit the cases in turn with a fresh adapter, ask, and take the adapter off."""
    nearby = pairs(cases, "locality")
    before = predicted_tokens(base, tokenizer, nearby)
    model = get_peft_model(base, BaftConfig(task_type="CAUSAL_LM", **accepted(BaftConfig, given)))
    editor = BaftEditor(
        model,
        tokenizer,
        unrelated,
        Objective(**accepted(Objective, given)),
        DescentConfig(**accepted(DescentConfig, given)),
    )
    outcomes = list(editor.edit_in_turn([case.edit for case in cases]))
    found = {
        "reliability": token_match(model, tokenizer, [(c.edit.prompt, c.edit.target) for c in cases]),
        "generality": token_match(model, tokenizer, pairs(cases, "generality")),
        "locality": agreement(before, predicted_tokens(model, tokenizer, nearby)),
        "steps": [outcome.steps for outcome in outcomes],
        "seconds": [outcome.seconds for outcome in outcomes],
    }
    model.unload()
    return found


def run(args: argparse.Namespace, variant: str, seed: int, base: Any, tokenizer: Any) -> dict[str, Any]:
    first, last = map(int, args.rows.split(":"))
    cases, pool = read_cases(args.data)[first:last], read_unrelated(args.unrelated)
    begin, rows = time.perf_counter(), {}
    for start in tqdm(range(0, len(cases), args.edits), desc=f"{variant} seed {seed}", disable=None):
        block = cases[start : start + args.edits]
        torch.manual_seed(seed * 100_003 + first + start)
        unrelated = [pool[(first + start + i) % len(pool)] for i in range(len(block))]
        for key, values in run_block(base, tokenizer, block, unrelated, settings_of(variant)).items():
            rows.setdefault(key, []).extend(values)
    means = {key: round(mean(values), 4) for key, values in rows.items()}
    return {"variant": variant, "seed": seed, **means, "wall": round(time.perf_counter() - begin), "cases": rows}


def protocol(args: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to repeat a line."""
    return {
        "model": args.model,
        "rows": args.rows,
        "edits": args.edits,
        "evaluated": "after all edits of a block",
        "score": "teacher-forced token match",
        "data": sha256(Path(args.data).read_bytes()).hexdigest()[:12],
        "versions": {m.__name__: m.__version__ for m in (peft_baft, torch, transformers, peft)},
        "python": platform.python_version(),
    }


def table(lines: list[dict[str, Any]]) -> Iterator[str]:
    """Markdown: mean of the seeds' means, and their standard deviation where there are several."""
    yield "| variant | seeds | " + " | ".join(MEASURES) + " | steps an edit |"
    yield "|---|---|" + "---|" * (len(MEASURES) + 1)
    for variant in dict.fromkeys(line["variant"] for line in lines):
        mine = [line for line in lines if line["variant"] == variant]
        cells = []
        for key in (*MEASURES, "steps"):
            values = [line[key] for line in mine]
            spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.3f}{spread}")
        yield f"| {variant} | {len(mine)} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", required=True, help="zsre_edit.json")
    parser.add_argument("--unrelated", required=True, help="nq_irrelevant_train.json")
    parser.add_argument("--rows", default="0:50")
    parser.add_argument("--edits", type=int, default=1, help="T, edits of one adapter")
    parser.add_argument("--variants", default="baft,reft")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--threads", type=int, help="of torch")
    parser.add_argument("--output", help="a JSONL file to add the lines to")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    base, tokenizer = peft_baft.load_model(args.model)
    lines = []
    for variant in args.variants.split(","):
        for seed in map(int, args.seeds.split(",")):
            lines.append(run(args, variant, seed, base, tokenizer) | protocol(args))
            if args.output:
                with open(args.output, "a", encoding="utf-8") as file:
                    file.write(json.dumps(lines[-1]) + "\n")
    print("\n".join(table(lines)))


if __name__ == "__main__":
    main()
