"""Result lines to figures. Needs matplotlib, which comes with `pip install 'peft-baft[plot]'`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import ceil
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import TYPE_CHECKING, Any

from peft_baft.benchmark.report.comparable import (
    Group,
    Line,
    Summary,
    Value,
    asking_of,
    comparable,
    label,
    score,
    summary,
)
from peft_baft.benchmark.report.plot_style import STYLE, UNEDITED, Look, add_legend, look, new_figure, plain
from peft_baft.benchmark.tasks import REPHRASED, TASKS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEASURES = ("reliability", "generality", "portability", "locality", "average", "accuracy")
PANELS = {"edit": "Edited prompts", "generality": "Rephrasings", "locality": "Unrelated prompts"}


def draw_all(lines: Iterable[Line], folder: str | Path) -> list[Path]:
    """Draw every figure that the lines allow, as PNG.

    Returns:
        The files, named `benchmark-schedule-kind.png`, with a number where there are several.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
    except ImportError:
        raise ImportError("Figures need matplotlib: pip install 'peft-baft[plot]'") from None
    files: list[Path] = []
    taken: Counter[str] = Counter()
    Path(folder).mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        for name, figure in figures(lines):
            taken[name] += 1
            files.append(Path(folder) / (f"{name}.png" if taken[name] == 1 else f"{name}-{taken[name]}.png"))
            figure.savefig(files[-1])
    return files


def figures(lines: Iterable[Line]) -> Iterator[tuple[str, Figure]]:
    """Every figure that the lines allow, with a name, one after the other."""
    groups = comparable(lines)
    edited = dict.fromkeys(row for group in groups for row, (line, *_) in group.rows.items() if line["settings"])
    looks = {row: look(i) for i, row in enumerate(edited)}  # the same in every figure
    for group in groups:
        name = f"{group.sample['benchmark']}-{group.schedule}"
        styles = {row: looks.get(row, UNEDITED) for row in group.rows}
        if group.measures & set(MEASURES):
            yield f"{name}-scores", ladder(group, styles) if len(group.edits) > 1 else bars(group, styles)
        if "locality" in group.measures and _effects(group):
            yield f"{name}-tradeoff", tradeoff(group, styles)
        for row, members in group.rows.items():
            for line in filter(lambda line: line.get("gates"), members):
                title = f"{group.title}\n{row}, T={line['schedule']['edits']}, seed {line['seed']}"
                yield f"{name}-gates", gates(line["gates"], title)
    cut = [group for group in groups if any(line.get("kept") for line in group.lines)]
    for asked in dict.fromkeys(map(_asked, cut)):
        yield "redundancy", redundancy([group for group in cut if _asked(group) == asked])


def ladder(group: Group, styles: dict[str, Look]) -> Figure:
    """Every measure against T, a curve for each row: the paper's Fig. 3."""
    measures = _measures(group)
    figure = new_figure(_title(group), 1.2 * ceil(len(measures) / 2))
    panels = figure.subplots(ceil(len(measures) / 2), 2, sharey=True, squeeze=False).flatten()
    for axes in panels[-2:]:
        axes.set_xlabel(_steps(group))
    for axes, measure in zip(panels, measures, strict=False):
        axes.set(title=measure.capitalize(), xscale="log", ylim=(0, 1.04), yticks=(0, 0.25, 0.5, 0.75, 1))
        axes.set_xticks(group.edits, map(str, group.edits))
        axes.minorticks_off()
        for row, style in styles.items():
            found = {edits: group.summary(row, edits, score(measure)) for edits in group.edits}
            _curve(axes, found, style | ({"marker": "", "linewidth": 0.8} if group.fixed(row) else {}))
    for axes in panels[len(measures) :]:
        axes.remove()
    add_legend(figure, styles)
    return figure


def tradeoff(group: Group, styles: dict[str, Look]) -> Figure:
    """What an edit achieves against what it leaves alone, a curve through the T of each row; larger marks for larger T."""
    effects, several = _effects(group), len(group.edits) > 1
    styles = {row: style | ({} if several else {"linestyle": ""}) for row, style in styles.items()}
    sizes = {edits: 3.4 + 1.2 * i for i, edits in enumerate(group.edits)} if several else {group.edits[0]: 4.0}
    figure = new_figure(_title(group), 2.2)
    axes = figure.subplots()
    axes.set(xlabel="Locality", ylabel=" + ".join(name.capitalize() for name in effects))
    if len(effects) > 1:
        axes.set_ylabel(f"({axes.get_ylabel()}) / {len(effects)}")
    axes.locator_params(nbins=6)
    for row, style in styles.items():
        places = list(sizes)[: 1 if group.fixed(row) else None]
        found = [[group.summary(row, t, value) for value in (score("locality"), _effect(effects))] for t in places]
        _path(axes, [(x, y, size) for (x, y), size in zip(found, sizes.values(), strict=False) if x and y], style)
    dot = UNEDITED | {"marker": "o", "linestyle": ""}
    grey = {f"T={edits}": dot | {"markersize": size} for edits, size in sizes.items()}
    add_legend(figure, styles | (grey if several else {}))
    return figure


def bars(group: Group, styles: dict[str, Look]) -> Figure:
    """Every measure at one T, a bar for each row."""
    measures, edits = _measures(group), group.edits[0]
    figure = new_figure(_title(group), 0.3 + 0.17 * len(styles))
    for axes, measure in zip(figure.subplots(1, len(measures), sharey=True, squeeze=False)[0], measures, strict=True):
        axes.set(title=measure.capitalize(), xlim=(0, 1), xticks=(0, 0.5, 1))
        axes.set_xticklabels(("0", ".5", "1"))
        axes.set_yticks(range(len(styles)), [fill(plain(row), 24) for row in styles])
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        for place, (row, style) in enumerate(styles.items()):
            if (found := group.summary(row, edits, score(measure))) is not None:
                spread = {"xerr": found.deviation, "error_kw": {"elinewidth": 0.8}}
                axes.barh(place, found.mean, 0.7, color=style["color"], **spread)
                axes.text(1.06, place, f"{found.mean:.3f}".lstrip("0"), va="center", fontsize=6)
    axes.invert_yaxis()
    return figure


def redundancy(groups: Sequence[Group]) -> Figure:
    """Reliability after the M least used dimensions were taken away, a curve for each data set: the paper's Fig. 1."""
    curves = [curve for group in groups for curve in _redundancy_curves(group)]
    labels = [label(name, told, [other for same, other, _ in curves if same == name]) for name, told, _ in curves]
    # an adapter's curve may come from several groups
    shown = {text: kept for text, (_, _, kept) in zip(labels, curves, strict=True)}
    styles = {text: look(i) for i, text in enumerate(shown)}
    methods = dict.fromkeys(told["method"] for _, told, _ in curves)
    title = ", ".join((groups[0].sample["model"]["name"], *methods)) + _seeds(map(len, shown.values()))
    figure = new_figure(title, 1.9)
    axes = figure.subplots()
    axes.set(xlabel="Dimensions taken away, the least used first", ylabel="Reliability", ylim=(0, 1.04))
    for text, kept in shown.items():
        _curve(axes, {m: summary(values) for m, values in enumerate(zip(*kept, strict=True))}, styles[text])
    axes.set_xticks(_thinned(max(len(kept[0]) for kept in shown.values())))
    add_legend(figure, styles)
    return figure


def _redundancy_curves(group: Group) -> Iterator[tuple[str, dict[str, Any], list[list[float]]]]:
    """For each row and T: the benchmark, what tells the curve from others of the same, and each seed's r+1 values."""
    for row, members in group.rows.items():
        lines = [line for line in members if line.get("kept")]
        for edits in sorted({line["schedule"]["edits"] for line in lines}):
            line, *others = (line for line in lines if line["schedule"]["edits"] == edits)
            told = {"method": row, "T": edits, **line["data"], "unrelated": line.get("unrelated", {}).get("file")}
            told |= {key: line["schedule"][key] for key in ("batch_size", "when")}
            yield line["benchmark"], told, [_kept(seed["kept"]) for seed in (line, *others)]


def gates(found: dict[str, Any], title: str) -> Figure:
    """Mean gate of every basis in every block, a panel for each kind of prompt: the paper's Fig. 2."""
    kinds = [kind for kind in PANELS if found.get(kind)]
    top = max(value for kind in kinds for block in found[kind] for value in block)
    names = [str(block).rpartition(".")[2] for block in found["blocks"]]
    figure = new_figure(title, len(kinds) * (0.35 + min(2.0, 0.15 * len(names))))
    panels = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for axes, kind in zip(panels, kinds, strict=True):
        image = axes.imshow(found[kind], vmin=0, vmax=top, cmap="viridis", aspect="auto")
        axes.set(title=PANELS[kind], ylabel="Block")
        axes.set_yticks(_thinned(len(names)), [names[i] for i in _thinned(len(names))])
        axes.set_xticks(ticks := _thinned(len(found[kind][0])), [str(k + 1) for k in ticks])
        axes.grid(visible=False)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    panels[-1].set_xlabel("Basis")
    figure.colorbar(image, ax=list(panels), label="Mean gate", aspect=30).outline.set_visible(False)
    return figure


def _curve(axes: Axes, points: dict[int, Summary | None], style: Look) -> None:
    """Means, with a band of one standard deviation where there are several seeds."""
    found = {place: value for place, value in points.items() if value is not None}
    means, spread = [value.mean for value in found.values()], [value.deviation or 0 for value in found.values()]
    axes.plot(list(found), means, clip_on=False, **style)
    if any(spread):
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(list(found), low, high, color=style["color"], alpha=0.18, linewidth=0)


def _path(axes: Axes, points: Sequence[tuple[Summary, Summary, float]], style: Look) -> None:
    """A curve through points of two means, each with a mark of its size and a cross of one standard deviation."""
    axes.plot([x.mean for x, _, _ in points], [y.mean for _, y, _ in points], **style | {"marker": ""})
    for x, y, size in points:
        mark = style | {"linestyle": "", "markersize": size}
        axes.errorbar(x.mean, y.mean, y.deviation, x.deviation, elinewidth=0.6, **mark)


def _effects(group: Group) -> list[str]:
    """The measures of an edit's effect: of those in the average, all but locality."""
    task = TASKS.get(group.sample["benchmark"])
    averaged = REPHRASED if task is None else task.averaged  # a benchmark of the user's own may not be registered here
    return [name for name in averaged if name != "locality" and name in group.measures]


def _effect(names: Sequence[str]) -> Value:
    """Reads the mean of several scores off a line; None where one is absent."""

    def read(line: Line) -> float | None:
        values = [value for name in names if (value := score(name)(line)) is not None]
        return mean(values) if len(values) == len(names) else None

    return read


def _kept(values: dict[str, float] | list[float]) -> list[float]:
    """For M = 0...r."""
    return [values[m] for m in sorted(values, key=int)] if isinstance(values, dict) else values


def _asked(group: Group) -> tuple[str, str]:
    """Equal for data sets whose curves may stand beside each other."""
    return asking_of(group.sample), group.sample["model"]["fingerprint"]


def _measures(group: Group) -> list[str]:
    return [name for name in MEASURES if name in group.measures]


def _steps(group: Group) -> str:
    size = group.sample["schedule"]["batch_size"]
    return "T edits" if size == 1 else f"T batches of {size}"


def _title(group: Group) -> str:
    return group.title + _seeds(len(group.at(row, edits)) for row in group.rows for edits in group.edits)


def _seeds(counts: Iterable[int]) -> str:
    """What bands, crosses and the lines at bars show, if there are any."""
    several = sorted({*counts} - {0, 1})
    return f"; ±1 sd of {' or '.join(map(str, several))} seeds" if several else ""


def _thinned(count: int) -> list[int]:
    """At most 13 places out of so many."""
    return list(range(0, count, ceil(count / 13)))
