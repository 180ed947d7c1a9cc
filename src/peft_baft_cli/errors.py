"""How a command ends: its exit codes, and which exceptions are the user's to mend."""

from __future__ import annotations

DONE = 0
BUG = 1
BAD_INPUT = 2
NOT_SO = 3  # of `edit --strict` and `check`
INTERRUPTED = 130  # what a shell reports for a process that SIGINT ended

EXIT_CODES = {
    DONE: "the command did what it was asked. For `edit`: the adapter is saved, also if a fact did not take",
    BUG: "an error that nobody foresaw; please report it",
    BAD_INPUT: "bad input, or a file, device or package that is missing; one line says what to do",
    NOT_SO: "with `edit --strict`: the adapter is saved, but not every fact is known at the end; "
    "with `check`: something does not hold",
    INTERRUPTED: "interrupted (Ctrl-C); a line says how to go on",
}


class Interrupted(KeyboardInterrupt):
    """An interrupt of a run whose journal has begun, so that `--resume` goes on with it."""


def is_users(error: Exception) -> bool:
    """Return whether an error is about what the user gave or about the machine, and not a bug.

    `ValueError`, `OSError` and `FloatingPointError` are; commands turn the `TypeError`s that the package raises on purpose
    into `ValueError`s. An `ImportError` is where its message was written for the user (Python's own, which has a `name`,
    says that two versions do not fit) or where a package is missing. Running out of a device's memory is, too.
    """
    if isinstance(error, ModuleNotFoundError):
        return (error.name or "").partition(".")[0] not in ("peft_baft", "peft_baft_cli")
    if isinstance(error, ImportError):
        return error.name is None
    return (
        isinstance(error, (ValueError, OSError, FloatingPointError))
        or type(error).__name__ == "OutOfMemoryError"
    )


def in_one_line(error: Exception) -> str:
    """Return the message of a user's error, without line breaks."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"This needs the package {error.name}, which is not installed."
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}."
    text = " ".join(str(error).split()) or type(error).__name__
    if type(error).__name__ == "OutOfMemoryError":
        return f"{text} Take a smaller --batch-size, another --device, or --dtype bfloat16."
    return text
