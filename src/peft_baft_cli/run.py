"""Reads the command line, runs one command, and turns its end into an exit code and at most one line."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Sequence

import typer

from peft_baft_cli.errors import (
    BAD_INPUT,
    BUG,
    DONE,
    INTERRUPTED,
    Interrupted,
    in_one_line,
    is_users,
)
from peft_baft_cli.parser import complaint, parse
from peft_baft_cli.quiet import only_our_messages, silence_imported
from peft_baft_cli.screen import doing, shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The words after `baft`; by default those of this process.

    Returns:
        The exit code; `EXIT_CODES` has what each means.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parsed = parse(words)
    except typer.TyperException as error:
        print(complaint(error, words), file=sys.stderr)
        return BAD_INPUT
    if isinstance(parsed, int):
        return parsed
    command = f"baft {words[0]}"
    try:
        with only_our_messages():
            with doing("starting"):
                import peft_baft  # noqa: F401  the heavy half, which registers the adapter type

                silence_imported()
            return parsed.run()
    except KeyboardInterrupt as interrupt:
        print(
            f"\n{command}: interrupted. {_how_to_go_on(interrupt, words[0], words)}".rstrip(),
            file=sys.stderr,
        )
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
    """Return which command goes on with what was interrupted; an empty text where nothing is lost."""
    if command not in ("edit", "bench"):
        return ""
    if os.environ.get("LOCAL_RANK"):  # the launcher's own words are not known here
        resumed = " with --resume" if isinstance(interrupt, Interrupted) else ""
        return f"To go on, give the same command again{resumed}."
    if command == "bench":
        return (
            f"What is done is kept; to go on, give the same command again: baft {shlex.join(words)}"
        )
    if not isinstance(interrupt, Interrupted):
        return "No edit was begun; give the same command again."
    again = [word for word in words if word not in ("--resume", "--overwrite")]
    return f"Finished edits are kept; to go on: baft {shlex.join([*again, '--resume'])}"
