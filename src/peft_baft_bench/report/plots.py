"""Figures from result lines. Requires matplotlib: `pip install 'peft-baft[plot]'`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import ceil, log10
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import TYPE_CHECKING, Any, NamedTuple

from peft_baft_bench.report.comparable import (
    Group,
    Line,
    Summary,
    Value,
    group_comparable,
    label,
    protocol_key,
    score,
    summarise,
)
from peft_baft_bench.report.plot_style import (
    STYLE,
    UNEDITED,
    Look,
    add_legend,
    look,
    new_figure,
    plain,
)
from peft_baft_bench.tasks.tasks import REPHRASED, TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SCORES = ("reliability", "generality", "portability", "locality", "average", "accuracy")
BYTES = {"1 kB": 1e3, "100 kB": 1e5, "10 MB": 1e7}
PANELS = {"edit": "Edited prompts", "generality": "Rephrasings", "locality": "Unrelated prompts"}


def draw_all(lines: Iterable[Line], folder: str | Path) -> list[Path]:
    """Draw every figure that the lines allow, as PNG.

    Returns:
        The files, named `benchmark-schedule-kind.png`, with a number if there are several.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
    except ImportError:
        raise ImportError("Figures need matplotlib: pip install 'peft-baft[plot]'") from None
    files: list[Path] = []
    counts: Counter[str] = Counter()
    Path(folder).mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        for name, figure in figures(lines):
            counts[name] += 1
            number = "" if counts[name] == 1 else f"-{counts[name]}"
            files.append(Path(folder) / f"{name}{number}.png")
            figure.savefig(files[-1])
    return files


# Panel titles for methods that select an edit per prompt, by the name of the score.
ROUTER_TITLES = {
    "routed_recall": "Rephrasings answered by their edit",
    "routed_wrong": "Rephrasings answered by another edit",
    "routed_locality": "Unrelated questions answered by an edit",
    "routed_portability": "Questions about consequences, by an edit",
    "routed_neighbour_subject": "Other subject, same relation: by an edit",
    "routed_neighbour_relation": "Same subject, other relation: by an edit",
}


def figures(lines: Iterable[Line]) -> Iterator[tuple[str, Figure]]:
    """Yield a name and a figure for every figure that the lines allow."""
    groups = group_comparable(lines)
    looks = _looks(groups)
    for group in groups:
        name = f"{group.sample.benchmark}-{group.schedule}"
        styles = {row: looks.get(row, UNEDITED) for row in group.rows}
        if group.score_names & set(SCORES):
            yield (
                f"{name}-scores",
                ladder(group, styles) if len(group.edits) > 1 else bars(group, styles),
            )
        if group.score_names & set(ROUTER_TITLES):
            routed = {row: style for row, style in styles.items() if _has_router(group, row)}
            yield f"{name}-router", ladder(group, routed, ROUTER_TITLES)
        if "locality" in group.score_names and _effects(group):
            yield f"{name}-tradeoff", tradeoff(group, styles)
        for row, lines_of_row in group.rows.items():
            for line in lines_of_row:
                if line.gates:
                    title = f"{group.title}\n{row}, T={line.schedule['edits']}, seed {line.seed}"
                    yield f"{name}-gates", gates(line.gates, title)
    with_removals = [group for group in groups if any(line.kept for line in group.lines)]
    for question in dict.fromkeys(map(_question, with_removals)):
        yield (
            "redundancy",
            redundancy([group for group in with_removals if _question(group) == question]),
        )


def _looks(groups: Sequence[Group]) -> dict[str, Look]:
    """Assign each edited row a style that is the same in every figure; rows without settings are the unedited model's."""
    edited_rows: list[str] = []
    for group in groups:
        for row, lines in group.rows.items():
            if lines[0].settings and row not in edited_rows:
                edited_rows.append(row)
    return {row: look(i) for i, row in enumerate(edited_rows)}


def _has_router(group: Group, row: str) -> bool:
    """Return whether a row's method selects an edit per prompt."""
    return any(set(line.scores) & set(ROUTER_TITLES) for line in group.rows[row])


def ladder(
    group: Group, styles: dict[str, Look], titles: Mapping[str, str] | None = None
) -> Figure:
    """Draw every score against T, with a curve for each row: the paper's Fig. 3.

    Args:
        titles: titles of the panels by the name of the score; by default the main scores.
    """
    titles = titles or {measure: measure.capitalize() for measure in _measures(group)}
    measures = [measure for measure in titles if measure in group.score_names]
    panel_rows = ceil(len(measures) / 2)
    figure = new_figure(_title(group), 1.2 * panel_rows)
    panels = figure.subplots(panel_rows, 2, sharey=True, squeeze=False).flatten()
    for axes in panels[-2:]:
        axes.set_xlabel(_steps(group))
    for axes, measure in zip(panels, measures, strict=False):
        axes.set(
            title=titles[measure], xscale="log", ylim=(0, 1.04), yticks=(0, 0.25, 0.5, 0.75, 1)
        )
        axes.set_xticks(group.edits, map(str, group.edits))
        axes.minorticks_off()
        for row, style in styles.items():
            summaries = {
                edits: group.summarise(row, edits, score(measure)) for edits in group.edits
            }
            _curve(
                axes,
                summaries,
                style | ({"marker": "", "linewidth": 0.8} if group.has_no_edits(row) else {}),
            )
    for axes in panels[len(measures) :]:
        axes.remove()
    add_legend(figure, styles)
    return figure


def tradeoff(group: Group, styles: dict[str, Look]) -> Figure:
    """Draw the effect of edits against locality, with a curve through the T of each row.

    Larger markers mean larger T. With only one T, the size of a marker shows the bytes stored per edit, where
    the lines have them.
    """
    effects, several = _effects(group), len(group.edits) > 1
    if several:
        sizes = {edits: 3.4 + 1.2 * i for i, edits in enumerate(group.edits)}
    else:
        sizes = {group.edits[0]: 4.0}
        # A single point is not a curve.
        styles = {row: style | {"linestyle": ""} for row, style in styles.items()}
    figure = new_figure(_title(group), 2.2)
    axes = figure.subplots()
    axes.set(xlabel="Locality", ylabel=" + ".join(name.capitalize() for name in effects))
    if len(effects) > 1:
        axes.set_ylabel(f"({axes.get_ylabel()}) / {len(effects)}")
    axes.locator_params(nbins=6)
    for row, style in styles.items():
        points = []
        for edits, size in list(sizes.items())[: 1 if group.has_no_edits(row) else None]:
            x = group.summarise(row, edits, score("locality"))
            y = group.summarise(row, edits, _effect(effects))
            if x and y:
                stored = None if several else group.summarise(row, edits, score("stored_bytes"))
                points.append((x, y, size if stored is None else _size(stored.mean / edits)))
        _path(axes, points, style)
    dot = UNEDITED | {"marker": "o", "linestyle": ""}
    grey = {f"T={edits}": dot | {"markersize": size} for edits, size in sizes.items()}
    if not several and "stored_bytes" in group.score_names:
        grey = {
            f"{text} per edit": dot | {"markersize": _size(size)} for text, size in BYTES.items()
        }
    elif not several:
        grey = {}
    add_legend(figure, styles | grey)
    return figure


def _size(stored: float) -> float:
    """Return the size of a marker for a number of bytes, which grows linearly with its logarithm."""
    return 2.0 + 1.2 * max(0.0, log10(max(stored, 1.0)) - 2)


def bars(group: Group, styles: dict[str, Look]) -> Figure:
    """Draw every score at one T, with a bar for each row."""
    measures, edits = _measures(group), group.edits[0]
    figure = new_figure(_title(group), 0.3 + 0.17 * len(styles))
    for axes, measure in zip(
        figure.subplots(1, len(measures), sharey=True, squeeze=False)[0], measures, strict=True
    ):
        axes.set(title=measure.capitalize(), xlim=(0, 1), xticks=(0, 0.5, 1))
        axes.set_xticklabels(("0", ".5", "1"))
        axes.set_yticks(range(len(styles)), [fill(plain(row), 24) for row in styles])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        for place, (row, style) in enumerate(styles.items()):
            over_seeds = group.summarise(row, edits, score(measure))
            if over_seeds is not None:
                spread = {"xerr": over_seeds.deviation, "error_kw": {"elinewidth": 0.8}}
                axes.barh(place, over_seeds.mean, 0.7, color=style["color"], **spread)
                axes.text(
                    1.06, place, f"{over_seeds.mean:.3f}".lstrip("0"), va="center", fontsize=6
                )
    axes.invert_yaxis()
    return figure


def redundancy(groups: Sequence[Group]) -> Figure:
    """Draw reliability without the M least used dimensions, with a curve for each data set: the paper's Fig. 1."""
    curves = [curve for group in groups for curve in _removal_curves(group)]
    # By label, since an adapter's curve may be in several groups.
    shown: dict[str, RemovalCurve] = {}
    for curve in curves:
        alike = [other.distinguishing for other in curves if other.benchmark == curve.benchmark]
        shown[label(curve.benchmark, curve.distinguishing, alike)] = curve
    styles = {text: look(i) for i, text in enumerate(shown)}
    methods = dict.fromkeys(curve.distinguishing["method"] for curve in curves)
    seeds = _seeds(len(curve.seeds) for curve in shown.values())
    figure = new_figure(", ".join((groups[0].sample.model["name"], *methods)) + seeds, 1.9)
    axes = figure.subplots()
    axes.set(
        xlabel="Dimensions removed, the least used first", ylabel="Reliability", ylim=(0, 1.04)
    )
    for text, curve in shown.items():
        by_removed = enumerate(zip(*curve.seeds, strict=True))
        _curve(axes, {removed: summarise(values) for removed, values in by_removed}, styles[text])
    axes.set_xticks(_thinned(max(len(curve.seeds[0]) for curve in shown.values())))
    add_legend(figure, styles)
    return figure


class RemovalCurve(NamedTuple):
    """Reliability of one row at one T as dimensions are removed.

    Attributes:
        benchmark: its name.
        distinguishing: properties that may distinguish the curve from others of the same benchmark.
        seeds: for each seed, r + 1 values, for M = 0 to r.
    """

    benchmark: str
    distinguishing: dict[str, Any]
    seeds: list[list[float]]


def _removal_curves(group: Group) -> Iterator[RemovalCurve]:
    """Yield a curve for each row and T that has values."""
    for row, lines_of_row in group.rows.items():
        lines_at: dict[int, list[Line]] = {}
        for line in lines_of_row:
            if line.kept:
                lines_at.setdefault(line.schedule["edits"], []).append(line)
        for edits, lines in sorted(lines_at.items()):
            first = lines[0]
            distinguishing = {"method": row, "T": edits, **first.data}
            distinguishing["unrelated"] = (first.unrelated or {}).get("file")
            distinguishing |= {key: first.schedule[key] for key in ("batch_size", "when")}
            yield RemovalCurve(
                first.benchmark, distinguishing, [_kept(line.kept) for line in lines if line.kept]
            )


def gates(values: dict[str, Any], title: str) -> Figure:
    """Draw the mean gate of every basis vector in every block, with a panel per kind of prompt (paper, Fig. 2).

    Args:
        values: as returned by `mean_gates`.
    """
    kinds = [kind for kind in PANELS if values.get(kind)]
    top = max(max(block) for kind in kinds for block in values[kind])
    names = [str(block).rpartition(".")[2] for block in values["blocks"]]
    block_ticks, basis_ticks = _thinned(len(names)), _thinned(len(values[kinds[0]][0]))
    figure = new_figure(title, len(kinds) * (0.35 + min(2.0, 0.15 * len(names))))
    panels = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for axes, kind in zip(panels, kinds, strict=True):
        image = axes.imshow(values[kind], vmin=0, vmax=top, cmap="viridis", aspect="auto")
        axes.set(title=PANELS[kind], ylabel="Block")
        axes.set_yticks(block_ticks, [names[i] for i in block_ticks])
        axes.set_xticks(basis_ticks, [str(k + 1) for k in basis_ticks])
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    panels[-1].set_xlabel("Basis")
    figure.colorbar(image, ax=list(panels), label="Mean gate", aspect=30).outline.set_visible(False)
    return figure


def _curve(axes: Axes, points: dict[int, Summary | None], style: Look) -> None:
    """Draw means, with a band of one standard deviation where there are several seeds."""
    present = {place: value for place, value in points.items() if value is not None}
    places, means = list(present), [value.mean for value in present.values()]
    deviations = [value.deviation or 0 for value in present.values()]
    axes.plot(places, means, clip_on=False, **style)
    if any(deviations):
        low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
        high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
        axes.fill_between(places, low, high, color=style["color"], alpha=0.18, linewidth=0)


def _path(axes: Axes, points: Sequence[tuple[Summary, Summary, float]], style: Look) -> None:
    """Draw a curve through points (x, y, marker size), with error bars of one standard deviation."""
    axes.plot(
        [x.mean for x, _, _ in points], [y.mean for _, y, _ in points], **style | {"marker": ""}
    )
    for x, y, size in points:
        mark = style | {"linestyle": "", "markersize": size}
        axes.errorbar(x.mean, y.mean, y.deviation, x.deviation, elinewidth=0.6, **mark)


def _effects(group: Group) -> list[str]:
    """List the scores of an edit's effect: those in the average, except locality."""
    task = TASKS.get(group.sample.benchmark)
    # A user's own benchmark may not be registered when the figures are drawn.
    averaged = REPHRASED if task is None else task.averaged
    return [name for name in averaged if name != "locality" and name in group.score_names]


def _effect(names: Sequence[str]) -> Value:
    """Return a function that computes the mean of several scores of a line; None if one is absent."""

    def read(line: Line) -> float | None:
        values = [score(name)(line) for name in names]
        present = [value for value in values if value is not None]
        return mean(present) if len(present) == len(names) else None

    return read


def _kept(values: dict[str, float] | list[float]) -> list[float]:
    """List the values for M = 0 … r; older result lines store them as a dict by M."""
    if isinstance(values, dict):
        return [values[removed] for removed in sorted(values, key=int)]
    return values


def _question(group: Group) -> tuple[str, str]:
    """Identify the model and the way of asking; data sets with equal keys may share a figure."""
    return protocol_key(group.sample), group.sample.model["fingerprint"]


def _measures(group: Group) -> list[str]:
    return [name for name in SCORES if name in group.score_names]


def _steps(group: Group) -> str:
    batch_size = group.sample.schedule["batch_size"]
    return "T edits" if batch_size == 1 else f"T batches of {batch_size}"


def _title(group: Group) -> str:
    return group.title + _seeds(
        len(group.lines_at(row, edits)) for row in group.rows for edits in group.edits
    )


def _seeds(counts: Iterable[int]) -> str:
    """Describe bands and error bars for a title; empty if there are none."""
    several = sorted({*counts} - {0, 1})
    return f"; ±1 sd of {' or '.join(map(str, several))} seeds" if several else ""


def _thinned(count: int) -> list[int]:
    """Choose at most 13 of `count` positions for the ticks of an axis."""
    return list(range(0, count, ceil(count / 13)))
