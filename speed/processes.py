"""Independent edits by two processes of one core each, against one process held to one core: wall seconds, asking included.

Each side runs `baft bench zsre --schedule single` as a user would, in fresh processes, on a checkpoint of the usual kind (the
demo's GGUF file takes 15 s to unpack). Starting and loading is timed apart, by a run of a single row in each process; what
the other rows take beyond it is scaled to all of them.
"""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path

from common import alternated, arguments, launch, load, table

BENCH = ["-m", "peft_baft_cli", "bench", "zsre"]


def wall_seconds(options, model: str, processes: int, rows: int) -> float:
    """Seconds of one command, held to as many cores as processes."""
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "model": model,
            "data": options.data,
            "rows": f"0:{rows}",
            "method": options.method,
        }
        given |= {"output": Path(folder) / "r.jsonl", "processes": processes}
        cores = set(sorted(os.sched_getaffinity(0))[:processes])
        begin = time.perf_counter()
        launch(BENCH, given, processes, preexec_fn=lambda: os.sched_setaffinity(0, cores))
        return time.perf_counter() - begin


def saved(options, folder: str) -> str:
    """The model as a plain checkpoint."""
    model, tokenizer = load(options)
    vars(model.config).pop(
        "quantization_config", None
    )  # of a GGUF file: its weights are plain by now
    model.hf_quantizer = None
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    options = arguments(__doc__, rows=96, method="baft")
    counts, found = (1, 2), {}
    with tempfile.TemporaryDirectory() as folder:
        seconds = partial(wall_seconds, options, saved(options, folder))
        for count in counts:
            found |= {f"{count} process(es)": partial(seconds, count, options.rows)}
            found |= {f"{count} process(es), starting": partial(seconds, count, count)}
        times = alternated(found, options.rounds)
    for count in counts:
        name = f"{count} process(es)"
        pairs = zip(times[name], times[f"{name}, starting"], strict=True)
        scale = options.rows / (options.rows - count)
        times[f"{name} without starting"] = [(whole - start) * scale for whole, start in pairs]
    without = {name: values for name, values in times.items() if name.endswith("without starting")}
    whole = {name: values for name, values in times.items() if name not in without}
    table(f"{options.rows} independent edits by {options.method}", "s", whole, "1 process(es)")
    table("the same, starting taken off", "s", without, "1 process(es) without starting")


if __name__ == "__main__":
    main()
