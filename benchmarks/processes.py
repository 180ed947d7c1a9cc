"""Independent edits by two processes of one core each, against one process held to one core: wall seconds, asking included.

Each side runs `baft bench zsre --schedule single` as a user would, in fresh processes. Starting and loading is timed apart, by
a run of a single row in each process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import alternated, arguments, table


def wall_seconds(options, processes: int, rows: int) -> float:
    """Seconds of one command; process i is held to core i."""
    with tempfile.TemporaryDirectory() as folder:
        data = ["--model", options.model, "--data", options.data, "--rows", f"0:{rows}", "--method", options.method]
        command = ["bench", "zsre", *data, "--output", str(Path(folder) / "r.jsonl"), "--processes", str(processes)]
        run = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
        cores = set(sorted(os.sched_getaffinity(0))[:processes])
        begin = time.perf_counter()
        subprocess.run(
            [sys.executable, *run, "-m", "peft_baft.cli", *command],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
            capture_output=True,
            check=True,
        )
        return time.perf_counter() - begin


def main() -> None:
    options = arguments(__doc__, rows=32, method="baft")
    counts, found = (1, 2), {}
    for count in counts:
        found |= {f"{count} process(es)": lambda count=count: wall_seconds(options, count, options.rows)}
        found |= {f"{count} process(es), starting": lambda count=count: wall_seconds(options, count, count)}
    times = alternated(found, options.rounds)
    for count in counts:
        name = f"{count} process(es)"
        pairs = zip(times[name], times[f"{name}, starting"], strict=True)
        times[f"{name} without starting"] = [whole - start for whole, start in pairs]
    without = {name: values for name, values in times.items() if name.endswith("without starting")}
    whole = {name: values for name, values in times.items() if name not in without}
    table(f"{options.rows} independent edits by {options.method}", "s", whole, "1 process(es)")
    table("the same, starting taken off", "s", without, "1 process(es) without starting")


if __name__ == "__main__":
    main()
