"""Reads the command line, runs one command, and turns its end into an exit code and at most one line."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from peft_baft_cli.commands import add_commands
from peft_baft_cli.errors import (
    BAD_INPUT,
    BUG,
    DONE,
    EXIT_CODES,
    INTERRUPTED,
    Interrupted,
    UsageError,
    in_one_line,
    is_users,
)
from peft_baft_cli.quiet import only_our_messages, silence_imported
from peft_baft_cli.screen import doing, shown
from peft_baft_cli.version import ShowVersions


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after `baft`; by default those of this process.

    Returns:
        The exit code; `EXIT_CODES` says what each means.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    if not words:
        parser.print_help(sys.stderr)
        return BAD_INPUT
    try:
        args, unknown = parser.parse_known_args(words)
        if unknown:  # argparse itself would not say which command does not know them
            raise UsageError(f"baft {args.command}: unknown: {' '.join(unknown)}. See baft {args.command} --help.")
    except UsageError as error:
        print(error, file=sys.stderr)
        return BAD_INPUT
    command = f"baft {args.command}"
    try:
        with only_our_messages():
            with doing("starting"):
                import peft_baft  # noqa: F401  the heavy half, which registers the adapter type

                silence_imported()
            return args.run(args)
    except KeyboardInterrupt as interrupt:
        print(f"\n{command}: interrupted. {_how_to_go_on(interrupt, args.command, words)}".rstrip(), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:
        if is_users(error):
            print(f"{command}: {shown(in_one_line(error))}", file=sys.stderr)
            return BAD_INPUT
        traceback.print_exc()
        print(f"{command}: {REPORT}", file=sys.stderr)
        return BUG


REPORT = (
    "This is an error in peft_baft or in a library below it, not in what you gave. "
    "Please report the lines above together with the command and the output of `baft --version`."
)


def _how_to_go_on(interrupt: KeyboardInterrupt, command: str, words: Sequence[str]) -> str:
    """Which command goes on with what was interrupted; empty where nothing is lost."""
    if command not in ("edit", "bench"):
        return ""
    if os.environ.get("LOCAL_RANK"):  # the launcher's own words are not known here
        resumed = " with --resume" if isinstance(interrupt, Interrupted) else ""
        return f"To go on, give the same command again{resumed}."
    if command == "bench":
        return f"What is done is kept; to go on, give the same command again: baft {shlex.join(words)}"
    if not isinstance(interrupt, Interrupted):
        return "No edit was begun; give the same command again."
    again = [word for word in words if word not in ("--resume", "--overwrite")]
    return f"Finished edits are kept; to go on: baft {shlex.join([*again, '--resume'])}"


class _Parser(argparse.ArgumentParser):
    """A parser that complains in one line, without the usage of all options before it, and knows options by whole names."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs | {"allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{self.prog}: {message.rstrip('.')}. See {self.prog} --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="baft",
        description="Change what a language model knows, and keep the change as a PEFT adapter.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=ShowVersions, help="show the versions that matter, and end")
    add_commands(parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands"))
    return parser
