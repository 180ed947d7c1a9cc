"""Facts as values: what to change, what to ask. No model, no device, no file format."""

from __future__ import annotations

from dataclasses import dataclass, field

KINDS = ("generality", "locality", "portability")


@dataclass(frozen=True)
class Edit:
    """A fact to be learned: after `prompt`, the model shall say `target`.

    The two are joined by one space, and white space around either is dropped.

    Raises:
        TypeError: one of them is not a string.
        ValueError: one of them is empty, or not valid Unicode.
    """

    prompt: str
    target: str

    def __post_init__(self) -> None:
        _require_text("Edit.prompt", self.prompt)
        _require_text("Edit.target", self.target)


@dataclass(frozen=True)
class Probe:
    """A question and its answer, asked to see what an edit did.

    Args:
        kind: `generality` (the edit in other words: the answer should be the new one), `portability` (a consequence of
            the edit) or `locality` (something unrelated: whatever the model said before, it should go on saying).
        prompt: the question. answer: the answer that the model's tokens are compared on.
        topic: what a benchmark calls this sub-type of the kind, such as `Reasoning`; empty where it has none.
    """

    kind: str
    prompt: str
    answer: str
    topic: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Probe.kind must be one of {', '.join(KINDS)}, not {self.kind!r}.")
        if not isinstance(self.topic, str):
            raise TypeError(
                f"Probe.topic must be a string, empty for none, not {type(self.topic).__name__}."
            )
        _require_text("Probe.prompt", self.prompt)
        _require_text("Probe.answer", self.answer)


@dataclass(frozen=True)
class Case:
    """One record of a benchmark or of a user's file: an edit, and the probes that judge it."""

    edit: Edit
    probes: tuple[Probe, ...] = field(default=())

    def of_kind(self, kind: str) -> tuple[Probe, ...]:
        """List the probes of one kind."""
        return tuple(probe for probe in self.probes if probe.kind == kind)


@dataclass(frozen=True)
class Unrelated:
    """Text that an edit should leave alone, shown while editing so that the gates learn to stay closed (Sec. 2.4).

    `prompt` and `answer` are read at the same places as an edit's: the last prompt tokens and the answer.
    """

    prompt: str
    answer: str

    def __post_init__(self) -> None:
        _require_text("Unrelated.prompt", self.prompt)
        _require_text("Unrelated.answer", self.answer)


def _require_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {type(value).__name__} ({value!r:.60}).")
    if not value.strip():
        raise ValueError(
            f"{name} is empty; it needs at least one character that is not white space."
        )
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(
            f"{name} holds half a character (a lone surrogate), which no tokenizer can read: {value!r:.60}."
        )
