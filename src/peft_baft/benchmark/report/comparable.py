"""Which result lines may be compared, and what a row of them amounts to over its seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import mean, stdev
from typing import Any, NamedTuple

Line = dict[str, Any]
Value = Callable[[Line], float | None]
NAMES = {"none": "unedited"}  # a line's method to a row's label, where they differ


class Summary(NamedTuple):
    """Over the seeds of a row: their mean, their sample standard deviation (None for one seed), and how many they are."""

    mean: float
    deviation: float | None
    seeds: int


@dataclass(frozen=True)
class Group:
    """Lines that may be compared.

    Args:
        rows: lines by the label of their method and settings, each seed at each T once.
        repeated: how many lines were left out because a later one tells the same run.
    """

    rows: dict[str, list[Line]]
    repeated: int = 0

    @property
    def lines(self) -> list[Line]:
        return [line for row in self.rows.values() for line in row]

    @property
    def edits(self) -> list[int]:
        """Every T, rising; [0] where nothing is edited."""
        return sorted({line["schedule"]["edits"] for line in self.lines} - {0}) or [0]

    @property
    def sample(self) -> Line:
        """A line with the largest T, to read off what all share."""
        return max(self.lines, key=lambda line: line["schedule"]["edits"])

    def rows_at(self, edits: int) -> list[int]:
        """First and last (excluded) row of the data at one T."""
        return next(line["data"]["rows"] for line in self.lines if line["schedule"]["edits"] == edits)

    @property
    def schedule(self) -> str:
        """single, continual or batched; none where nothing is edited. T=1 is the first step of a ladder, if there is one."""
        return self.sample["schedule"]["name"]

    @property
    def title(self) -> str:
        """Benchmark, model, schedule, and T if there is one alone."""
        size = self.sample["schedule"]["batch_size"]
        editing = {"none": "", "batched": f"batches of {size}"}.get(self.schedule, f"{self.schedule} editing")
        alone = f"T={self.edits[0]}" if len(self.edits) == 1 and self.schedule not in ("none", "single") else ""
        return ", ".join(filter(None, (self.sample["benchmark"], self.sample["model"]["name"], editing, alone)))

    @property
    def measures(self) -> set[str]:
        """Every score that some line has."""
        return {name for line in self.lines for name in line["scores"]}

    def fixed(self, label: str) -> bool:
        """Whether a row's model is not edited here, so that it has no T."""
        return not any(line["schedule"]["edits"] for line in self.rows[label])

    def at(self, label: str, edits: int) -> list[Line]:
        """A row's lines at one T; those of a model that is not edited here count at every T."""
        return [line for line in self.rows[label] if line["schedule"]["edits"] in (edits, 0)]

    def summary(self, label: str, edits: int, value: Value) -> Summary | None:
        """Over the seeds of a row at one T; None where no line has the value."""
        return summary(value(line) for line in self.at(label, edits))


def summary(values: Iterable[float | None]) -> Summary | None:
    """Mean and deviation of the values that are there; None if none is."""
    found = [value for value in values if value is not None]
    return Summary(mean(found), stdev(found) if len(found) > 1 else None, len(found)) if found else None


def score(name: str) -> Value:
    """Reads one score off a line; None where it is absent or no number."""

    def read(line: Line) -> float | None:
        value = line["scores"].get(name)
        return float(value) if isinstance(value, int | float) and isfinite(value) else None

    return read


def comparable(lines: Iterable[Line]) -> list[Group]:
    """Sort lines into groups of the same benchmark, model, data, protocol, unrelated text, batch size and time of asking.

    Every T of a ladder is in one group, T=1 included, also where a smaller T was measured on fewer of the first rows, since a
    T is never averaged with another. Lines of a model that is not edited here (the unedited one, an adapter) belong to
    every group of their question, and make one of their own where there is none.
    """
    lines = list(lines)
    rows_of = _ladders(lines)
    questions = [_key(question_of(line), rows_of(line)) for line in lines]
    keys = [(question, _editing(line)) for question, line in zip(questions, lines, strict=True)]
    groups: dict[tuple[str, str], list[Line]] = {key: [] for key in keys}
    edited = {question for question, editing in groups if editing}
    for line, (own, how) in zip(lines, keys, strict=True):
        for (question, editing), members in groups.items():
            if question == own and how in ("", editing):
                members.append(line)
    return [_group(members) for (question, editing), members in groups.items() if editing or question not in edited]


def question_of(line: Line) -> str:
    """What is asked of which model, but for the rows."""
    model, data = line["model"], line["data"]
    return _key(line["benchmark"], data["sha256"], asking_of(line), model["fingerprint"])


def _ladders(lines: Sequence[Line]) -> Callable[[Line], list[int]]:
    """What stands for a line's rows: the same for every T of a ladder that begins at one row and has one range at each T."""
    ranges: dict[tuple[str, str], dict[int, set[tuple[int, int]]]] = {}
    for line in (line for line in lines if line["schedule"]["edits"]):
        steps = ranges.setdefault((question_of(line), _editing(line)), {})
        steps.setdefault(line["schedule"]["edits"], set()).add(tuple(line["data"]["rows"]))

    def rows_of(line: Line) -> list[int]:
        found = ranges.get((question_of(line), _editing(line)), {}).values()
        starts = {first for step in found for first, _ in step}
        ladder = len(starts) == 1 and all(len(step) == 1 for step in found)
        return [*starts, max(last for step in found for _, last in step)] if ladder else line["data"]["rows"]

    return rows_of


def asking_of(line: Line) -> str:
    """How is asked. Left out are the further measures, which change none of the others."""
    protocol = {key: value for key, value in line["protocol"].items() if key != "also"}
    return _key(protocol, line["model"]["tokenizer"])


def _editing(line: Line) -> str:
    """How the edits were made, but for T; empty for a model that is not edited here."""
    schedule, unrelated = line["schedule"], line.get("unrelated", {})
    text = unrelated.get("sha256", unrelated.get("file"))
    return _key(text, schedule["batch_size"], schedule["when"]) if schedule["edits"] else ""


def _group(lines: Sequence[Line]) -> Group:
    """Label the rows, each method with each settings, and take every run once: the last line that tells it."""
    rows: dict[tuple[str, str], dict[tuple[int, int], Line]] = {}
    for line in lines:
        runs = rows.setdefault((_name(line), _key(settings_of(line))), {})
        runs[line["schedule"]["edits"], line["seed"]] = line
    found = [(name, list(runs.values())) for (name, _), runs in rows.items()]
    settings = [(name, settings_of(row[0])) for name, row in found]
    labelled = {
        label(name, own, [other for n, other in settings if n == name]): row
        for (name, own), (_, row) in zip(settings, found, strict=True)
    }
    return Group(labelled, len(lines) - sum(len(row) for row in labelled.values()))


def label(name: str, settings: dict[str, Any], alike: Sequence[dict[str, Any]]) -> str:
    """The name, and where it stands for several settings (`alike`), those in which they differ."""
    own = [key for key in settings if len({_key(other.get(key)) for other in alike}) > 1]
    text = ", ".join(f"{key.rpartition('.')[2]}={_plain(settings[key])}" for key in own)
    return f"{name} ({text})" if text else name


def settings_of(line: Line) -> dict[str, Any]:
    """Settings in one level, `config.r`, without those that are None; of the two descents the one that was used."""
    unused = "descent" if line["schedule"]["batch_size"] > 1 else "batch_descent"
    flat: dict[str, Any] = {}
    for part, values in line["settings"].items():
        if part != unused:
            flat |= (
                {f"{part}.{key}": value for key, value in values.items()}
                if isinstance(values, dict)
                else {part: values}
            )
    return {key: value for key, value in flat.items() if value is not None}


def _name(line: Line) -> str:
    """The method; an adapter's own name."""
    return str(line["settings"].get("adapter") or NAMES.get(line["method"], line["method"]))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _key(*values: Any) -> str:
    return json.dumps(values, sort_keys=True)
