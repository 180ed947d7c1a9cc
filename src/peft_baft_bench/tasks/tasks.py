"""The benchmarks by name: how each file is read, where the Hub has it, how it is judged.

A new benchmark is one entry of `TASKS`; its name stands nowhere else. One in the shape of KnowEdit needs no reader of its own:

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
        read: turns its file into cases, one for each row (`tasks/formats.py` has readers); where `ask` is given, into whatever
            that function asks.
        averaged: the scores whose mean is the paper's `Avg` column.
        description: what is asked, in one line.
        hub_file: the file to take by default, in the Hub's data set zjunlp/KnowEdit; None where that has none.
        unrelated: what is trained beside by default: `general`, or `none` as in the paper's single editing (Table 1).
        canaries: ask general questions too, for data that brings no locality probes of its own choice.
        ask: for a benchmark that edits nothing and asks a model as it is, the function that asks some rows, as `piqa_cases`
            does; None for facts to be edited.
    """

    read: Callable[[Path], Sequence[Any]]
    averaged: tuple[str, ...]
    description: str
    hub_file: str | None = None
    unrelated: str = "none"
    canaries: bool = False
    ask: Callable[..., list[dict[str, Any]]] | None = None

    def prepared(self, cases: Sequence[Case]) -> list[Case]:
        """Add to the cases what else is to be asked."""
        if not self.canaries:
            return list(cases)
        general = tuple(Probe("locality", p.prompt, p.answer, CANARY_TOPIC) for p in CANARIES)
        return [replace(case, probes=(*case.probes, *general)) for case in cases]


REPHRASED = ("reliability", "generality", "locality")
PORTED = ("reliability", "portability", "locality")
TASKS: dict[str, Task] = {
    "zsre": Task(read_zsre, REPHRASED, "ZsRE, the continual protocol's file", unrelated="general"),
    "counterfact": Task(
        read_counterfact, REPHRASED, "CounterFact, of ROME or of EasyEdit", unrelated="general"
    ),
    "facts": Task(
        read_cases,
        REPHRASED,
        "your own facts, and general questions beside",
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
    "piqa": Task(
        read_piqa, (), "PIQA: everyday reasoning, asked of a model as it is", ask=piqa_cases
    ),
}


def task_of(name: str) -> Task:
    """Find a benchmark of `TASKS`.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in TASKS:
        raise ValueError(f"There is no benchmark {name!r}; known are {', '.join(TASKS)}.")
    return TASKS[name]


def read_benchmark(name: str, path: str | Path) -> list[Any]:
    """Read the cases of a benchmark of `TASKS`, one for each record and in the file's order.

    Raises:
        ValueError: there is no such benchmark, or a record is unusable; the message begins with its place.
        FileNotFoundError: there is no such file.
    """
    return list(task_of(name).read(Path(path)))


def locate(name: str, data: str | Path | None = None) -> Path:
    """Find the file of a benchmark.

    Args:
        data: a path that exists; else a file name of the Hub's data set zjunlp/KnowEdit, in full or without its
            folder (`recent_train.json`), which is downloaded. None takes the task's file there.

    Raises:
        FileNotFoundError: neither is there, or there is no network.
        ValueError: there is no such benchmark; or no data is named, and the Hub has none for it.
    """
    task = task_of(name)
    if data is not None and Path(data).exists():
        return Path(data)
    hub_file = task.hub_file if data is None else _hub_file(task, str(data))
    if hub_file is None and data is None:
        raise ValueError(
            f"Say with --data which file {name} is to be read from; the Hub has none to take by itself."
        )
    if hub_file is None:
        raise FileNotFoundError(
            f"There is no file {data}, and no such name in the Hub's data set {KNOWEDIT}."
        )
    try:
        return Path(huggingface_hub.hf_hub_download(KNOWEDIT, hub_file, repo_type="dataset"))
    except Exception as error:  # what the network raises differs between versions
        not_here = f"There is no file {data}, and " if data is not None else ""
        raise FileNotFoundError(
            f"{not_here}{hub_file} of the Hub's data set {KNOWEDIT} could not be downloaded "
            f"({type(error).__name__}: {error}); give the path of a file that you have."
        ) from error


def _hub_file(task: Task, data: str) -> str | None:
    """Find the full name of a KnowEdit file that was named in full or without its folder; None for what cannot be one."""
    if data.startswith("benchmark/"):
        return data
    is_path = "/" in data or "\\" in data
    if task.hub_file is None or is_path:
        return None
    folder = task.hub_file.rpartition("/")[0]
    return f"{folder}/{data}"
