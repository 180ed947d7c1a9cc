"""`baft list`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass
from typing import Any

from peft_baft.editing.presets import PRESETS, find_preset
from peft_baft_bench.methods.methods import GROUPS, METHODS, UNEDITED
from peft_baft_bench.metrics.metrics import METRICS
from peft_baft_bench.questions.probing import FURTHER_KINDS
from peft_baft_bench.tasks.tasks import TASKS
from peft_baft_cli.errors import DONE
from peft_baft_cli.options import ListCommand
from peft_baft_cli.screen import print_table


def print_names(_options: ListCommand) -> int:
    """Print the names that other commands take; return the exit code."""
    print_table(("benchmark", "for `baft bench BENCHMARK`"), list(_benchmarks()))
    print_table(
        ("method", "for --method, with optional settings: baft:lr=0.001;r=4"), list(_methods())
    )
    print_table(("metric", "for --also"), list(_metrics()))
    print_table(("preset", "for --preset"), list(_presets()))
    return DONE


def _benchmarks() -> Iterator[tuple[str, str]]:
    for name, task in TASKS.items():
        yield name, task.description


def _methods() -> Iterator[tuple[str, str]]:
    yield UNEDITED, "the unedited model"
    for name, settings_with in METHODS.items():
        yield name, _summary(settings_with(find_preset("plain")))
    for name, members in GROUPS.items():
        yield name, f"each of {', '.join(members)}"


def _summary(settings: Any) -> str:
    """Return a method's settings, without those of its training, in one line; if it has none, its docstring's first line."""
    parts = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, dict):
            parts += [f"{name}={entry}" for name, entry in value.items()]
        elif isinstance(value, type):
            parts.append(value.__name__)
        elif value is not None and not is_dataclass(value):
            parts.append(f"{field.name}={value}")
    return ", ".join(parts) or (settings.__doc__ or "").split("\n")[0]


def _metrics() -> Iterator[tuple[str, str]]:
    for name, metric in METRICS.items():
        yield name, (metric.__doc__ or "").split("\n")[0]
    yield from FURTHER_KINDS.items()


def _presets() -> Iterator[tuple[str, str]]:
    for name, preset in PRESETS.items():
        settings = preset.config | {key: asdict(preset.descent)[key] for key in ("lr", "max_steps")}
        yield name, ", ".join(f"{key}={value}" for key, value in settings.items())
