"""Tables from result lines, in Markdown that is readable as plain text, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from textwrap import fill

from peft_baft_bench.report.comparable import Group, Line, Summary, group_comparable, score
from peft_baft_bench.run.scores import standard_error_over_rows
from peft_baft_bench.tasks.tasks import TASKS

FORCED = {
    "reliability": "Rel",
    "generality": "Gen",
    "portability": "Por",
    "locality": "Loc",
    "average": "Avg",
}
ERROR = "average_error"  # for a single seed, over the rows; computed here, since lines do not contain it
BY_TOPIC = {f"{kind}_by_topic": f"{short} by topic" for kind, short in FORCED.items()}
FREE = {
    f"{kind}_{how}": f"{FORCED[kind]} {how}"
    for kind in list(FORCED)[:3]
    for how in ("exact", "prefix", "contains")
}
FREE |= {"locality_text": "Loc text"}
IN_CONTEXT = {
    "in_context": "Ctx",
    "in_context_contains": "Ctx contains",
    "in_context_lowest": "Ctx lowest",
}
NEIGHBOURS = {
    f"neighbour_{what}{how}": f"{short}{how.replace('_', ' ')}"
    for what, short in (("subject", "Nb"), ("relation", "NbRel"))
    for how in ("", "_unchanged", "_spared")
}
AFTERWARDS = {"piqa": "PIQA"}
COST = {
    "steps": "Steps",
    "edit_seconds": "Seconds",
    "learned": "Learned",
    "stored_bytes": "kB stored",
    "peak_bytes": "Peak MB",
}
UNITS = {"stored_bytes": 1e3, "peak_bytes": 1e6}
SHORT = FORCED | {ERROR: "Avg s.e."} | BY_TOPIC | FREE | IN_CONTEXT | NEIGHBOURS | AFTERWARDS | COST
ASKED = {"after_all": "asked after all edits", "immediate": "asked right after each edit"}


@dataclass(frozen=True)
class Table:
    """Rows of text under a header, with a note on what they have in common.

    Args:
        title: what is shown.
        note: what all rows share and how to read them; may be empty.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """Format the table as GitHub Markdown with padded columns."""
        cells = [[_escaped(cell) for cell in row] for row in (self.header, *self.rows)]
        widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(self.header))]
        padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        rows = "\n".join(f"| {' | '.join(row)} |" for row in (padded[0], rule, *padded[1:]))
        note = fill(_escaped(self.note), 120, break_long_words=False, break_on_hyphens=False)
        return "\n\n".join(filter(None, (f"**{_escaped(self.title)}**", rows, note)))

    def csv(self) -> str:
        """Format header and rows as CSV."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows((self.header, *self.rows))
        return text.getvalue()


def tables(lines: Iterable[Line]) -> list[Table]:
    """Create a table for each group of comparable lines.

    A group with several T has two tables: teacher-forced scores with columns for each T, and the other scores
    with rows for each T.
    """
    every_table = []
    for group in group_comparable(lines):
        measures = [name for name in SHORT if name in group.score_names] + sorted(
            group.score_names - set(SHORT)
        )
        if "average" in measures and _single_seeds(group):
            measures.insert(measures.index("average") + 1, ERROR)
        if len(group.edits) == 1:
            every_table.append(_wide(group, measures))
            continue
        forced = [name for name in measures if name in (*FORCED, ERROR)]
        if forced:
            every_table.append(_wide(group, forced))
        rest = [name for name in measures if name not in (*FORCED, ERROR)]
        if rest:
            every_table.append(_long(group, rest))
    return every_table


def _wide(group: Group, measures: Sequence[str]) -> Table:
    """Create a table with a row for each method and a column for each T and score."""
    short = dict(SHORT)
    if "portability" in measures and "generality" not in group.score_names:
        short["reliability"] = (
            "Edit Succ"  # KnowEdit's term, for data sets with KnowEdit's questions
        )
    columns = list(product(group.edits, measures))
    header = []
    for edits, name in columns:
        heading = short.get(name, name)
        header.append(f"T={edits} {heading}" if len(group.edits) > 1 else heading)
    rows = []
    for row in group.rows:
        cells = [_cell(group, row, edits, name) for edits, name in columns]
        rows.append((row, _seeds(group, row), *cells))
    return Table(group.title, ("Method", "Seeds", *header), tuple(rows), _note(group, measures))


def _long(group: Group, measures: Sequence[str]) -> Table:
    """Create a table with a row for each method and T and a column for each score."""
    rows = []
    for row in group.rows:
        for edits in [0] if group.has_no_edits(row) else group.edits:
            seeds = len(group.lines_at(row, edits))
            if seeds:
                cells = [_cell(group, row, edits, name) for name in measures]
                rows.append((row, str(edits or "–"), str(seeds), *cells))
    header = ("Method", "T", "Seeds", *(SHORT.get(name, name) for name in measures))
    return Table(f"{group.title}, further measures", header, tuple(rows), _note(group, measures))


def _cell(group: Group, label: str, edits: int, measure: str) -> str:
    """Format mean and deviation over the seeds, like `.983 ±.004`."""
    value = _standard_error_over_rows if measure == ERROR else score(measure)
    summary: Summary | None = group.summarise(label, edits, value)
    if measure == ERROR and summary is not None and summary.seeds > 1:
        return "–"  # the deviation over seeds is shown with the average
    if summary is None:
        return "–"
    unit = UNITS.get(measure, 1)
    digits = 1 if measure in COST else 3
    digits = {"peak_bytes": 0, "learned": 3}.get(measure, digits)
    shown = [value / unit for value in summary[:2] if value is not None]
    return " ±".join(_number(value, digits) for value in shown)


def _standard_error_over_rows(line: Line) -> float | None:
    averaged = TASKS[line.benchmark].averaged if line.benchmark in TASKS else ()
    return standard_error_over_rows(line.cases, averaged)


def _single_seeds(group: Group) -> bool:
    """Return whether some row of a group has only one seed, for which the standard error over the data's rows is known."""
    for lines in group.rows.values():
        has_one_seed = len({line.seed for line in lines}) == 1
        if has_one_seed and any(_standard_error_over_rows(line) is not None for line in lines):
            return True
    return False


def _seeds(group: Group, label: str) -> str:
    """Return the number of seeds of a row, for each T if they differ."""
    counts = [str(len(group.lines_at(label, edits))) for edits in group.edits]
    return counts[0] if len(set(counts)) == 1 else "/".join(counts)


def _note(group: Group, measures: Sequence[str]) -> str:
    """Describe what all rows share, and how to read them."""
    batch_size = group.sample.schedule["batch_size"]
    sentences = [f"{_shared(group)}."]
    sentences += _meanings(group.sample.benchmark, set(measures))
    if any(len(group.lines_at(row, edits)) > 1 for row, edits in product(group.rows, group.edits)):
        sentences.append("a ±b: mean and sample standard deviation over seeds.")
    if batch_size > 1:
        sentences.append(f"T counts batches of {batch_size}.")
    unfinished = _left_out(group)
    if unfinished:
        sentences.append(f"Whole blocks only: {unfinished}.")
    if group.repeated:
        sentences.append(f"Left out: {group.repeated} lines of runs with a later line.")
    return " ".join(sentences)


def _meanings(benchmark: str, measures: set[str]) -> list[str]:
    """Explain the scores in the table."""
    sentences = []
    if measures & set(FORCED):
        sentences.append(
            "Rel (Edit Succ), Gen, Por: share of the answer's tokens predicted, given those before; "
            "Loc: as before the edit."
        )
    averaged = TASKS[benchmark].averaged if benchmark in TASKS else ()
    if averaged and "average" in measures:
        sentences.append(f"Avg: mean of {', '.join(FORCED[name] for name in averaged)}.")
    if ERROR in measures:
        sentences.append(
            "Avg s.e.: its standard error over the rows of the data, for a single seed."
        )
    if measures & set(BY_TOPIC):
        sentences.append("by topic: mean over topics, each over the rows that have it.")
    if measures & set(FREE):
        sentences.append(
            "exact, prefix: share of freely generated answers that are, or begin with, the right one; "
            "text: as before the edit."
        )
    if measures & set(UNITS):
        sentences.append(
            "kB stored: for all edits of a block together; Peak MB: peak memory while editing, model included."
        )
    if measures & set(IN_CONTEXT):
        sentences.append(
            "contains: a freely generated statement contains the new answer and not the old one; Ctx: in contexts that the "
            "edit was not taught in, lowest: in the worst of them."
        )
    if measures & set(NEIGHBOURS):
        sentences.append(
            "Nb: the edit's question about other subjects, NbRel: other questions about its subject: share of tokens as "
            "before the edit; unchanged: identical text; spared: without the new answer."
        )
    return sentences


def _shared(group: Group) -> str:
    """Describe the model, data and way of asking that all rows have in common."""
    line = group.sample
    model, data, schedule = line.model, line.data, line.schedule
    ranges = {edits: "{}:{}".format(*group.rows_at(edits)) for edits in group.edits}
    rows = ranges[schedule["edits"]]
    if len(set(ranges.values())) > 1:
        rows = ", ".join(f"{range_at} at T={edits}" for edits, range_at in ranges.items())
    parts = [
        f"Model {model['name']} ({model['dtype']}, {model['fingerprint']})",
        f"{data['file']} ({data['sha256']}) rows {rows}",
        f"template {line.protocol['template']}",
    ]
    if schedule["edits"]:
        parts += [
            f"unrelated text {(line.unrelated or {}).get('file', 'none')}",
            ASKED[schedule["when"]],
        ]
    return "; ".join(parts)


def _left_out(group: Group) -> str:
    """List the T at which the blocks do not fill the rows, with the number of edited rows."""
    parts = []
    for edits in filter(None, group.edits):
        first, last = group.rows_at(edits)
        unfinished = (last - first) % (edits * group.sample.schedule["batch_size"])
        if unfinished:
            parts.append(f"{last - first - unfinished} of {last - first} rows at T={edits}")
    return ", ".join(parts)


def _number(value: float, digits: int) -> str:
    """Format a number; with three digits, without the zero before the point, as in papers."""
    text = f"{value:.{digits}f}"
    return text.replace("0.", ".", 1) if digits == 3 and text.lstrip("-").startswith("0.") else text


def _escaped(text: str) -> str:
    """Put a text on one line and escape the characters that would end a cell."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
