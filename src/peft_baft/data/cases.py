"""Plain values for facts: the edits to make and the probes that test them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

KINDS = ("generality", "locality", "portability")


@dataclass(frozen=True)
class Message:
    """A message of a conversation, with the role `system`, `user`, `assistant` or `tool`."""

    role: str
    content: str

    def __post_init__(self) -> None:
        _require_text("a message's role", self.role)
        _require_text("a message's content", self.content)


# A text, or the messages of a conversation. The classes below store messages as a tuple of `Message`s.
Prompt = str | Sequence[Message | Mapping[str, Any]]


@dataclass(frozen=True)
class Edit:
    """A fact to learn: after `prompt`, the model should say `target`.

    White space around both is ignored. The editor's template determines how they are joined: by one space in raw text, or with
    the target as the assistant's turn in a chat.

    Args:
        prompt: a text, or messages such as `[{"role": "user", "content": "..."}]`, of which the last one awaits the reply.
        target: the answer.
        subject: the words of the prompt that name what the fact is about, such as `France`. Neighbouring questions are made by
            replacing them. If it is None, the editor finds the subject. Edits that differ only in it are equal.
        after: what follows the answer: `stop` (the end of the reply), `continue` (whatever the model says next), or None to let
            the editor decide.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is empty or not valid Unicode; the last message is one of the assistant; or the subject does not
            occur in the prompt (for messages, in the last one).
    """

    prompt: Prompt
    target: str
    subject: str | None = field(default=None, compare=False)
    after: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", validated_prompt("Edit.prompt", self.prompt))
        if self.after not in (None, "stop", "continue"):
            raise ValueError(
                f"Edit.after must be 'stop', 'continue' or None, not {self.after!r:.60}."
            )
        _require_text("Edit.target", self.target)
        if self.subject is not None:
            _require_text("Edit.subject", self.subject)
            if self.subject not in prompt_words(self.prompt):
                raise ValueError(
                    f"Edit.subject {self.subject!r:.60} does not occur in the prompt {prompt_words(self.prompt)!r:.60}; "
                    "write it exactly as in the prompt, or leave it out."
                )


@dataclass(frozen=True)
class Probe:
    """A question with an answer, to test what an edit did.

    Args:
        kind: `generality` (a rephrasing of the edit, whose answer should be the new one), `portability` (a consequence of the
            edit) or `locality` (an unrelated question, whose answer should not change).
        prompt: the question. answer: the answer whose tokens the model's output is compared with.
        topic: a benchmark's name for a subtype of the kind, such as `Reasoning`; empty if it has none.
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
        object.__setattr__(self, "prompt", validated_prompt("Probe.prompt", self.prompt))
        _require_text("Probe.answer", self.answer)


@dataclass(frozen=True)
class Case:
    """A record of a benchmark or of a user's file: an edit and the probes that test it.

    Args:
        old_answer: the answer that the edit replaces according to the record, or None if the record does not say. The unedited
            model may say something else.
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
    """Text that an edit should not change. Editors train on it so that the gates learn to stay closed there (Sec. 2.4).

    The gates are evaluated at the same positions as in an edit: the last prompt tokens and the answer.
    """

    prompt: Prompt
    answer: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompt", validated_prompt("Unrelated.prompt", self.prompt))
        _require_text("Unrelated.answer", self.answer)


def validated_prompt(name: str, value: Any) -> Prompt:
    """Return a text unchanged, or messages as a tuple of `Message`s; raise an error if it is neither."""
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
            f"{name} ends with a message of the assistant; leave it out, since it is the answer."
        )
    return messages


def _message(name: str, item: Any) -> Message:
    if isinstance(item, Message):
        return item
    if not isinstance(item, Mapping) or set(item) != {"role", "content"}:
        raise TypeError(f"{name}: a message must have role and content only, not {item!r:.80}.")
    return Message(item["role"], item["content"])


def as_messages(prompt: Prompt) -> tuple[Message, ...]:
    """Return the messages of a prompt; a text becomes a user message, stripped of white space."""
    if isinstance(prompt, str):
        return (Message("user", prompt.strip()),)
    return tuple(_message("a prompt", item) for item in prompt)


def prompt_words(prompt: Prompt) -> str:
    """Return the text of a prompt, or that of its last message."""
    return as_messages(prompt)[-1].content.strip()


def asked_words(prompt: Prompt) -> str:
    """Return the words of a prompt in lower case; they are equal for prompts that ask the same question in the same words."""
    return " ".join(prompt_words(prompt).casefold().split())


def prompt_in_json(prompt: Prompt) -> Any:
    """Return a JSON-serialisable prompt: a text or a list of messages."""
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
