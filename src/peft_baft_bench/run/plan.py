"""From what was asked for to result lines: each run is named before it is made, and made once."""

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
from peft_baft_bench.run.results import ResultLine, RunHead, lines_made_already
from peft_baft_bench.run.runner import Runner
from peft_baft_bench.run.schedule import Schedule
from peft_baft_bench.run.scores import scores

ADAPTER = "adapter"
NO_SCHEDULE = {"name": "none", "edits": 0, "batch_size": 0, "when": "after_all"}


@dataclass(frozen=True)
class PlannedRun:
    """A run that is to become one result line.

    Attributes:
        head: what the line will say of how the run was made.
        method, schedule: the edits to make; None for a model that is only asked.
        model: an adapter to ask; None for the model without any.
    """

    head: RunHead
    method: Method | None = None
    schedule: Schedule | None = None
    model: Any = None

    @property
    def title(self) -> str:
        """Name the run for a progress bar."""
        if self.schedule is None:
            return self.head.method
        return f"{self.head.method} T={self.schedule.edits} seed {self.head.seed}"


def plan_runs(
    common: dict[str, Any],
    methods: Sequence[Method | None],
    schedules: Sequence[Schedule],
    seeds: Iterable[int],
) -> list[PlannedRun]:
    """Plan every schedule with every seed and method; once what depends on no seed, such as the unedited model.

    Args:
        common: what all lines share: benchmark, model, data, unrelated, protocol, versions.
        methods: None stands for the unedited model.
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
    settings, described = method.settings.described(), schedule.described()
    seed = seed if method.settings.seeded else 0
    head = RunHead(**common, method=method.name, settings=settings, schedule=described, seed=seed)
    return PlannedRun(head, method, schedule)


def plan_adapter(common: dict[str, Any], name: str, model: PeftModel) -> PlannedRun:
    """Plan to ask an adapter that someone made, of any PEFT type, as it is."""
    config = model.peft_config[model.active_adapter]
    weights = {key: tensor.cpu() for key, tensor in get_peft_model_state_dict(model).items()}
    settings = {
        "adapter": name,
        "peft_type": str(getattr(config.peft_type, "value", config.peft_type)),
        "sha256": short_hash(save(weights)),
    }
    head = RunHead(**common, method=ADAPTER, settings=settings, schedule=NO_SCHEDULE, seed=0)
    return PlannedRun(head, model=model)


def described_protocol(
    template: str, also: Sequence[str], further: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Say how facts are taught and everything is asked, as it stands in a result line.

    Args:
        template: `raw` or `chat`.
        also: names of further metrics and kinds of questions.
        further: how what is beyond the data's own questions is asked and judged, as `Probing.described` says.
    """
    return {
        "template": template,
        "aliases": "first",
        "join": "one space; texts stripped"
        if template == "raw"
        else "chat template, in training and for every question; texts stripped",
        "positions": "prompt end and answer of each probe",
        "generation": {"greedy": True, "stop": "first line break", "extra_tokens": EXTRA_TOKENS},
        "also": list(also),
        **(further or {}),
    }


def perform(
    runner: Runner, run: PlannedRun, averaged: Sequence[str], output: Path, command: str
) -> ResultLine:
    """Make a run, going on where an earlier process was interrupted, and add its line to `output`."""
    if run.method is not None and run.schedule is not None:
        progress = _load_progress(runner, run, run.schedule, output)
        cases = runner.edited(run.method, run.schedule, run.head.seed, progress)
    elif run.model is not None:
        cases = runner.asked(run.model, run.model.disable_adapter)
    else:
        cases = runner.asked(runner.base)
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
    """Make a result line: what was measured, its means, and every case."""
    blocks = None
    numbers = sorted({case["block"] for case in cases if "block" in case})
    if 1 < len(numbers) < len(cases):
        blocks = []
        for number in numbers:
            of_block = [case for case in cases if case["block"] == number]
            blocks.append({"first": of_block[0]["row"], **scores(of_block, averaged)})
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
    """Average equally nested lists and dicts element by element; texts must be equal."""
    first = values[0]
    if isinstance(first, dict):
        keys = dict.fromkeys(key for value in values for key in value)
        return {key: mean_of([value[key] for value in values if key in value]) for key in keys}
    if isinstance(first, list):
        return [mean_of(list(items)) for items in zip(*values, strict=True)]
    return first if isinstance(first, str) else sum(values) / len(values)


def progress_file(output: Path, run: PlannedRun, runner: Runner | None = None) -> Path:
    """Name the file of an unfinished run, beside the output; one for each process where these split blocks."""
    part = ""
    if runner is not None and runner.processes.world_size > 1 and runner.split != "facts":
        part = f".{runner.processes.rank}of{runner.processes.world_size}"
    return output.with_suffix(".progress") / f"{run.head.key}{part}.safetensors"


def _progress_files(output: Path, run: PlannedRun) -> list[Path]:
    """List the files of a run, by however many processes it was begun."""
    return sorted(progress_file(output, run).parent.glob(f"{run.head.key}*.safetensors"))


def _load_progress(runner: Runner, run: PlannedRun, schedule: Schedule, output: Path) -> Progress:
    """Read what is done of this process's share.

    Finished blocks count whoever made them. A block under way goes on only in a file of the same process, and only if nobody
    has finished any of its share meanwhile.
    """
    own_file = progress_file(output, run, runner)

    def load() -> Progress:
        progress = Progress.load(own_file)
        share = {row for block in runner.share(schedule) for row in block}
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


def split_off_made(
    runs: Sequence[PlannedRun], output: Path, processes: Processes | None = None
) -> tuple[list[ResultLine], list[PlannedRun]]:
    """Give the lines of runs that `output` holds already, for the first of some processes, and the runs left to make."""
    wanted = [run.head.key for run in runs]
    lines = (processes or Processes()).on_main(lambda: lines_made_already(output, wanted))
    return list(lines.values()), [run for run in runs if run.head.key not in lines]
