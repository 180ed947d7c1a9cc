"""The settings of a memory of edits, which `BaftConfig(memory=...)` takes."""

from __future__ import annotations

from dataclasses import dataclass

AFTER = ("stop", "continue")  # what follows an answer


@dataclass(frozen=True)
class MemoryConfig:
    """Settings of a memory of edits.

    Args:
        after: what follows an answer, unless the edit specifies it. `stop` ends the reply: in a chat with the end of the turn, in
            raw text with a line break and, if the model has one, the end-of-text token. `continue` leaves the rest of the reply
            to the model.
        key_dimensions: the dimensions of the key of each token of a question.
        least_subject: the similarity (at most 1) in what a prompt and an edit are about, above which the edit may answer.
        strictness: the similarity (at most 1) in what they ask, above which the edit may answer. It is not required if both
            clearly ask for the same common relation. With a larger value, fewer prompts are answered.
        most_unlike: how many words of a prompt, outside its subject, may be unlike all words of the edit's question and of the
            wordings of the relation that it asks for.

    Raises:
        TypeError, ValueError: a value has the wrong type, or is out of range.
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
                raise ValueError(f"{name} must be at least -1 and below 1, not {value!r}.")


def require_after(value: object) -> None:
    """Raise a ValueError unless a value is one of `AFTER`."""
    if value not in AFTER:
        raise ValueError(f"after must be one of {', '.join(map(repr, AFTER))}, not {value!r:.60}.")
