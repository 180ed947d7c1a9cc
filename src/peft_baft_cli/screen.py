"""Output on the terminal: tables, status lines, and text with arbitrary characters."""

from __future__ import annotations

import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

GAP = "  "
NARROWEST = 8  # terminal columns: cells are not cut further than this
CUT_FIRST_TO = 16  # terminal columns to which the cells of `cut_first` are cut before others are
NAMED_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def shown(text: str) -> str:
    """Return `text` in one line, with escapes for everything that would move the cursor or control the terminal.

    A model's answer may contain any character. Line breaks become `\\n`. Other control characters (such as the start of terminal
    escape sequences), line separators, lone surrogates and changes of the writing direction become `\\x1b` or `\\u2028`.
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
    """Return `text`, cut to `width` terminal columns with an ellipsis if it is longer.

    Args:
        pad: whether to pad shorter text with spaces.
    """
    from rich.text import Text

    cut = Text(text)
    cut.truncate(width, overflow="ellipsis", pad=pad)
    return cut.plain


def is_rich_terminal() -> bool:
    """Return whether standard output is a terminal to which colours, and lines cut to its width, may be written."""
    return (
        sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], cut_first: Sequence[str] = ()
) -> None:
    """Print a table. On a terminal, the longest cells are cut to fit; elsewhere, cells are complete.

    Args:
        cut_first: headers of columns that are cut before the others, such as long answers next to short questions.
    """
    from rich.cells import cell_len

    cells = [[shown(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    if is_rich_terminal():
        room = shutil.get_terminal_size((120, 24)).columns or 120
        widths = _fitting(widths, room, [i for i, name in enumerate(header) if name in cut_first])
    rule = ["-" * width for width in widths]
    lines = []
    for row in (cells[0], rule, *cells[1:]):
        padded = [shortened(cell, width, pad=True) for cell, width in zip(row, widths, strict=True)]
        lines.append(GAP.join(padded).rstrip())
    print("\n" + "\n".join(lines) + "\n")


def _fitting(widths: Sequence[int], room: int, first: Sequence[int]) -> list[int]:
    """Shrink column widths to fit into `room` columns, the widest ones first: among the columns `first`, then among all."""
    fitted = list(widths)
    available = room - len(GAP) * (len(widths) - 1)
    for columns, least in ((first, CUT_FIRST_TO), (range(len(fitted)), NARROWEST)):
        while sum(fitted) > available and any(fitted[i] > least for i in columns):
            fitted[max(columns, key=fitted.__getitem__)] -= 1
    return fitted


def progress_shown() -> bool:
    """Return whether to show progress: only if standard error is a terminal."""
    return sys.stderr.isatty()


@contextmanager
def doing(what: str, wanted: bool = True) -> Iterator[None]:
    """Show a status line on a terminal while the block runs; show nothing elsewhere.

    Args:
        wanted: whether to show it. Among several processes, only one does.
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
