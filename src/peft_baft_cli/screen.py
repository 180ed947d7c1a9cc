"""What is shown on the terminal: tables, status lines, and text that may hold anything."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

GAP = "  "
NARROWEST = 8  # columns of a terminal below which a cell is not cut any further
CUT_FIRST_TO = 16  # columns that are left to a cell that gives way first, before others do
NAMED_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def shown(text: str) -> str:
    """Return `text` in one line, with everything that would move the cursor or command the terminal as an escape.

    A model's answer may hold any character. Line breaks read `\\n`; other control characters, among them the one that
    begins a terminal's escape sequences, line separators, halves of surrogate pairs and changes of the writing direction
    read `\\x1b` or `\\u2028`.
    """
    return "".join(_escaped(character) for character in text)


def _escaped(character: str) -> str:
    if character in NAMED_ESCAPES:
        return NAMED_ESCAPES[character]
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in BIDI_CONTROLS:
        code = ord(character)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    return character


def shortened(text: str, width: int, pad: bool = False) -> str:
    """Return `text`, cut to `width` columns of a terminal with an ellipsis where it is longer.

    Args:
        pad: Whether to fill up a shorter text with spaces.
    """
    from rich.text import Text

    cut = Text(text)
    cut.truncate(width, overflow="ellipsis", pad=pad)
    return cut.plain


def for_people() -> bool:
    """Return whether standard output is a terminal that may get colours, and lines that are cut to its width."""
    return (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], cut_first: Sequence[str] = ()
) -> None:
    """Print a table, whose longest cells are cut to fit on a terminal; as plain text with whole cells elsewhere.

    Args:
        cut_first: Headers of columns that give way before the others, such as long answers beside short questions.
    """
    from rich.cells import cell_len

    cells = [[shown(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    if for_people():
        room = shutil.get_terminal_size((120, 24)).columns or 120
        widths = _fitting(widths, room, [i for i, name in enumerate(header) if name in cut_first])
    rule = ["-" * width for width in widths]
    lines = []
    for row in (cells[0], rule, *cells[1:]):
        padded = [shortened(cell, width, pad=True) for cell, width in zip(row, widths, strict=True)]
        lines.append(GAP.join(padded).rstrip())
    print("\n" + "\n".join(lines) + "\n")


def _fitting(widths: Sequence[int], room: int, first: Sequence[int]) -> list[int]:
    """Return column widths that fit into `room` columns, each taken from the widest: of the columns `first`, then of all."""
    fitted = list(widths)
    available = room - len(GAP) * (len(widths) - 1)
    for columns, least in ((first, CUT_FIRST_TO), (range(len(fitted)), NARROWEST)):
        while sum(fitted) > available and any(fitted[i] > least for i in columns):
            fitted[max(columns, key=fitted.__getitem__)] -= 1
    return fitted


def progress_shown() -> bool:
    """Return whether progress may be drawn: where standard error is a terminal."""
    return sys.stderr.isatty()


@contextmanager
def doing(what: str, wanted: bool = True) -> Iterator[None]:
    """Show on a terminal what takes its time while inside, and wipe it out afterwards; show nothing elsewhere.

    Args:
        wanted: Whether to show it: of several processes, one does.
    """
    if not (wanted and progress_shown()):
        yield
        return
    from rich.cells import cell_len

    text = shown(f"{what} …")
    sys.stderr.write(text)
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write("\r" + " " * cell_len(text) + "\r")
        sys.stderr.flush()
