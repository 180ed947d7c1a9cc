"""Parse the command line, run one command, and turn its outcome into an exit code and at most one line of text."""

from __future__ import annotations

import os
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

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
from peft_baft_cli.options import Command
from peft_baft_cli.parser import error_message, parse
from peft_baft_cli.quiet import only_our_messages, silence_imported
from peft_baft_cli.screen import doing, shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after `baft`; by default those of this process.

    Returns:
        The exit code, as explained in `EXIT_CODES`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        parsed = parse(words)
    except typer.TyperException as error:
        print(error_message(error, words), file=sys.stderr)
        return BAD_INPUT
    if isinstance(parsed, int):
        return parsed
    command = f"baft {words[0]}"
    try:
        with only_our_messages():
            with doing("starting"):
                import peft_baft  # noqa: F401  registers the adapter type

                silence_imported()
            return _work_of(parsed)(parsed)
    except KeyboardInterrupt as interrupt:
        print(
            f"\n{command}: interrupted. {_how_to_resume(interrupt, words[0], words)}".rstrip(),
            file=sys.stderr,
        )
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has ended
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
    "This is an error in peft_baft or in a library that it uses, not in your input. "
    "Please report the lines above together with the command and the output of `baft --version`."
)


def _work_of(options: Command) -> Callable[[Any], int]:
    """Import the function that runs a command."""
    module, _, function = options.work.partition(":")
    work: Callable[[Any], int] = getattr(import_module(f"peft_baft_cli.work.{module}"), function)
    return work


def _how_to_resume(interrupt: KeyboardInterrupt, command: str, words: Sequence[str]) -> str:
    """Return which command resumes what was interrupted; "" if nothing is lost."""
    if command not in ("edit", "bench"):
        return ""
    if os.environ.get("LOCAL_RANK"):  # the launcher's own arguments are not known here
        resumed = " with --resume" if isinstance(interrupt, Interrupted) else ""
        return f"To resume, run the same command again{resumed}."
    if command == "bench":
        return f"Finished work is saved. To resume, run the same command again: baft {shlex.join(words)}"
    if not isinstance(interrupt, Interrupted):
        return "No edit was started; run the same command again."
    again = [word for word in words if word not in ("--resume", "--overwrite")]
    return f"Finished edits are saved. To resume: baft {shlex.join([*again, '--resume'])}"
