"""Exit codes, and which exceptions are errors of the user rather than bugs."""

from __future__ import annotations

DONE = 0
BUG = 1
BAD_INPUT = 2
CHECK_FAILED = 3  # of `edit --strict` and `check`
INTERRUPTED = 130  # what a shell reports for a process that was ended by SIGINT

EXIT_CODES = {
    DONE: "success. For `edit`: the adapter is saved, even if not every fact was learned",
    BUG: "an unexpected error; please report it",
    BAD_INPUT: "invalid input, or a missing file, device or package; one line says what to do",
    CHECK_FAILED: "with `edit --strict`: the adapter is saved, but not every fact is known at the end; "
    "with `check`: a check failed",
    INTERRUPTED: "interrupted (Ctrl-C); one line says how to resume",
}


class Interrupted(KeyboardInterrupt):
    """An interrupt of a run whose journal has been started, so that `--resume` can continue it."""


def is_users(error: Exception) -> bool:
    """Return whether an error is caused by the user's input or by the machine, and not by a bug.

    This holds for `ValueError`, `OSError`, `FloatingPointError`, missing packages, and running out of a device's memory. Commands
    convert the `TypeError`s that the package raises on purpose into `ValueError`s. It also holds for an `ImportError` without a
    `name`: such a message was written for the user, while Python's own says that two versions do not fit.
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
    """Return the message of an error for the user, without line breaks."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"The package {error.name} is required, but not installed."
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}."
    text = " ".join(str(error).split()) or type(error).__name__
    if type(error).__name__ == "OutOfMemoryError":
        return f"{text} Use a smaller --batch-size, another --device, or --dtype bfloat16."
    return text
