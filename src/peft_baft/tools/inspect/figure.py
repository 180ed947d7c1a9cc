"""Draw an inspection as a picture for papers and reports. Needs matplotlib: `pip install 'peft-baft[plot]'`."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_baft.tools.inspect.inspect import Cell, Change, Inspection, Token
from peft_baft.tools.inspect.page import NOTHING, block_label, percent
from peft_baft.tools.inspect.token_text import visible

INK, SOFT, LINE, PALE = "#1c2230", "#5a6272", "#dfdcd3", "#f6f5f1"
EDIT, WAS, GATE = "#c2410c", "#8b92a0", "#2b3f87"
UNEDITED = 3  # number of tokens to draw before the first edited one
CELL = 0.62  # size of a cell in inches; all coordinates are in units of it
# Space for the names of blocks on the left, for the candidates on the right, and above and below the cells.
SIDE, RIGHT, HEAD, FOOT = 2.0, 6.3, 3.0, 1.0
FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Arial Unicode MS",
)
KEY = (
    "Bars: the gates, from 0 to 1. Tint and percentage: norm of the update relative to the hidden vector. Next token: how much "
    "of its probability the edits moved."
)


def draw(inspection: Inspection, path: str | Path) -> None:
    """Draw the gates, the sizes of the updates and the answer's first token to a file; its suffix (`.png`) is the format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context, style
        from matplotlib.font_manager import get_font_names
    except ImportError:
        raise ImportError("The picture needs matplotlib: pip install 'peft-baft[plot]'") from None
    installed = set(get_font_names())
    with (
        style.context("default"),
        rc_context({"font.family": [font for font in FONTS if font in installed]}),
    ):
        figure = _figure(inspection)
        with warnings.catch_warnings():
            # A character without a glyph is drawn as a box.
            warnings.filterwarnings("ignore", "Glyph .* missing from")
            figure.savefig(path, dpi=200)


def _figure(inspection: Inspection) -> Any:
    """Draw a column per token and a row per block, with the candidates for the answer's first token on the right."""
    from matplotlib.figure import Figure

    first = max(0, next(i for i, token in enumerate(inspection.tokens) if token.edited) - UNEDITED)
    tokens, rows = inspection.tokens[first:], len(inspection.blocks)
    changes = inspection.tokens[inspection.prompt_end].changes
    bottom = max(rows + 0.6, len(changes) / 2) + FOOT
    width = SIDE + len(tokens) + RIGHT
    figure = Figure(figsize=(CELL * width, CELL * (HEAD + bottom)))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-SIDE, width - SIDE), ylim=(bottom, -HEAD))
    axes.axis("off")
    _header(axes, inspection, int(width * 4))
    _tokens(axes, tokens)
    _grid(axes, inspection, first)
    _moved(axes, tokens, rows)
    _candidates(axes, changes, len(tokens) + 0.8)
    _text(axes, 0.3 - SIDE, bottom - 0.45, KEY, fontsize=8, color=SOFT)
    return figure


def _text(axes: Any, x: float, y: float, text: str, **style: Any) -> None:
    """Draw a text literally: dollar signs do not start a formula."""
    axes.text(
        x, y, text, **{"va": "center", "color": INK, "fontsize": 10, "parse_math": False, **style}
    )


def _fitted(axes: Any, x: float, y: float, text: str, room: int, **style: Any) -> None:
    """Draw a text smaller if it has more than `room` characters, and truncate it at twice as many."""
    shown = text if len(text) <= 2 * room else f"{text[: 2 * room - 1]}…"
    _text(axes, x, y, shown, fontsize=10 * min(1, room / len(shown)), **style)


def _box(
    axes: Any, x: float, y: float, width: float, height: float, color: Any, **style: Any
) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(
        Rectangle((x, y), width, height, **{"facecolor": color, "linewidth": 0, **style})
    )


def _header(axes: Any, inspection: Inspection, room: int) -> None:
    """Draw the prompt and both answers, each on a line of at most `room` characters."""
    texts = [inspection.prompt, inspection.before or NOTHING, inspection.after or NOTHING]
    prompt, before, after = (textwrap.shorten(text, room, placeholder=" …") for text in texts)
    _text(axes, 0.3 - SIDE, 0.6 - HEAD, prompt, fontsize=15, fontweight="bold")
    _text(axes, 0.3 - SIDE, 1.25 - HEAD, "without", color=SOFT)
    _text(axes, 0.1, 1.25 - HEAD, before, fontsize=11, color=SOFT)
    _text(axes, 0.3 - SIDE, 1.7 - HEAD, "with the edits", color=EDIT)
    _text(axes, 0.1, 1.7 - HEAD, after, fontsize=11)


def _tokens(axes: Any, tokens: Sequence[Token]) -> None:
    """Draw the tokens above their columns, with those of the answer underlined."""
    for x, token in enumerate(tokens):
        color = INK if token.edited else WAS
        if token.answer:
            color = EDIT
        _fitted(axes, x + 0.5, -0.35, visible(token.text), 7, color=color, ha="center")
        if token.answer:
            _box(axes, x, -0.06, 1, 0.04, EDIT)


def _grid(axes: Any, inspection: Inspection, first: int) -> None:
    largest = max(cell.size for block in inspection.blocks for cell in block.cells) or 1.0
    for y, block in enumerate(inspection.blocks):
        _fitted(axes, 0.3 - SIDE, y + 0.5, block_label(block.name), 13, color=SOFT)
        for x, cell in enumerate(block.cells[first:]):
            _cell(axes, x, y, cell, cell.size / largest)


def _cell(axes: Any, x: float, y: float, cell: Cell, tint: float) -> None:
    """Draw one token in one block: a bar per gate on a tinted background, and the size of the update."""
    _box(axes, x + 0.04, y + 0.04, 0.92, 0.92, PALE)
    if not cell.gates:
        return
    _box(axes, x + 0.04, y + 0.04, 0.92, 0.92, "white")
    _box(axes, x + 0.04, y + 0.04, 0.92, 0.92, EDIT, alpha=0.04 + 0.46 * tint)
    gates = [w for values in cell.gates.values() for w in values]
    step = 0.76 / len(gates)
    for i, w in enumerate(gates):
        _box(axes, x + 0.12 + i * step, y + 0.12, 0.8 * step, 0.54, GATE, alpha=0.1)
        _box(axes, x + 0.12 + i * step, y + 0.12 + 0.54 * (1 - w), 0.8 * step, 0.54 * w, GATE)
    _text(axes, x + 0.5, y + 0.81, percent(cell.size), fontsize=7.5, ha="center")


def _moved(axes: Any, tokens: Sequence[Token], y: float) -> None:
    """Draw how much of the next token's probability the edits moved."""
    _text(axes, 0.3 - SIDE, y + 0.3, "next token", color=SOFT)
    for x, token in enumerate(tokens):
        if token.edited:
            _box(axes, x + 0.12, y + 0.14, 0.76, 0.09, LINE)
            _box(axes, x + 0.12, y + 0.14, 0.76 * token.moved, 0.09, EDIT)
            _text(axes, x + 0.5, y + 0.42, percent(token.moved), fontsize=7.5, ha="center")


def _candidates(axes: Any, changes: Sequence[Change], x: float) -> None:
    """Draw the probabilities of the answer's first token without and with the edits, the largest change first."""
    _text(axes, x, -0.35, "The answer's first token", fontweight="bold")
    by_change = sorted(changes, key=lambda change: -abs(change.after - change.before))
    for row, change in enumerate(by_change):
        y = row / 2
        _fitted(axes, x, y + 0.25, visible(change.text), 10)
        _box(axes, x + 1.7, y + 0.1, 1.5 * change.before, 0.14, WAS)
        _box(axes, x + 1.7, y + 0.26, 1.5 * change.after, 0.14, EDIT)
        _text(
            axes,
            x + 4.2,
            y + 0.25,
            f"{percent(change.before)} →",
            fontsize=9,
            ha="right",
            color=SOFT,
        )
        _text(axes, x + 5.2, y + 0.25, percent(change.after), fontsize=9, ha="right", color=EDIT)
    _box(axes, x + 1.68, 0.05, 0.02, len(changes) / 2 - 0.1, LINE)
