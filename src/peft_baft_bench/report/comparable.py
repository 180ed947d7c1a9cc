"""Which result lines may be compared, and what a row of them amounts to over its seeds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import mean, stdev
from typing import Any, NamedTuple

from peft_baft_bench.run.results import ResultLine

Line = ResultLine
Value = Callable[[Line], float | None]
# Parts of a protocol that say what is asked beside the data's own questions.
FURTHER = ("also", "free_rule", "piqa", "probes")
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
        """All lines, row by row."""
        return [line for row in self.rows.values() for line in row]

    @property
    def edits(self) -> list[int]:
        """Every T, rising; [0] where nothing is edited."""
        return sorted({line.schedule["edits"] for line in self.lines} - {0}) or [0]

    @property
    def sample(self) -> Line:
        """A line with the largest T, to read off what all share."""
        return max(self.lines, key=lambda line: line.schedule["edits"])

    def rows_at(self, edits: int) -> list[int]:
        """First and last (excluded) row of the data at one T."""
        return next(line.data["rows"] for line in self.lines if line.schedule["edits"] == edits)

    @property
    def schedule(self) -> str:
        """single, continual or batched; none where nothing is edited. T=1 is the first step of a ladder, if there is one."""
        return self.sample.schedule["name"]

    @property
    def title(self) -> str:
        """Benchmark, model, schedule, and T if there is one alone."""
        parts = [self.sample.benchmark, self.sample.model["name"]]
        if self.schedule == "batched":
            parts.append(f"batches of {self.sample.schedule['batch_size']}")
        elif self.schedule != "none":
            parts.append(f"{self.schedule} editing")
        if len(self.edits) == 1 and self.schedule not in ("none", "single"):
            parts.append(f"T={self.edits[0]}")
        return ", ".join(filter(None, parts))

    @property
    def score_names(self) -> set[str]:
        """Every score that some line has."""
        return {name for line in self.lines for name in line.scores}

    def fixed(self, label: str) -> bool:
        """Tell whether a row's model is not edited here, so that it has no T."""
        return not any(line.schedule["edits"] for line in self.rows[label])

    def at(self, label: str, edits: int) -> list[Line]:
        """List a row's lines at one T; those of a model that is not edited here count at every T."""
        return [line for line in self.rows[label] if line.schedule["edits"] in (edits, 0)]

    def summary(self, label: str, edits: int, value: Value) -> Summary | None:
        """Over the seeds of a row at one T; None where no line has the value."""
        return summary(value(line) for line in self.at(label, edits))


def summary(values: Iterable[float | None]) -> Summary | None:
    """Average the values, with their deviation, of those that are there; None if none is."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    deviation = stdev(present) if len(present) > 1 else None
    return Summary(mean(present), deviation, len(present))


def score(name: str) -> Value:
    """Make a function that reads one score off a line; None where it is absent or no number."""

    def read(line: Line) -> float | None:
        value = line.scores.get(name)
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
    asked_further = _asked_further(lines)
    keys = [
        (_key(question_of(line), asked_further(line), rows_of(line)), _editing(line))
        for line in lines
    ]
    members: dict[tuple[str, str], list[Line]] = {key: [] for key in keys}
    for line, (question, editing) in zip(lines, keys, strict=True):
        for (question_of_group, editing_of_group), group in members.items():
            # A line without editing, such as the unedited model's, belongs to every group of its question.
            if question == question_of_group and editing in ("", editing_of_group):
                group.append(line)
    questions_with_edits = {question for question, editing in members if editing}
    groups = []
    for (question, editing), group in members.items():
        if editing or question not in questions_with_edits:
            groups.append(_group(group))
    return groups


def question_of(line: Line) -> str:
    """Identify what is asked of which model, but for the rows."""
    model, data = line.model, line.data
    return _key(line.benchmark, data["sha256"], asking_of(line), model["fingerprint"])


def _ladders(lines: Sequence[Line]) -> Callable[[Line], list[int]]:
    """Make a function that gives what stands for a line's rows in the comparison.

    A ladder is a series of T of one question and one way of editing that begins at one row and has one range of rows at each T.
    All its lines get the longest range, so that they are compared; any other line has the rows it has.
    """
    # The ranges of rows at each T.
    ranges: dict[tuple[str, str], dict[int, set[tuple[int, int]]]] = {}
    for line in lines:
        edits = line.schedule["edits"]
        if edits:
            ranges_at = ranges.setdefault((question_of(line), _editing(line)), {})
            ranges_at.setdefault(edits, set()).add(tuple(line.data["rows"]))

    def rows_of(line: Line) -> list[int]:
        ranges_at = ranges.get((question_of(line), _editing(line)), {})
        every_range = [rows for rows_at in ranges_at.values() for rows in rows_at]
        starts = {first for first, _ in every_range}
        is_ladder = len(starts) == 1 and len(every_range) == len(ranges_at)
        if not is_ladder:
            return line.data["rows"]
        return [*starts, max(last for _, last in every_range)]

    return rows_of


def asking_of(line: Line) -> str:
    """Identify the way in which questions are asked, without what is asked further, which changes none of the others."""
    protocol = {key: value for key, value in line.protocol.items() if key not in FURTHER}
    return _key(protocol, line.model["tokenizer"])


def _asked_further(lines: Sequence[Line]) -> Callable[[Line], dict[str, Any]]:
    """Make a function that gives those parts of what a line asks further that keep it apart from others.

    Lines that ask nothing further may stand beside those that do. But where two lines of one question ask the same kind in
    different ways, in other frames say, nothing may be averaged over them, and every way has a group of its own.
    """
    ways: dict[str, dict[str, set[str]]] = {}
    for line in lines:
        ways_of_question = ways.setdefault(question_of(line), {})
        for part, way in _parts_asked_further(line).items():
            ways_of_question.setdefault(part, set()).add(_key(way))

    def asked_further(line: Line) -> dict[str, Any]:
        several = {part for part, found in ways[question_of(line)].items() if len(found) > 1}
        parts = _parts_asked_further(line)
        return {part: parts.get(part) for part in sorted(several)}

    return asked_further


def _parts_asked_further(line: Line) -> dict[str, Any]:
    rule = line.protocol.get("free_rule")
    return line.protocol.get("probes", {}) | ({} if rule is None else {"free_rule": rule})


def _editing(line: Line) -> str:
    """Identify how the edits were made, but for T; empty for a model that is not edited here."""
    schedule = line.schedule
    if not schedule["edits"]:
        return ""
    unrelated = line.unrelated or {}
    return _key(
        unrelated.get("sha256", unrelated.get("file")), schedule["batch_size"], schedule["when"]
    )


def _group(lines: Sequence[Line]) -> Group:
    """Label the rows, each method with each of its settings, and take every run once: the last line that tells it."""
    # By method and settings; then by T and seed.
    runs: dict[tuple[str, str], dict[tuple[int, int], Line]] = {}
    for line in lines:
        runs_of_row = runs.setdefault((_name(line), _key(settings_of(line))), {})
        runs_of_row[line.schedule["edits"], line.seed] = line
    rows = [list(runs_of_row.values()) for runs_of_row in runs.values()]
    settings_of_name: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        settings_of_name.setdefault(_name(row[0]), []).append(settings_of(row[0]))
    labelled = {}
    for row in rows:
        name = _name(row[0])
        labelled[label(name, settings_of(row[0]), settings_of_name[name])] = row
    return Group(labelled, len(lines) - sum(len(row) for row in labelled.values()))


def label(name: str, settings: dict[str, Any], alike: Sequence[dict[str, Any]]) -> str:
    """Make the label of a row: the name, and where it stands for several settings (`alike`), those in which they differ."""
    differing = [key for key in settings if len({_key(other.get(key)) for other in alike}) > 1]
    text = ", ".join(f"{key.rpartition('.')[2]}={_plain(settings[key])}" for key in differing)
    return f"{name} ({text})" if text else name


def settings_of(line: Line) -> dict[str, Any]:
    """Settings in one level, `config.r`, without those that are None; of the two descents the one that was used."""
    unused = "descent" if line.schedule["batch_size"] > 1 else "batch_descent"
    flat: dict[str, Any] = {}
    for part, values in line.settings.items():
        if part == unused:
            continue
        if isinstance(values, dict):
            flat |= {f"{part}.{key}": value for key, value in values.items()}
        else:
            flat[part] = values
    return {key: value for key, value in flat.items() if value is not None}


def _name(line: Line) -> str:
    """Name the method, or an adapter that someone made by its own name."""
    return str(line.settings.get("adapter") or NAMES.get(line.method, line.method))


def _plain(value: Any) -> str:
    """Write a setting as the command line takes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _key(*values: Any) -> str:
    """Make a text that is equal for equal JSON values."""
    return json.dumps(values, sort_keys=True)
