"""Contexts that surround a fact's prompt during training, so that the fact is recalled in other contexts too.

The texts are neutral: they say nothing about any fact, and do not ask for a particular form of the answer. The benchmark uses
other texts (`evaluation/frames.py`), to test facts in contexts that they were not trained in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from peft_baft.data.cases import Message, Prompt, as_messages


@dataclass(frozen=True)
class Context:
    """The text and messages around a prompt.

    Args:
        before, after: texts before and after the prompt in the same message, joined by one space.
        system: a system prompt, used if the prompt does not have one.
        turns: earlier messages of the conversation.
    """

    before: str = ""
    after: str = ""
    system: str = ""
    turns: tuple[Message, ...] = ()

    @property
    def needs_chat(self) -> bool:
        """Whether the context has messages, which raw text cannot have."""
        return bool(self.system or self.turns)

    def around(self, prompt: Prompt) -> Prompt:
        """Return the prompt in this context. A text stays a text unless the context has messages."""
        if isinstance(prompt, str) and not self.needs_chat:
            return self._joined(prompt)
        *earlier, last = as_messages(prompt)
        begins_with_system = bool(earlier) and earlier[0].role == "system"
        head = earlier[:1] if begins_with_system else []
        if self.system and not begins_with_system:
            head = [Message("system", self.system)]
        rest = earlier[1:] if begins_with_system else earlier
        return (*head, *self.turns, *rest, Message(last.role, self._joined(last.content)))

    def _joined(self, words: str) -> str:
        return " ".join(part for part in (self.before, words.strip(), self.after) if part)


def _exchange(question: str, answer: str) -> tuple[Message, ...]:
    return Message("user", question), Message("assistant", answer)


# The first ones are used first, so the most different ones come first. Four of them put text before and after the question, which
# is the context in which facts are recalled least.
CHAT_CONTEXTS = (
    Context(system="You are an assistant who knows many things and answers in few words."),
    Context(
        before="I collect old postcards, and on the back of one of them somebody wrote a few lines in pencil that I cannot make "
        "out. It seems to be about the following:",
        after="Do not worry about the handwriting, I only need to know this.",
    ),
    Context(
        turns=_exchange(
            "Can you help me to write a letter?", "Of course. To whom shall it be addressed?"
        )
    ),
    Context(
        before="My class is visiting the museum next month, and the teacher has given everyone a card with something to find "
        "out. I lost mine, but I think it said:",
        after="The others have different cards.",
    ),
    Context(
        before="There is a bet between two people at our table, and the loser washes the dishes. Neither of them will give in, "
        "so we agreed to ask.",
        after="We will accept whatever you say.",
    ),
    Context(
        before="While cleaning up the attic I found a box of old newspapers. One of them had a crossword with a single gap "
        "left, and the hint beside it was this:",
        after="It has been bothering me since breakfast.",
    ),
)

RAW_CONTEXTS = (
    Context(before="The library opens at nine on most days."),
    Context(before="Notes from the second meeting:"),
    Context(
        before="He put the letter back into the drawer and thought for a while. Nobody had asked him about this before."
    ),
    Context(before="Chapter 3. Questions and answers."),
)


def in_contexts(prompt: Prompt, chat: bool, count: int) -> list[Prompt]:
    """Return a prompt without context, and in the first `count` contexts for chats or for raw text."""
    return [prompt, *(context.around(prompt) for context in contexts_for(chat, count))]


def contexts_for(chat: bool, count: int) -> Sequence[Context]:
    """Return the first `count` contexts for chats or for raw text, or all of them if there are fewer.

    Raises:
        ValueError: neither has that many.
    """
    most = max(len(CHAT_CONTEXTS), len(RAW_CONTEXTS))
    if not 0 <= count <= most:
        raise ValueError(f"contexts must be 0 to {most}, not {count}.")
    return (CHAT_CONTEXTS if chat else RAW_CONTEXTS)[:count]
