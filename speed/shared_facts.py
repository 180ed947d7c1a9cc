"""One adapter edited in batches by two processes that share each batch's facts, against one process: are the scores the same?

In float32 the sums of two shares are rounded otherwise than one sum, and a run of many edits grows such differences like any
other. `--dtype float64` computes everything so, Llama's norms too, which transformers computes in float32 whatever it is given.
"""

from __future__ import annotations

import json
import os
import runpy
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import arguments, launch
from transformers.models.llama import modeling_llama

BATCH = 10
WORKER = "WIDE_NORMS"  # set in the environment of a process that runs the command


def wide_norm(norm: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What `LlamaRMSNorm` computes, in the type that it is given."""
    return (
        norm.weight
        * hidden
        * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon)
    )


def result(options, processes: int) -> dict[str, Any]:
    """The result line of one command."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "r.jsonl"
        given = {
            "model": options.model,
            "data": options.data,
            "rows": f"0:{options.rows}",
            "method": options.method,
        }
        given |= {
            "schedule": "batched",
            "batch-size": BATCH,
            "edits": options.rows // BATCH,
            "split": "facts",
        }
        given |= {"dtype": options.dtype, "processes": processes, "output": output}
        given |= {"unrelated": options.unrelated} if options.unrelated else {}
        wide = str(int(options.dtype == "float64"))
        launch([__file__, "bench", "zsre"], given, processes, env={WORKER: wide})
        return json.loads(output.read_text())


def main() -> None:
    options = arguments(__doc__, rows=100, method="baft", dtype="float32", unrelated="")
    one, two = (result(options, processes) for processes in (1, 2))
    print(f"| {options.dtype} | one process | two |\n|---|---|---|")
    for name in one["scores"]:
        print(f"| {name} | {one['scores'][name]:.3f} | {two['scores'][name]:.3f} |")
    for name, run in ("one", one), ("two", two):
        print(f"steps, {name}: {[case['steps'] for case in run['cases']][::BATCH]}")
    pairs = list(zip(one["cases"], two["cases"], strict=True))
    same = sum(a | {"seconds": None} == b | {"seconds": None} for a, b in pairs)
    print(f"{same} of {len(pairs)} rows have the same steps and the same reply to every question")


if __name__ == "__main__":
    if WORKER not in os.environ:
        main()
    else:
        if os.environ[WORKER] == "1":
            modeling_llama.LlamaRMSNorm.forward = wide_norm
        runpy.run_module("peft_baft_cli", run_name="__main__", alter_sys=True)
