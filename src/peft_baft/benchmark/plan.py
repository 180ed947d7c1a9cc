"""From what was asked for to result lines: each run is named before it is made, and made once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save

from peft_baft.benchmark.methods import UNEDITED, Method
from peft_baft.benchmark.progress import Progress
from peft_baft.benchmark.results import FORMAT, append_result, done_already, identity, short_hash
from peft_baft.benchmark.runner import Bench
from peft_baft.benchmark.schedule import Schedule
from peft_baft.benchmark.scores import scores
from peft_baft.evaluation.scoring import EXTRA_TOKENS
from peft_baft.processes import Processes

ADAPTER = "adapter"


@dataclass(frozen=True)
class Run:
    """One line to be: what it will say of itself, and how it is made.

    method, schedule: how is edited; None for a model that is only asked. model: an adapter to ask, None for the bare model.
    """

    head: dict[str, Any]
    method: Method | None = None
    schedule: Schedule | None = None
    model: Any = None

    @property
    def title(self) -> str:
        """For a progress bar."""
        schedule = self.head["schedule"]
        amount = f" T={schedule['edits']} seed {self.head['seed']}" if self.schedule else ""
        return f"{self.head['method']}{amount}"

    @property
    def key(self) -> str:
        """Equal for two runs that should give the same."""
        return identity(self.head)


def planned(
    common: dict[str, Any], methods: Sequence[Method | None], schedules: Sequence[Schedule], seeds: Iterable[int]
) -> list[Run]:
    """Every schedule with every seed and method; the unedited model once.

    Args:
        common: what all lines share: benchmark, model, data, unrelated, protocol, versions.
    """
    runs: list[Run] = []
    for schedule, seed, method in product(schedules, seeds, methods):
        if method is None:
            head = {"method": UNEDITED, "settings": {}, "schedule": NO_SCHEDULE, "seed": 0}
            runs.append(Run(common | head))
        else:
            head = {"method": method.name, "settings": method.described()}
            head |= {"schedule": schedule.described(), "seed": seed}
            runs.append(Run(common | head, method, schedule))
    return list({run.key: run for run in runs}.values())


def adapter_run(common: dict[str, Any], name: str, model: PeftModel) -> Run:
    """An adapter that someone made, of any PEFT type, to be asked as it is."""
    config = model.peft_config[model.active_adapter]
    weights = {name: tensor.cpu() for name, tensor in get_peft_model_state_dict(model).items()}
    settings = {
        "adapter": name,
        "peft_type": str(getattr(config.peft_type, "value", config.peft_type)),
        "sha256": short_hash(save(weights)),
    }
    head = {"method": ADAPTER, "settings": settings, "schedule": NO_SCHEDULE, "seed": 0}
    return Run(common | head, model=model)


NO_SCHEDULE = {"name": "none", "edits": 0, "batch_size": 0, "when": "after_all"}


def protocol(template: str, also: Sequence[str]) -> dict[str, Any]:
    """How is asked, as it stands in a result line."""
    return {
        "template": template,
        "aliases": "first",
        "join": "one space; texts stripped" if template == "raw" else "chat template; texts stripped",
        "positions": "prompt end and answer of each probe",
        "generation": {"greedy": True, "stop": "first line break", "extra_tokens": EXTRA_TOKENS},
        "also": list(also),
    }


def perform(bench: Bench, run: Run, averaged: Sequence[str], output: Path, command: str) -> dict[str, Any]:
    """Make a run, going on where an earlier process was interrupted, and add its line to `output`."""
    if run.method is not None and run.schedule is not None:
        cases = bench.edited(run.method, run.schedule, run.head["seed"], _done(bench, run, run.schedule, output))
    elif run.model is not None:
        cases = bench.asked(run.model, run.model.disable_adapter)
    else:
        cases = bench.asked(bench.base)
    line = finished(run.head, cases, averaged, command)
    with bench.processes.together():
        if bench.processes.first:
            kept(line, output)
            for file in _progress_files(output, run):
                file.unlink(missing_ok=True)
    return line


def kept(line: dict[str, Any], output: Path) -> dict[str, Any]:
    """The line, added to a file."""
    append_result(output, line)
    return line


def finished(
    head: dict[str, Any], cases: list[dict[str, Any]], averaged: Sequence[str], command: str
) -> dict[str, Any]:
    """The result line: what was measured, its means, and every case."""
    line = {"format": FORMAT, **head, "command": command, "scores": scores(cases, averaged)}
    numbers = sorted({case["block"] for case in cases if "block" in case})
    if 1 < len(numbers) < len(cases):
        blocks = [[case for case in cases if case["block"] == number] for number in numbers]
        line["blocks"] = [{"first": block[0]["row"], **scores(block, averaged)} for block in blocks]
    for name in ("kept", "gates"):
        values = [case[name] for case in cases if name in case]
        if values:
            line[name] = mean_of(values)
    return line | {"cases": cases}


def mean_of(values: Sequence[Any]) -> Any:
    """Elementwise mean of equally nested lists and dicts; texts must be equal."""
    first = values[0]
    if isinstance(first, dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: mean_of([value[key] for value in values if key in value]) for key in keys}
    if isinstance(first, list):
        return [mean_of(list(items)) for items in zip(*values, strict=True)]
    return first if isinstance(first, str) else sum(values) / len(values)


def progress_file(output: Path, run: Run, bench: Bench | None = None) -> Path:
    """Where an unfinished run is kept, beside the output; by each process of a bench that splits blocks."""
    alone = bench is None or bench.processes.count == 1 or bench.split == "facts"
    part = "" if bench is None or alone else f".{bench.processes.rank}of{bench.processes.count}"
    return output.with_suffix(".progress") / f"{run.key}{part}.safetensors"


def _progress_files(output: Path, run: Run) -> list[Path]:
    """Those of a run, by however many processes it was begun."""
    return sorted(progress_file(output, run).parent.glob(f"{run.key}*.safetensors"))


def _done(bench: Bench, run: Run, schedule: Schedule, output: Path) -> Progress:
    """What is done of this process's share. Finished blocks count whoever made them; a block under way goes on only in a
    file of the same process, and only if nobody has finished any of its share meanwhile."""
    own = progress_file(output, run, bench)

    def load() -> Progress:
        progress = Progress.load(own)
        missing = {row for block in bench.share(schedule) for row in block} - {case["row"] for case in progress.cases}
        others = [file for file in _progress_files(output, run) if file != own]
        cases = {case["row"]: case for file in others for case in Progress.load(file).cases if case["row"] in missing}
        return Progress(own, progress.cases + [cases[row] for row in sorted(cases)]) if cases else progress

    if bench.split != "facts":
        return load()
    progress = bench.processes.of_first(load)
    return progress if bench.processes.first else replace(progress, file=None)


def split(
    runs: Sequence[Run], output: Path, processes: Processes | None = None
) -> tuple[list[dict[str, Any]], list[Run]]:
    """The lines that `output` holds already, for the first of some processes, and the runs that are left to make."""
    lines = (processes or Processes()).of_first(lambda: done_already(output, [run.key for run in runs]))
    return list(lines.values()), [run for run in runs if run.key not in lines]
