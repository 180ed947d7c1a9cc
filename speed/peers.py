"""The same edits by pyreft, adapters' LoReFT, PEFT LoRA and this package, each in its own environment, in turn.

    python -m venv P && P/bin/pip install torch==2.13.0 pyreft 'transformers==4.45.1'
    python -m venv A && A/bin/pip install torch==2.13.0 adapters
    python speed/peers.py --pyreft P/bin/python --adapters A/bin/python

Rank 12 on four blocks (LoRA r = 8 on queries and values), the last 3 prompt tokens and every answer token, AdamW, batch 1, until
the mean cross entropy of the answer is below 0.01, at most 40 steps. `--sweep 1` looks for each one's best learning rate on rows
900-909 first, which are not among those that are timed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from common import arguments, facts, load, machine
from safetensors.torch import save_file

from peft_baft.adapter.blocks import default_blocks
from peft_baft.data.batching import encode

WORKER = Path(__file__).with_name("peer_worker.py")
# As `--sweep 1` found them.
BEST = {
    "peft_baft": 1e-2,
    "peft_lora": 5e-3,
    "pyreft": 2e-3,
    "adapters": 2e-3,
}
RATES = (1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2)


def main() -> None:
    options = arguments(__doc__, rows=10, pyreft="", adapters="", sweep=0, only="", padded=0)
    base, tokenizer = load(options)
    machine(options)
    pythons = {"peft_baft": sys.executable, "peft_lora": sys.executable}
    pythons |= {name: path for name in ("pyreft", "adapters") if (path := getattr(options, name))}
    pythons = {
        name: path
        for name, path in pythons.items()
        if name in (options.only or ",".join(pythons)).split(",")
    }
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder)
        prepare(prepared, base, tokenizer, options)
        best = {name: BEST[name] for name in pythons}
        if options.sweep:
            best = {
                name: sweep(name, python, prepared, options.threads)
                for name, python in pythons.items()
            }
        found: dict[str, list[dict]] = {name: [] for name in pythons}
        for _ in range(options.rounds):
            for name, python in pythons.items():
                found[name].append(
                    work(name, python, prepared, "timed", best[name], options.threads)
                )
    report(found, best)


def prepare(folder: Path, base, tokenizer, options) -> None:
    """Weights, shape and token ids, in forms that need nothing of this package or of a new transformers."""
    weights = {
        name: tensor.contiguous()
        for name, tensor in base.state_dict().items()
        if "lm_head" not in name
    }
    save_file(weights, folder / "weights.safetensors")
    names = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads rms_norm_eps"
    shape = {name: getattr(base.config, name) for name in names.split()}
    shape |= {"rope_theta": base.config.rope_parameters["rope_theta"], "tie_word_embeddings": True}
    shape |= {"max_position_embeddings": base.config.max_position_embeddings}
    text = tokenizer(" ".join(["It was a bright cold day in April."] * 100))["input_ids"][
        : options.padded
    ]
    rows = {"timed": facts(options, 0, options.rows), "sweep": facts(options, 900, 910)}
    coded = {
        kind: [encode(tokenizer, edit.prompt, edit.target) for edit in edits]
        for kind, edits in rows.items()
    }
    edits = {
        kind: [{"ids": [*text, *row.ids], "prompt": len(text) + row.prompt_length} for row in rows]
        for kind, rows in coded.items()
    }
    blocks = default_blocks(base.config.num_hidden_layers)
    (folder / "task.json").write_text(
        json.dumps({"shape": shape, "edits": edits, "blocks": blocks})
    )


def work(name: str, python: str, folder: Path, rows: str, rate: float, threads: int) -> dict:
    command = [python, str(WORKER), name, str(folder), rows, str(rate), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def sweep(name: str, python: str, folder: Path, threads: int) -> float:
    """The learning rate with the fewest seconds an edit among those that learn the most edits."""
    tried = {rate: work(name, python, folder, "sweep", rate, threads) for rate in RATES}
    for rate, found in tried.items():
        print(
            f"{name}, lr {rate}: learned {sum(found['learned'])}, {sum(found['steps'])} steps, {sum(found['seconds']):.1f} s"
        )
    return min(tried, key=lambda rate: (-sum(tried[rate]["learned"]), sum(tried[rate]["seconds"])))


def report(found: dict[str, list[dict]], best: dict[str, float]) -> None:
    print(
        "\n| | versions | lr | learned | steps an edit | s a step | × | s an edit | × |\n|---|---|---|---|---|---|---|---|---|"
    )
    per_edit = {
        name: [sum(run["seconds"]) / len(run["seconds"]) for run in runs]
        for name, runs in found.items()
    }
    per_step = {name: [run["step"] for run in runs] for name, runs in found.items()}
    for name, runs in found.items():
        ratios = [
            statistics.median(a / b for a, b in zip(values[name], values["peft_baft"], strict=True))
            for values in (per_step, per_edit)
        ]
        steps = sum(runs[0]["steps"]) / len(runs[0]["steps"])
        learned = f"{sum(runs[0]['learned'])} of {len(runs[0]['learned'])}"
        times = [statistics.median(values[name]) for values in (per_step, per_edit)]
        cells = [name, runs[0]["versions"], f"{best[name]:g}", learned, f"{steps:.1f}"]
        cells += [f"{times[0]:.3f}", f"{ratios[0]:.2f}", f"{times[1]:.2f}", f"{ratios[1]:.2f}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
