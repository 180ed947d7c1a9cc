"""`baft list`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from peft_baft.benchmark.methods import GROUPS, METHODS, UNEDITED, Method, methods
from peft_baft.benchmark.metrics import MEASURES
from peft_baft.benchmark.tasks import BENCHMARKS, PIQA
from peft_baft.editing.presets import PRESETS, find_preset
from peft_baft_cli.errors import DONE
from peft_baft_cli.screen import print_table


def print_names() -> int:
    """Print the names that other commands take, from the package's tables; return the exit code."""
    print_table(("benchmark", "for `baft bench BENCHMARK`"), list(_benchmarks()))
    print_table(("method", "for --method, with settings if wanted: baft:lr=0.001;r=4"), list(_methods()))
    print_table(("metric", "for --also"), list(_metrics()))
    print_table(("preset", "for --preset"), list(_presets()))
    return DONE


def _benchmarks() -> Iterator[tuple[str, str]]:
    for name, benchmark in BENCHMARKS.items():
        yield (
            name,
            f"its average is of {', '.join(benchmark.averaged)}; trained beside text: {benchmark.unrelated}",
        )
    yield PIQA, "asks a model, or an adapter, as it is; nothing is edited"


def _methods() -> Iterator[tuple[str, str]]:
    yield UNEDITED, "the unedited model"
    for name in METHODS:
        (method,) = methods(name, find_preset("default"))
        if method is not None:
            yield name, _described(method)
    for name, members in GROUPS.items():
        yield name, ", ".join(members)


def _described(method: Method) -> str:
    """Return like `BaftConfig with weighting=basis, beside unrelated text`."""
    settings = ", ".join(f"{key}={value}" for key, value in method.config.items())
    beside = ", beside unrelated text" if method.objective is not None and method.unrelated else ""
    return f"{method.config_class.__name__} with {settings}{beside}"


def _metrics() -> Iterator[tuple[str, str]]:
    for name, metric in MEASURES.items():
        yield name, (metric.__doc__ or "").split("\n")[0]


def _presets() -> Iterator[tuple[str, str]]:
    for name, preset in PRESETS.items():
        settings = preset.config | {key: asdict(preset.descent)[key] for key in ("lr", "max_steps")}
        yield name, ", ".join(f"{key}={value}" for key, value in settings.items())
