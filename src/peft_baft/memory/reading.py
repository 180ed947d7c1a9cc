"""How a prompt's tokens are read: which of them are the question, in which form it is asked, and what follows an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

Ids = tuple[int, ...]
OPENING = (
    "(",
    "[",
    "{",
    '"',
    "'",
    "“",
    "‘",
    "«",
    "`",
    ">",
    "=",
    "/",
)  # signs after which no space stands


@dataclass(frozen=True)
class Asked:
    """What a prompt asks.

    Attributes:
        question: ids of the question's tokens, after the token that always precedes them.
        is_chat: whether it is the user's last message in the chat template, up to where the reply begins.
        begun: ids of the reply's tokens that the prompt itself holds after that: a prefilled reply.
        is_open: whether what is said next begins without a space.
    """

    question: Ids
    is_chat: bool
    begun: Ids
    is_open: bool


@dataclass(frozen=True)
class Reading:
    """What a tokenizer and its chat template put around questions and answers.

    Attributes:
        texts: of each token of the vocabulary, what it stands for, with the space before it.
        relations: names of the common relations of which a memory knows wordings.
        first: what always precedes a question's tokens when their keys are made.
        start: special tokens before every raw text.
        before, after: what the chat template puts directly before a user's words, and after them up to the reply; empty where
            the tokenizer has no template.
        lead: what the template puts before the answer, such as an empty thinking block.
        chat_end, raw_end: what ends a reply in a chat, and in raw text.
    """

    texts: tuple[str, ...] = ()
    relations: tuple[str, ...] = ()
    first: Ids = ()
    start: Ids = ()
    before: Ids = ()
    after: Ids = ()
    lead: Ids = ()
    chat_end: Ids = ()
    raw_end: Ids = ()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Reading:
        """Make it of what `to_json` gave."""
        return cls(**{field.name: tuple(value.get(field.name, ())) for field in fields(cls)})

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)

    def read(self, prompt: Sequence[int]) -> Asked:
        """Read a prompt: in a chat, its question is the user's last message; else all of it."""
        ids = tuple(prompt)
        end = _last(ids, self.after) if self.after else None
        if end is not None:
            begin = _last(ids[:end], self.before)
            begun = ids[end + len(self.after) :]
            if begin is not None and _last(begun, self.before) is None:
                question = ids[begin + len(self.before) : end]
                return Asked((*self.first, *question), True, begun, self._is_open(begun))
        words = (
            ids[len(self.start) :] if self.start and ids[: len(self.start)] == self.start else ids
        )
        return Asked((*self.first, *words), False, (), self._is_open(words))

    def _is_open(self, ids: Ids) -> bool:
        text = "".join(self.texts[i] if i < len(self.texts) else "" for i in ids[-2:])
        return not text or text[-1].isspace() or text.endswith(OPENING)

    def reply(self, asked: Asked, spaced: Ids, bare: Ids, *, stops: bool) -> Ids:
        """Return the tokens that answer a question in the form in which it is asked.

        Args:
            spaced, bare: the answer after a space, and without. stops: whether the reply ends with it.
        """
        if not asked.is_chat:
            end = self.raw_end if stops else ()
            return (*(bare if asked.is_open else spaced), *end)
        end = self.chat_end if stops else ()
        whole = (*self.lead, *bare)
        if whole[: len(asked.begun)] == asked.begun:
            return (*whole[len(asked.begun) :], *end)
        # The prompt begins the reply in other words: the answer follows these.
        return (*(bare if asked.is_open else spaced), *end)


def _last(ids: Ids, part: Ids) -> int | None:
    """Return where some tokens stand last in others; None if they do not."""
    for place in range(len(ids) - len(part), -1, -1):
        if ids[place : place + len(part)] == part:
            return place
    return None
