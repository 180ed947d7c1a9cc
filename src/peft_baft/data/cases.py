"""Facts as values: what to change, what to ask. No model, no device, no file format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

KINDS = ("generality", "locality", "portability")


@dataclass(frozen=True)
class Message:
    """One message of a conversation: who speaks (`system`, `user`, `assistant`, `tool`), and what."""

    role: str
    content: str

    def __post_init__(self) -> None:
        _require_text("a message's role", self.role)
        _require_text("a message's content", self.content)


# A text, or the messages of a conversation; records keep the latter as a tuple of `Message`s.
Prompt = str | Sequence[Message | Mapping[str, Any]]


@dataclass(frozen=True)
class Edit:
    """A fact to be learned: after `prompt`, the model shall say `target`.

    White space around either is dropped. How they are joined is a matter of the editor's template: by one space in raw text,
    as a turn of the assistant in a chat.

    Args:
        prompt: a text, or messages such as `[{"role": "user", "content": "..."}]` whose last one awaits the reply.
        target: the answer.
        subject: the words of the prompt that name what the fact is about, such as `France`. Neighbours are made by exchanging
            them; where it is None they are found. It is a hint, and no part of what makes two edits equal.
        after: what follows the answer: `stop`, the end of the reply, or `continue`, whatever the model says next. None leaves it
            to the editor.

    Raises:
        TypeError: one of them is of another type.
        ValueError: one of them is empty, or not valid Unicode; the last message is the assistant's own; or the subject does not
            stand in the prompt (of messages, in the last one).
    """

    prompt: Prompt
    target: str
    subject: str | None = field(default=None, compare=False)
    after: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", checked_prompt("Edit.prompt", self.prompt))
        if self.after not in (None, "stop", "continue"):
            raise ValueError(
                f"Edit.after must be 'stop', 'continue' or None, not {self.after!r:.60}."
            )
        _require_text("Edit.target", self.target)
        if self.subject is not None:
            _require_text("Edit.subject", self.subject)
            if self.subject not in prompt_words(self.prompt):
                raise ValueError(
                    f"Edit.subject {self.subject!r:.60} does not stand in the prompt {prompt_words(self.prompt)!r:.60}; "
                    "write it as it stands there, or leave it out."
                )


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
    prompt: Prompt
    answer: str
    topic: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Probe.kind must be one of {', '.join(KINDS)}, not {self.kind!r}.")
        if not isinstance(self.topic, str):
            raise TypeError(
                f"Probe.topic must be a string, empty for none, not {type(self.topic).__name__}."
            )
        object.__setattr__(self, "prompt", checked_prompt("Probe.prompt", self.prompt))
        _require_text("Probe.answer", self.answer)


@dataclass(frozen=True)
class Case:
    """One record of a benchmark or of a user's file: an edit, and the probes that judge it.

    Args:
        old_answer: the answer that the edit replaces, as the record names it; None where it names none. What the unedited
            model says may be something else.
    """

    edit: Edit
    probes: tuple[Probe, ...] = field(default=())
    old_answer: str | None = None

    def __post_init__(self) -> None:
        if self.old_answer is not None:
            _require_text("Case.old_answer", self.old_answer)

    def of_kind(self, kind: str) -> tuple[Probe, ...]:
        """List the probes of one kind."""
        return tuple(probe for probe in self.probes if probe.kind == kind)


@dataclass(frozen=True)
class Unrelated:
    """Text that an edit should leave alone, shown while editing so that the gates learn to stay closed (Sec. 2.4).

    `prompt` and `answer` are read at the same places as an edit's: the last prompt tokens and the answer.
    """

    prompt: Prompt
    answer: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", checked_prompt("Unrelated.prompt", self.prompt))
        _require_text("Unrelated.answer", self.answer)


def checked_prompt(name: str, value: Any) -> Prompt:
    """Return a text as it is, and messages as a tuple of `Message`s; refuse what is neither."""
    if isinstance(value, str):
        _require_text(name, value)
        return value
    if not isinstance(value, Sequence) or not value:
        raise TypeError(
            f"{name} must be a string or a list of messages, not {type(value).__name__} ({value!r:.60})."
        )
    messages = tuple(_message(name, item) for item in value)
    if messages[-1].role == "assistant":
        raise ValueError(
            f"{name} ends with a message of the assistant; leave that out, it is the answer."
        )
    return messages


def _message(name: str, item: Any) -> Message:
    if isinstance(item, Message):
        return item
    if not isinstance(item, Mapping) or set(item) != {"role", "content"}:
        raise TypeError(f"{name}: a message has role and content alone, not {item!r:.80}.")
    return Message(item["role"], item["content"])


def as_messages(prompt: Prompt) -> tuple[Message, ...]:
    """Give the messages of a prompt; a text is a user's message, without white space around it."""
    if isinstance(prompt, str):
        return (Message("user", prompt.strip()),)
    return tuple(_message("a prompt", item) for item in prompt)


def prompt_words(prompt: Prompt) -> str:
    """Give what stands for a prompt in a table: the text, or the last message."""
    return as_messages(prompt)[-1].content.strip()


def asked_words(prompt: Prompt) -> str:
    """Give what two prompts have in common that ask the same in the same words: those words, in lower case."""
    return " ".join(prompt_words(prompt).casefold().split())


def prompt_in_json(prompt: Prompt) -> Any:
    """Give a prompt as JSON has it: a text, or a list of messages."""
    if isinstance(prompt, str):
        return prompt
    return [{"role": message.role, "content": message.content} for message in as_messages(prompt)]


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
