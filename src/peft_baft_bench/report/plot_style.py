"""The style of the figures: sized for a column of half a page, and readable with colour vision deficiency."""

from __future__ import annotations

from math import ceil
from textwrap import fill, wrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Look = dict[str, Any]  # arguments of matplotlib's Line2D

WIDTH = 3.4  # inches: half a page
LETTERS = 72  # characters per line
STYLE: Any = {
    "font.size": 7, "axes.titlesize": 7, "axes.labelsize": 7, "figure.titlesize": 7, "legend.fontsize": 6.5,
    "xtick.labelsize": 6.5, "ytick.labelsize": 6.5, "axes.linewidth": 0.6, "xtick.major.width": 0.6,
    "ytick.major.width": 0.6, "xtick.major.size": 2.5, "ytick.major.size": 2.5, "lines.linewidth": 1.1,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.axisbelow": True,
    "grid.linewidth": 0.4, "grid.color": "#DDDDDD", "legend.frameon": False, "legend.handlelength": 2.4,
    "legend.columnspacing": 1.2, "axes.titlelocation": "left", "savefig.dpi": 300,
}  # fmt: skip
# the palette of Okabe and Ito without yellow
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
)
MARKERS = "os^Dv<>PXph*"
DASHES = ("-", "--", ":")


def look(i: int) -> Look:
    """Return the style of the i-th curve: every colour once, then again with hollow markers and dashes."""
    colour, again = COLOURS[i % len(COLOURS)], i // len(COLOURS)
    line = {"color": colour, "linestyle": DASHES[again % len(DASHES)]}
    mark = {
        "marker": MARKERS[i % len(MARKERS)],
        "markersize": 4,
        "markerfacecolor": "white" if again else colour,
    }
    return (
        line
        | mark
        | {
            "markeredgecolor": colour if again else "white",
            "markeredgewidth": 0.8 if again else 0.4,
        }
    )


UNEDITED = look(0) | {
    "color": "#777777",
    "linestyle": "--",
    "marker": "d",
    "markerfacecolor": "#777777",
}


def new_figure(title: str, height: float) -> Figure:
    """Create an empty figure with `height` inches for axes below its title."""
    from matplotlib.figure import Figure

    lines = [text for line in title.split("\n") for text in wrap(plain(line), LETTERS - 10)]
    figure = Figure((WIDTH, height + 0.18 + 0.12 * len(lines)), layout="constrained")
    figure.suptitle("\n".join(lines), x=0.01, ha="left")
    return figure


def add_legend(figure: Figure, looks: dict[str, Look]) -> None:
    """Add a legend below the axes, with as many columns as fit, and enlarge the figure by its rows."""
    from matplotlib.lines import Line2D

    texts = [fill(plain(text), LETTERS - 14) for text in looks]
    columns = max(1, min(len(texts), LETTERS // (max(map(len, texts)) + 7)))
    lines = sum(text.count("\n") + 1 for text in texts)
    figure.set_figheight(figure.get_figheight() + 0.14 * ceil(lines / columns))
    handles = [Line2D([], [], **style) for style in looks.values()]
    figure.legend(handles, texts, loc="outside lower left", ncols=columns)


def plain(text: str) -> str:
    """Escape a text so that matplotlib does not parse it as a formula or hide it from a legend."""
    return " " * text.startswith("_") + text.replace("$", r"\$")
