"""Group result lines that may be compared, and average the lines of a row over its seeds."""

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
# Parts of a protocol about questions beyond the data's own.
OPTIONAL_PARTS = ("also", "free_rule", "piqa", "probes")
NAMES = {"none": "unedited"}  # labels that differ from the method's name


class Summary(NamedTuple):
    """Mean over the seeds of a row, their sample standard deviation (None for one seed), and the number of seeds."""

    mean: float
    deviation: float | None
    seeds: int


@dataclass(frozen=True)
class Group:
    """Lines that may be compared.

    Args:
        rows: lines by the label of their method and settings, one per seed and T.
        repeated: how many lines were left out because a later one is of the same run.
    """

    rows: dict[str, list[Line]]
    repeated: int = 0

    @property
    def lines(self) -> list[Line]:
        """All lines, row by row."""
        return [line for row in self.rows.values() for line in row]

    @property
    def edits(self) -> list[int]:
        """Every T in ascending order; [0] where nothing is edited."""
        return sorted({line.schedule["edits"] for line in self.lines} - {0}) or [0]

    @property
    def sample(self) -> Line:
        """A line with the largest T, for reading the properties that all lines share."""
        return max(self.lines, key=lambda line: line.schedule["edits"])

    def rows_at(self, edits: int) -> list[int]:
        """Return the first and last (excluded) row of the data at one T."""
        return next(line.data["rows"] for line in self.lines if line.schedule["edits"] == edits)

    @property
    def schedule(self) -> str:
        """single, continual or batched; none where nothing is edited. For a ladder, that of the largest T."""
        return str(self.sample.schedule["name"])

    @property
    def title(self) -> str:
        """Benchmark, model, schedule, and T if there is only one."""
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
        """The names of all scores in the lines."""
        return {name for line in self.lines for name in line.scores}

    def has_no_edits(self, label: str) -> bool:
        """Return whether a row's model is not edited in these runs, so that it has no T."""
        return not any(line.schedule["edits"] for line in self.rows[label])

    def lines_at(self, label: str, edits: int) -> list[Line]:
        """List a row's lines at one T; those of a model that is not edited are included at every T."""
        return [line for line in self.rows[label] if line.schedule["edits"] in (edits, 0)]

    def summarise(self, label: str, edits: int, value: Value) -> Summary | None:
        """Summarise a value over the seeds of a row at one T; None where no line has the value."""
        return summarise(value(line) for line in self.lines_at(label, edits))


def summarise(values: Iterable[float | None]) -> Summary | None:
    """Compute the mean and deviation of the values that are not None; None if there are none."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    deviation = stdev(present) if len(present) > 1 else None
    return Summary(mean(present), deviation, len(present))


def score(name: str) -> Value:
    """Return a function that reads one score from a line; it returns None if the score is absent or not a finite number."""

    def read(line: Line) -> float | None:
        value = line.scores.get(name)
        return float(value) if isinstance(value, int | float) and isfinite(value) else None

    return read


def group_comparable(lines: Iterable[Line]) -> list[Group]:
    """Group lines that share benchmark, model, data, protocol, unrelated text, batch size and time of asking.

    All T of a ladder, T=1 included, are in one group. This also holds if a smaller T was measured on only the
    first rows, since lines of different T are never averaged. Lines of a model that is not edited (the
    unedited model, an adapter) are in every group with their questions, or in a separate group if there is
    none.
    """
    lines = list(lines)
    rows_of = _ladders(lines)
    asked_further = _asked_further(lines)
    keys = [
        (_key(question_key(line), asked_further(line), rows_of(line)), _editing(line))
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


def question_key(line: Line) -> str:
    """Identify what is asked of which model, except for the rows."""
    model, data = line.model, line.data
    return _key(line.benchmark, data["sha256"], protocol_key(line), model["fingerprint"])


def _ladders(lines: Sequence[Line]) -> Callable[[Line], list[int]]:
    """Return a function that maps a line to the rows by which it is compared.

    A ladder is a series of T with the same questions and the same way of editing, which all begin at the same
    row and have one range of rows per T. All its lines are mapped to the longest range, so that they are
    compared; any other line is mapped to its own rows.
    """
    # By T, the ranges of rows.
    ranges: dict[tuple[str, str], dict[int, set[tuple[int, int]]]] = {}
    for line in lines:
        edits = line.schedule["edits"]
        if edits:
            ranges_at = ranges.setdefault((question_key(line), _editing(line)), {})
            ranges_at.setdefault(edits, set()).add(tuple(line.data["rows"]))

    def rows_of(line: Line) -> list[int]:
        ranges_at = ranges.get((question_key(line), _editing(line)), {})
        every_range = [rows for rows_at in ranges_at.values() for rows in rows_at]
        starts = {first for first, _ in every_range}
        is_ladder = len(starts) == 1 and len(every_range) == len(ranges_at)
        if not is_ladder:
            return list(line.data["rows"])
        return [*starts, max(last for _, last in every_range)]

    return rows_of


def protocol_key(line: Line) -> str:
    """Identify how questions are asked, except for further questions, which do not affect the others."""
    protocol = {key: value for key, value in line.protocol.items() if key not in OPTIONAL_PARTS}
    return _key(protocol, line.model["tokenizer"])


def _asked_further(lines: Sequence[Line]) -> Callable[[Line], dict[str, Any]]:
    """Return a function that extracts those further questions of a line that distinguish it from others.

    Lines without further questions may be compared with lines that have some. But if two lines ask the same
    kind of question in different ways, for example in different frames, they must not be averaged, and each
    way has its own group.
    """
    ways: dict[str, dict[str, set[str]]] = {}
    for line in lines:
        ways_of_question = ways.setdefault(question_key(line), {})
        for part, way in _parts_asked_further(line).items():
            ways_of_question.setdefault(part, set()).add(_key(way))

    def asked_further(line: Line) -> dict[str, Any]:
        several = {part for part, found in ways[question_key(line)].items() if len(found) > 1}
        parts = _parts_asked_further(line)
        return {part: parts.get(part) for part in sorted(several)}

    return asked_further


def _parts_asked_further(line: Line) -> dict[str, Any]:
    rule = line.protocol.get("free_rule")
    probes: dict[str, Any] = line.protocol.get("probes", {})
    return probes | ({} if rule is None else {"free_rule": rule})


def _editing(line: Line) -> str:
    """Identify how the edits were made, except for T; empty for a model that is not edited."""
    schedule = line.schedule
    if not schedule["edits"]:
        return ""
    unrelated = line.unrelated or {}
    return _key(
        unrelated.get("sha256", unrelated.get("file")), schedule["batch_size"], schedule["when"]
    )


def _group(lines: Sequence[Line]) -> Group:
    """Label the rows, one for each method and settings, and keep the last line of each run."""
    # By method and settings; then by T and seed.
    runs: dict[tuple[str, str], dict[tuple[int, int], Line]] = {}
    for line in lines:
        runs_of_row = runs.setdefault((_name(line), _key(flat_settings(line))), {})
        runs_of_row[line.schedule["edits"], line.seed] = line
    rows = [list(runs_of_row.values()) for runs_of_row in runs.values()]
    settings_of_name: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        settings_of_name.setdefault(_name(row[0]), []).append(flat_settings(row[0]))
    labelled = {}
    for row in rows:
        name = _name(row[0])
        labelled[label(name, flat_settings(row[0]), settings_of_name[name])] = row
    return Group(labelled, len(lines) - sum(len(row) for row in labelled.values()))


def label(name: str, settings: dict[str, Any], alike: Sequence[dict[str, Any]]) -> str:
    """Return the label of a row: its name, and the settings in which it differs from others of that name (`alike`)."""
    differing = [key for key in settings if len({_key(other.get(key)) for other in alike}) > 1]
    text = ", ".join(f"{key.rpartition('.')[2]}={_plain(settings[key])}" for key in differing)
    return f"{name} ({text})" if text else name


def flat_settings(line: Line) -> dict[str, Any]:
    """Flatten the settings to keys like `config.r`, without None, and only with the descent that was used."""
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
    """Return the method's name, or the name of the adapter that was asked."""
    return str(line.settings.get("adapter") or NAMES.get(line.method, line.method))


def _plain(value: Any) -> str:
    """Format a setting as on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def _key(*values: Any) -> str:
    """Return a text that is equal for equal JSON values."""
    return json.dumps(values, sort_keys=True)
