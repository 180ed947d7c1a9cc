"""What is shown on the terminal: tables, status lines, and text that may hold anything."""

from __future__ import annotations

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
    """`text` in one line, with everything that would move the cursor or command the terminal as an escape.

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


def display_width(text: str) -> int:
    """Columns that `text` takes on a terminal: two for a wide (East Asian) character, none for a combining one."""
    width = 0
    for character in text:
        if unicodedata.combining(character) or unicodedata.category(character) == "Cf":
            continue
        width += 2 if unicodedata.east_asian_width(character) in ("W", "F") else 1
    return width


def shortened(text: str, width: int) -> str:
    """`text`, cut to `width` columns with an ellipsis where it is longer."""
    if display_width(text) <= width:
        return text
    taken, columns = "", 0
    for character in text:
        columns += display_width(character)
        if columns > width - 1:
            break
        taken += character
    return taken + "…"


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], cut_first: Sequence[str] = ()) -> None:
    """Print a plain table. On a terminal its longest cells are cut to fit; in a pipe or a file nothing is.

    Args:
        cut_first: headers of columns that give way before the others, such as long answers beside short questions.
    """
    cells = [[shown(cell) for cell in row] for row in (header, *rows)]
    widths = [max(display_width(row[i]) for row in cells) for i in range(len(header))]
    if sys.stdout.isatty():
        room = shutil.get_terminal_size((120, 24)).columns or 120
        widths = _fitting(widths, room, [i for i, name in enumerate(header) if name in cut_first])
        cells = [[shortened(cell, width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    lines = [_line(row, widths) for row in cells]
    rule = GAP.join("-" * width for width in widths)
    print("\n" + "\n".join([lines[0], rule, *lines[1:]]) + "\n")


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    padded = [cell + " " * (width - display_width(cell)) for cell, width in zip(row, widths, strict=True)]
    return GAP.join(padded).rstrip()


def _fitting(widths: Sequence[int], room: int, first: Sequence[int]) -> list[int]:
    """Column widths that fit into `room` columns, each taken from the widest: of the columns `first`, then of all."""
    fitted = list(widths)
    available = room - len(GAP) * (len(widths) - 1)
    for columns, least in ((first, CUT_FIRST_TO), (range(len(fitted)), NARROWEST)):
        while sum(fitted) > available and any(fitted[i] > least for i in columns):
            fitted[max(columns, key=fitted.__getitem__)] -= 1
    return fitted


def progress_shown() -> bool:
    """Whether progress may be drawn: where standard error is a terminal."""
    return sys.stderr.isatty()


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Show on a terminal what takes its time while inside, and wipe it out afterwards; show nothing elsewhere."""
    if not progress_shown():
        yield
        return
    text = shown(f"{what} …")
    sys.stderr.write(text)
    sys.stderr.flush()
    try:
        yield
    finally:
        sys.stderr.write("\r" + " " * display_width(text) + "\r")
        sys.stderr.flush()
