"""Single editing of ZsRE: a fresh adapter for each row, edited, asked, and taken off again.

    python benchmarks/zsre_single.py --data zsre_edit.json --unrelated nq_irrelevant_train.json --rows 0:50 \
        --variants baft,reft --seeds 0,1,2 --output results.jsonl

Reliability, generality and locality are teacher-forced token matches, the latter against the unedited model. A variant is
`baft`, `reft`, or either with settings: `baft:gate_norm=none,lr=0.002,locality=3`. One JSON line per variant and seed.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import fields
from pathlib import Path
from statistics import mean

import torch
from peft import get_peft_model
from tqdm import tqdm

from peft_baft import BaftConfig, BaftEditor, DescentConfig, Edit, Objective, Unrelated
from peft_baft.evaluation.scoring import agreement, predicted_tokens, token_match
from peft_baft.models import load_model


def settings_of(variant: str) -> dict:
    """`baft:lr=0.002,gate_norm=none` to keyword arguments by name."""
    name, _, rest = variant.partition(":")
    given = {k: json.loads(v) if v[0] in "0123456789[tf-" else v for k, v in (item.split("=") for item in rest.split(";") if item)}
    return {"weighting": {"baft": "basis", "reft": "none"}[name], **given}


def taken_by(cls: type, given: dict) -> dict:
    return {f.name: given[f.name] for f in fields(cls) if f.name in given}


def evaluate(base, tokenizer, record: dict, unrelated: list[Unrelated], given: dict) -> dict:
    pairs = [(record["src"], record["alt"]), (record["rephrase"], record["alt"])]
    nearby = [(record["loc"], record["loc_ans"])]
    before = predicted_tokens(base, tokenizer, nearby)
    model = get_peft_model(base, BaftConfig(task_type="CAUSAL_LM", **taken_by(BaftConfig, given)))
    editor = BaftEditor(
        model, tokenizer, unrelated, Objective(**taken_by(Objective, given)), DescentConfig(**taken_by(DescentConfig, given))
    )


    outcome = editor.edit([Edit(*pairs[0])])
    reliability, generality = token_match(model, tokenizer, pairs)
    locality = agreement(before, predicted_tokens(model, tokenizer, nearby))[0]
    model.unload()
    return {"rel": reliability, "gen": generality, "loc": locality, "steps": outcome.steps, "seconds": outcome.seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", required=True)
    parser.add_argument("--unrelated", required=True)
    parser.add_argument("--rows", default="0:50")
    parser.add_argument("--variants", default="baft,reft")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--output")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    base, tokenizer = load_model(args.model)
    first, last = map(int, args.rows.split(":"))
    records = json.loads(Path(args.data).read_text())[first:last]
    pool = [Unrelated(r["prompt"], r["ground_truth"]) for r in json.loads(Path(args.unrelated).read_text())]
    for variant in args.variants.split(","):
        for seed in map(int, args.seeds.split(",")):
            begin, rows = time.perf_counter(), []
            for index, record in enumerate(tqdm(records, desc=f"{variant} seed {seed}", disable=None), start=first):
                torch.manual_seed(seed * 100_003 + index)
                rows.append(evaluate(base, tokenizer, record, [pool[index % len(pool)]], settings_of(variant)))
            line = {"variant": variant, "seed": seed, "rows": args.rows, "torch": torch.__version__}
            line |= {key: round(mean(row[key] for row in rows), 4) for key in rows[0]}
            line |= {"wall": round(time.perf_counter() - begin, 1)}
            print(json.dumps(line), flush=True)
            if args.output:
                with open(args.output, "a") as file:
                    file.write(json.dumps({**line, "cases": rows}) + "\n")


if __name__ == "__main__":
    main()
