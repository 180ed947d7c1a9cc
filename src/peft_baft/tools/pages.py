"""Helpers of the HTML pages of `inspect` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined


def html_environment(**options: Any) -> Environment:
    """Return a template environment that escapes all values and raises an error for undefined names."""
    return Environment(
        autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True, **options
    )


def read_asset(folder: Path, name: str) -> str:
    """Read one of the files that make up a page."""
    return (folder / name).read_text(encoding="utf-8")
