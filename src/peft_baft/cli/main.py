"""Reads the command line, runs one command, turns its errors into a sentence."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence

from transformers.utils import logging as transformers_logging

from peft_baft.cli import bench, check, edit, journal, show


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it did what it was asked, 1 if an edit did not take, 2 for bad input."""
    args = _parser().parse_args(arguments)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        return args.run(args)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        print(f"baft {args.command}: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="baft", description="Change what a language model knows, and keep the change as a PEFT adapter."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for module in (check, edit, journal, bench, show):
        module.add_commands(commands)
    return parser
