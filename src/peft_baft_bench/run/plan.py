"""Plan runs, perform them and write result lines.

A run's key identifies it before it starts, so that it is made only once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save

from peft_baft.evaluation.scoring import EXTRA_TOKENS
from peft_baft.loading import short_hash
from peft_baft.processes import Processes
from peft_baft.storage import append_line
from peft_baft_bench.methods.methods import UNEDITED, Method
from peft_baft_bench.run.progress import Progress
from peft_baft_bench.run.results import ResultLine, RunHead, find_finished
from peft_baft_bench.run.runner import Runner
from peft_baft_bench.run.schedule import Schedule
from peft_baft_bench.run.scores import scores

ADAPTER = "adapter"
RAW_JOIN = "one space; texts stripped"
CHAT_JOIN = "chat template, in training and for every question; texts stripped"
NO_SCHEDULE = {"name": "none", "edits": 0, "batch_size": 0, "when": "after_all"}


@dataclass(frozen=True)
class PlannedRun:
    """A run that will produce one result line.

    Attributes:
        head: the part of the line that describes how the run is made.
        method, schedule: the edits to make; None for a model that is only asked.
        model: an adapter model to ask; None for the unedited model.
    """

    head: RunHead
    method: Method | None = None
    schedule: Schedule | None = None
    model: PeftModel | None = None

    @property
    def title(self) -> str:
        """The label of the run in a progress bar."""
        if self.schedule is None:
            return self.head.method
        return f"{self.head.method} T={self.schedule.edits} seed {self.head.seed}"


def plan_runs(
    common: dict[str, Any],
    methods: Sequence[Method | None],
    schedules: Sequence[Schedule],
    seeds: Iterable[int],
) -> list[PlannedRun]:
    """Plan every combination of schedule, seed and method.

    Runs that do not depend on the seed are planned once.

    Args:
        common: the fields shared by all lines: benchmark, model, data, unrelated, protocol, versions.
        methods: the methods; None stands for the unedited model.
    """
    runs: dict[str, PlannedRun] = {}
    chosen_seeds = list(seeds)
    for schedule in schedules:
        for seed in chosen_seeds:
            for method in methods:
                run = _planned_run(common, method, schedule, seed)
                runs[run.head.key] = run
    return list(runs.values())


def _planned_run(
    common: dict[str, Any], method: Method | None, schedule: Schedule, seed: int
) -> PlannedRun:
    if method is None:
        return PlannedRun(
            RunHead(**common, method=UNEDITED, settings={}, schedule=NO_SCHEDULE, seed=0)
        )
    settings, described = method.settings.describe(), schedule.describe()
    seed = seed if method.settings.seeded else 0
    head = RunHead(**common, method=method.name, settings=settings, schedule=described, seed=seed)
    return PlannedRun(head, method, schedule)


def plan_adapter(common: dict[str, Any], name: str, model: PeftModel) -> PlannedRun:
    """Plan to ask an existing adapter of any PEFT type."""
    config = model.peft_config[model.active_adapter]
    weights = {key: tensor.cpu() for key, tensor in get_peft_model_state_dict(model).items()}
    settings = {
        "adapter": name,
        "peft_type": str(getattr(config.peft_type, "value", config.peft_type)),
        "sha256": short_hash(save(weights)),
    }
    head = RunHead(**common, method=ADAPTER, settings=settings, schedule=NO_SCHEDULE, seed=0)
    return PlannedRun(head, model=model)


def describe_protocol(
    template: str, also: Sequence[str], further: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Describe how facts are taught and questions are asked, for a result line.

    Args:
        template: `raw` or `chat`.
        also: names of further metrics and kinds of questions.
        further: how questions beyond the data's own are asked and judged, as returned by `Probing.describe`.
    """
    return {
        "template": template,
        "aliases": "first",
        "join": RAW_JOIN if template == "raw" else CHAT_JOIN,
        "positions": "prompt end and answer of each probe",
        "generation": {"greedy": True, "stop": "first line break", "extra_tokens": EXTRA_TOKENS},
        "also": list(also),
        **(further or {}),
    }


def perform_run(
    runner: Runner, run: PlannedRun, averaged: Sequence[str], output: Path, command: str
) -> ResultLine:
    """Perform a run, resuming it if an earlier process was interrupted, and append its line to `output`."""
    if run.method is not None and run.schedule is not None:
        progress = _load_progress(runner, run, run.schedule, output)
        cases = runner.edit_and_ask(run.method, run.schedule, run.head.seed, progress)
    elif run.model is not None:
        cases = runner.ask_model(run.model, run.model.disable_adapter)
    else:
        cases = runner.ask_model(runner.base)
    line = result_line(run.head, cases, averaged, command)
    with runner.processes.barrier():
        if runner.processes.is_main:
            append_line(output, line.to_json())
            for file in _progress_files(output, run):
                file.unlink(missing_ok=True)
    return line


def result_line(
    head: RunHead, cases: list[dict[str, Any]], averaged: Sequence[str], command: str
) -> ResultLine:
    """Create a result line with the scores, the scores per block, and every case."""
    blocks = None
    numbers = sorted({case["block"] for case in cases if "block" in case})
    if 1 < len(numbers) < len(cases):
        blocks = []
        for number in numbers:
            block = [case for case in cases if case["block"] == number]
            blocks.append({"first": block[0]["row"], **scores(block, averaged)})
    means: dict[str, Any] = {}
    for name in ("kept", "gates"):
        values = [case[name] for case in cases if name in case]
        if values:
            means[name] = mean_of(values)
    return ResultLine(
        **vars(head),
        command=command,
        scores=scores(cases, averaged),
        cases=cases,
        blocks=blocks,
        **means,
    )


def mean_of(values: Sequence[Any]) -> Any:
    """Average equally nested lists and dicts element by element; strings must be equal."""
    first = values[0]
    if isinstance(first, dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: mean_of([value[key] for value in values if key in value]) for key in keys}
    if isinstance(first, list):
        return [mean_of(list(items)) for items in zip(*values, strict=True)]
    return first if isinstance(first, str) else sum(values) / len(values)


def progress_file(output: Path, run: PlannedRun, runner: Runner | None = None) -> Path:
    """Return the path of the file of an unfinished run, next to the output; one per process where they split blocks."""
    part = ""
    if runner is not None and runner.processes.world_size > 1 and runner.split != "facts":
        part = f".{runner.processes.rank}of{runner.processes.world_size}"
    return output.with_suffix(".progress") / f"{run.head.key}{part}.safetensors"


def _progress_files(output: Path, run: PlannedRun) -> list[Path]:
    """List the progress files of a run, for any number of processes."""
    return sorted(progress_file(output, run).parent.glob(f"{run.head.key}*.safetensors"))


def _load_progress(runner: Runner, run: PlannedRun, schedule: Schedule, output: Path) -> Progress:
    """Load what is done of this process's share.

    Finished blocks count, whichever process made them. An unfinished block is resumed only from this
    process's own file, and only if no other process has finished blocks of its share in the meantime.
    """
    own_file = progress_file(output, run, runner)

    def load() -> Progress:
        progress = Progress.load(own_file)
        share = {row for block in runner.own_blocks(schedule) for row in block}
        missing = share - {case["row"] for case in progress.cases}
        made_by_others: dict[int, dict[str, Any]] = {}
        for file in _progress_files(output, run):
            if file != own_file:
                cases = Progress.load(file).cases
                made_by_others |= {case["row"]: case for case in cases if case["row"] in missing}
        if not made_by_others:
            return progress
        return Progress(
            own_file, progress.cases + [made_by_others[row] for row in sorted(made_by_others)]
        )

    if runner.split != "facts":
        return load()
    progress = runner.processes.on_main(load)
    return progress if runner.processes.is_main else replace(progress, file=None)


def split_off_finished(
    runs: Sequence[PlannedRun], output: Path, processes: Processes | None = None
) -> tuple[list[ResultLine], list[PlannedRun]]:
    """Return the lines of runs that `output` already contains (in the first process only), and the runs that remain."""
    wanted = [run.head.key for run in runs]
    lines = (processes or Processes()).on_main(lambda: find_finished(output, wanted))
    return list(lines.values()), [run for run in runs if run.head.key not in lines]
