"""Kinds of options for typer, whose error messages give the expected and the actual value.

All functions take `help`, and `panel`: the heading under which the help shows the option.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import typer

LARGEST_SEED = 2**63 - 1  # the largest that torch accepts


def text(metavar: str, help: str, panel: str | None = None) -> Any:
    """Return an option that takes any text, or a path."""
    return typer.Option(metavar=metavar, help=help, rich_help_panel=panel)


def flag(name: str, help: str, panel: str | None = None, **more: Any) -> Any:
    """Return an option without a value, with the only spelling `name`; `more` are arguments of `typer.Option`."""
    # With an empty metavar, because typer would otherwise show <bool> as if the option took a value.
    return typer.Option(name, metavar="", help=help, rich_help_panel=panel, **more)


def whole_number(
    help: str, least: int = 1, most: int | None = None, metavar: str = "N", panel: str | None = None
) -> Any:
    """Return an option that takes a whole number from `least` to `most`."""
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"

    def accepts(value: int) -> bool:
        return value >= least and (most is None or value <= most)

    parse = _parser(int, accepts, f"a whole number {bounds}")
    return typer.Option(parser=parse, metavar=metavar, help=help, rich_help_panel=panel)


def number_above_zero(metavar: str, help: str, panel: str | None = None) -> Any:
    """Return an option that takes a finite number above 0."""
    parse = _parser(float, lambda value: 0 < value < math.inf, "a number above 0, such as 0.002")
    return typer.Option(parser=parse, metavar=metavar, help=help, rich_help_panel=panel)


def share(metavar: str, help: str, panel: str | None = None) -> Any:
    """Return an option that takes a number from 0 to 1."""
    parse = _parser(float, lambda value: 0 <= value <= 1, "a number from 0 to 1, such as 0.95")
    return typer.Option(parser=parse, metavar=metavar, help=help, rich_help_panel=panel)


def _parser(
    kind: Callable[[str], Any], accepts: Callable[[Any], bool], wanted: str
) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise typer.BadParameter(f"wanted {wanted}, not {text!r}")
        return value

    return parse


def choice(values: Sequence[str], help: str, panel: str | None = None) -> Any:
    """Return an option that takes one of `values`."""

    def parse(text: str) -> str:
        if text not in values:
            raise typer.BadParameter(f"invalid choice: {text!r} (choose from {', '.join(values)})")
        return text

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return typer.Option(
        parser=parse,
        metavar="|".join(values),
        autocompletion=complete,
        help=help,
        rich_help_panel=panel,
    )
