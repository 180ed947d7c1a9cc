"""The settings of a memory of edits, which `BaftConfig(memory=...)` takes."""

from __future__ import annotations

from dataclasses import dataclass

AFTER = ("stop", "continue")


@dataclass(frozen=True)
class MemoryConfig:
    """Settings of a memory of edits.

    Args:
        after: what follows a taught answer, unless an edit says otherwise. `stop`: the end of the turn in a chat; in raw text a
            line break and, if the model knows one, the end of the text. `continue`: whatever the model says next.
        key_dimensions: how many numbers the key of each token of a question has.
        least_subject: how alike (at most 1) a prompt must be to an edit's in what it is about.
        strictness: how alike (at most 1) it must be in what it asks of that, where a list of common relations does not tell that
            this is the same. Larger lets fewer prompts in.
        most_unlike: how many words of a prompt, besides its subject, may be unlike any of the edit's and of the wordings of what
            it asks for.

    Raises:
        TypeError, ValueError: a value is of another type, or out of its range.
    """

    after: str = "stop"
    key_dimensions: int = 64
    least_subject: float = 0.72
    strictness: float = 0.4
    most_unlike: int = 1

    def __post_init__(self) -> None:
        require_after(self.after)
        for name, least in (("key_dimensions", 1), ("most_unlike", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an integer, not {value!r:.60}.")
            if value < least:
                raise ValueError(f"{name} must be {least} or more, not {value}.")
        for name in ("least_subject", "strictness"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise TypeError(f"{name} must be a number, not {value!r:.60}.")
            if not -1 <= value < 1:
                raise ValueError(f"{name} must be a likeness of -1 to 1, not {value!r}.")


def require_after(value: object) -> None:
    """Raise a ValueError unless a value says what follows an answer."""
    if value not in AFTER:
        raise ValueError(f"after must be one of {', '.join(map(repr, AFTER))}, not {value!r:.60}.")
