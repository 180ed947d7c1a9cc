"""Result lines to tables, in Markdown that reads as plain text too, and with commas."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from textwrap import fill

from peft_baft.benchmark.report.comparable import Group, Line, Summary, comparable, score
from peft_baft.benchmark.results import read_results as read_lines
from peft_baft.benchmark.tasks import TASKS

__all__ = ["Table", "read_lines", "tables"]

FORCED = {"reliability": "Rel", "generality": "Gen", "portability": "Por", "locality": "Loc", "average": "Avg"}
BY_TOPIC = {f"{kind}_by_topic": f"{short} by topic" for kind, short in FORCED.items()}
FREE = {f"{kind}_{how}": f"{FORCED[kind]} {how}" for kind in list(FORCED)[:3] for how in ("exact", "prefix")}
FREE |= {"locality_text": "Loc text"}
COST = {"steps": "Steps", "edit_seconds": "Seconds", "learned": "Learned"}
SHORT = FORCED | BY_TOPIC | FREE | COST
ASKED = {"after_all": "asked after all edits", "immediate": "asked right after each edit"}


@dataclass(frozen=True)
class Table:
    """Rows of text under a header, with what they have in common.

    Args:
        title: what is shown. note: what all rows share and how to read them; empty for none.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """The table in GitHub's Markdown, its columns padded."""
        cells = [[_escaped(cell) for cell in row] for row in (self.header, *self.rows)]
        widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(self.header))]
        padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        rows = "\n".join(f"| {' | '.join(row)} |" for row in (padded[0], rule, *padded[1:]))
        note = fill(_escaped(self.note), 120, break_long_words=False, break_on_hyphens=False)
        return "\n\n".join(filter(None, (f"**{_escaped(self.title)}**", rows, note)))

    def csv(self) -> str:
        """Header and rows with commas between; quoted where a cell needs it."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows((self.header, *self.rows))
        return text.getvalue()


def tables(lines: Iterable[Line]) -> list[Table]:
    """A table for each group of comparable lines.

    Where a group has several T, these make columns of the teacher-forced scores, and rows of a second table for the rest.
    """
    made = []
    for group in comparable(lines):
        measures = [name for name in SHORT if name in group.measures] + sorted(group.measures - set(SHORT))
        forced = [name for name in measures if name in FORCED]
        rest = [name for name in measures if name not in FORCED]
        if len(group.edits) == 1:
            made.append(_wide(group, measures))
        else:
            made += [_wide(group, forced)] * bool(forced) + [_long(group, rest)] * bool(rest)
    return made


def _wide(group: Group, measures: Sequence[str]) -> Table:
    """A row for each method, with a column for each T and measure."""
    columns = [(edits, name) for edits in group.edits for name in measures]
    short = SHORT | (
        {} if "generality" in group.measures or "portability" not in measures else {"reliability": "Edit Succ"}
    )
    ladder = len(group.edits) > 1
    header = [f"T={edits} {short.get(name, name)}" if ladder else short.get(name, name) for edits, name in columns]
    rows = [(row, _seeds(group, row), *(_cell(group, row, *column) for column in columns)) for row in group.rows]
    return Table(group.title, ("Method", "Seeds", *header), tuple(rows), _note(group, measures))


def _long(group: Group, measures: Sequence[str]) -> Table:
    """A row for each method and T, with a column for each measure."""
    pairs = [
        (row, edits)
        for row in group.rows
        for edits in ([0] if group.fixed(row) else group.edits)
        if group.at(row, edits)
    ]
    cells = [[_cell(group, row, edits, name) for name in measures] for row, edits in pairs]
    heads = [(row, str(edits or "–"), str(len(group.at(row, edits)))) for row, edits in pairs]
    rows = tuple((*head, *values) for head, values in zip(heads, cells, strict=True))
    header = ("Method", "T", "Seeds", *(SHORT.get(name, name) for name in measures))
    return Table(f"{group.title}, further measures", header, rows, _note(group, measures))


def _cell(group: Group, label: str, edits: int, measure: str) -> str:
    """Like `.983 ±.004`."""
    summary: Summary | None = group.summary(label, edits, score(measure))
    if summary is None:
        return "–"
    digits = 1 if measure in ("steps", "edit_seconds") else 3
    return " ±".join(_number(value, digits) for value in summary[:2] if value is not None)


def _seeds(group: Group, label: str) -> str:
    """How many seeds a row has; for each T where they differ."""
    counts = [str(len(group.at(label, edits))) for edits in group.edits]
    return counts[0] if len(set(counts)) == 1 else "/".join(counts)


def _note(group: Group, measures: Sequence[str]) -> str:
    """What all rows share, and how to read them."""
    line, size = group.sample, group.sample["schedule"]["batch_size"]
    averaged = TASKS[line["benchmark"]].averaged if line["benchmark"] in TASKS else ()
    notes: dict[str, set[str]] = {
        "Rel (Edit Succ), Gen, Por: share of the answer's tokens predicted, given those before; Loc: as before the edit.": set(
            FORCED
        ),
        f"Avg: mean of {', '.join(FORCED[name] for name in averaged)}.": {"average"} if averaged else set(),
        "by topic: mean over topics, each over the rows that have it.": set(BY_TOPIC),
        "exact, prefix: share of freely generated answers that are, or begin with, the right one; text: as before the edit.": set(
            FREE
        ),
    }
    told = [f"{_shared(group)}.", *(note for note, about in notes.items() if about & set(measures))]
    many = any(len(group.at(row, edits)) > 1 for row in group.rows for edits in group.edits)
    told += ["a ±b: mean and sample standard deviation over seeds."] * many
    told += [f"T counts batches of {size}."] * (size > 1)
    told += [f"Whole blocks only: {_left_out(group)}."] * bool(_left_out(group))
    told += [f"Left out: {group.repeated} lines of runs that a later line tells too."] * bool(group.repeated)
    return " ".join(told)


def _shared(group: Group) -> str:
    line = group.sample
    model, data, schedule = line["model"], line["data"], line["schedule"]
    ranges = {edits: "{}:{}".format(*group.rows_at(edits)) for edits in group.edits}
    steps = ", ".join(f"{rows} at T={edits}" for edits, rows in ranges.items())
    parts = [
        f"Model {model['name']} ({model['dtype']}, {model['fingerprint']})",
        f"{data['file']} ({data['sha256']}) rows {steps if len(set(ranges.values())) > 1 else ranges[schedule['edits']]}",
        f"template {line['protocol']['template']}",
    ]
    if schedule["edits"]:
        parts += [f"unrelated text {line.get('unrelated', {}).get('file', 'none')}", ASKED[schedule["when"]]]
    return "; ".join(parts)


def _left_out(group: Group) -> str:
    """The T whose blocks do not fill the rows, with how many rows were edited."""
    told = []
    for edits in filter(None, group.edits):
        first, last = group.rows_at(edits)
        unfinished = (last - first) % (edits * group.sample["schedule"]["batch_size"])
        if unfinished:
            told.append(f"{last - first - unfinished} of {last - first} rows at T={edits}")
    return ", ".join(told)


def _number(value: float, digits: int) -> str:
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if digits == 3 and text.lstrip("-").startswith("0.") else text


def _escaped(text: str) -> str:
    """In one line, with the characters that would end a cell told apart."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
