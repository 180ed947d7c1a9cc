"""The benchmarks by name: how each file is read, where to find it on the Hub, and how it is scored.

A new benchmark is one entry of `TASKS`. A file in the format of KnowEdit does not need its own reader:

    TASKS["mine"] = Task(read_knowedit, ("reliability", "portability", "locality"), "two-hop questions about my facts")
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub

from peft_baft.data.cases import Case, Probe
from peft_baft.data.datasets import read_cases
from peft_baft.data.unrelated import CANARIES
from peft_baft_bench.metrics.metrics import piqa_cases
from peft_baft_bench.tasks.formats import (
    read_convsent,
    read_counterfact,
    read_knowedit,
    read_piqa,
    read_zsre,
)

CANARY_TOPIC = "general knowledge"
KNOWEDIT = "zjunlp/KnowEdit"  # the data set on the Hub


@dataclass(frozen=True)
class Task:
    """A benchmark.

    Args:
        read: reads its file and returns one case per row (see the readers in `tasks/formats.py`); if `ask` is
            given, one item of the kind that `ask` takes.
        averaged: the scores whose mean is the paper's `Avg` column.
        description: what is asked, in one line.
        hub_file: the default file in the Hub's data set zjunlp/KnowEdit; None if it has none.
        unrelated: the default text to train alongside: `general`, or `none` as in the paper's single editing
            (Table 1).
        canaries: also ask general questions, for data without its own locality probes.
        ask: for a benchmark without edits, the function that asks a model some rows, such as `piqa_cases`;
            None for facts to edit.
    """

    read: Callable[[Path], Sequence[Any]]
    averaged: tuple[str, ...]
    description: str
    hub_file: str | None = None
    unrelated: str = "none"
    canaries: bool = False
    ask: Callable[..., list[dict[str, Any]]] | None = None

    def add_canaries(self, cases: Sequence[Case]) -> list[Case]:
        """Add the general questions to the cases if this benchmark asks them."""
        if not self.canaries:
            return list(cases)
        general = tuple(Probe("locality", p.prompt, p.answer, CANARY_TOPIC) for p in CANARIES)
        return [replace(case, probes=(*case.probes, *general)) for case in cases]


REPHRASED = ("reliability", "generality", "locality")
PORTED = ("reliability", "portability", "locality")
TASKS: dict[str, Task] = {
    "zsre": Task(read_zsre, REPHRASED, "ZsRE, the continual protocol's file", unrelated="general"),
    "counterfact": Task(
        read_counterfact,
        REPHRASED,
        "CounterFact, in ROME's or EasyEdit's format",
        unrelated="general",
    ),
    "facts": Task(
        read_cases,
        REPHRASED,
        "your own facts, and general questions",
        unrelated="general",
        canaries=True,
    ),
    "wiki_recent": Task(
        read_knowedit,
        PORTED,
        "KnowEdit: recent facts",
        hub_file="benchmark/wiki_recent/recent_test.json",
    ),
    "wiki_counterfact": Task(
        read_knowedit,
        PORTED,
        "KnowEdit: counterfactuals",
        hub_file="benchmark/wiki_counterfact/test_cf.json",
    ),
    "wikibio": Task(
        partial(read_knowedit, prompt="text", target="labels"),
        PORTED,
        "KnowEdit: sentences of biographies",
        hub_file="benchmark/WikiBio/wikibio-test-all.json",
    ),
    "knowedit_zsre": Task(
        read_knowedit,
        PORTED,
        "KnowEdit: its own ZsRE",
        hub_file="benchmark/ZsRE/ZsRE-test-all.json",
    ),
    "convsent": Task(
        read_convsent,
        ("reliability",),
        "KnowEdit: opinions",
        hub_file="benchmark/Convsent/blender_test.json",
    ),
    "piqa": Task(read_piqa, (), "PIQA: everyday reasoning, asked without editing", ask=piqa_cases),
}


def find_task(name: str) -> Task:
    """Look up a benchmark in `TASKS`.

    Raises:
        ValueError: there is no benchmark of that name.
    """
    if name not in TASKS:
        raise ValueError(f"There is no benchmark {name!r}; known are {', '.join(TASKS)}.")
    return TASKS[name]


def read_benchmark(name: str, path: str | Path) -> list[Any]:
    """Read the cases of a benchmark in `TASKS`, one per record in the file's order.

    Raises:
        ValueError: there is no such benchmark, or a record is invalid; the message begins with its place.
        FileNotFoundError: there is no such file.
    """
    return list(find_task(name).read(Path(path)))


def find_benchmark_file(name: str, data: str | Path | None = None) -> Path:
    """Find the file of a benchmark.

    Args:
        data: an existing path, or the name of a file in the Hub's data set zjunlp/KnowEdit, with or without
            its folder (`recent_train.json`), which is downloaded. None selects the task's default file there.

    Raises:
        FileNotFoundError: there is no such file, or no network.
        ValueError: there is no such benchmark, or it has no default file and `data` is None.
    """
    task = find_task(name)
    if data is not None and Path(data).exists():
        return Path(data)
    hub_file = task.hub_file if data is None else _hub_file(task, str(data))
    if hub_file is None and data is None:
        raise ValueError(
            f"Give with --data which file {name} is read from; the Hub has no default file for it."
        )
    if hub_file is None:
        raise FileNotFoundError(
            f"There is no file {data}, and no such name in the Hub's data set {KNOWEDIT}."
        )
    try:
        return Path(huggingface_hub.hf_hub_download(KNOWEDIT, hub_file, repo_type="dataset"))
    except Exception as error:  # network errors differ between versions of huggingface_hub
        no_file = f"There is no file {data}, and " if data is not None else ""
        raise FileNotFoundError(
            f"{no_file}{hub_file} of the Hub's data set {KNOWEDIT} could not be downloaded "
            f"({type(error).__name__}: {error}); give the path of a local file."
        ) from error


def _hub_file(task: Task, data: str) -> str | None:
    """Return the full name of a KnowEdit file that was given with or without its folder; None if it cannot be one."""
    if data.startswith("benchmark/"):
        return data
    is_path = "/" in data or "\\" in data
    if task.hub_file is None or is_path:
        return None
    folder = task.hub_file.rpartition("/")[0]
    return f"{folder}/{data}"
