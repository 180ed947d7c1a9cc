"""Split a prompt's tokens: find the question and the form in which it is asked, and build the reply's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

Ids = tuple[int, ...]
# Characters after which the next word is written without a space.
OPENING = ("(", "[", "{", '"', "'", "“", "‘", "«", "`", ">", "=", "/")


@dataclass(frozen=True)
class SplitPrompt:
    """A prompt, split into its parts.

    Attributes:
        question: ids of the question's tokens, after the token that always precedes them.
        is_chat: whether the question is the user's last message in the chat template.
        prefill: ids of the reply's first tokens, if the prompt contains them.
        is_open: whether the next word is written without a space.
    """

    question: Ids
    is_chat: bool
    prefill: Ids
    is_open: bool


@dataclass(frozen=True)
class PromptFormat:
    """What a tokenizer and its chat template put around questions and answers. The field names are keys of saved JSON.

    Attributes:
        texts: the text of each token in the vocabulary, including the space before it.
        relations: names of the common relations for which the memory has wordings.
        first: the token that precedes a question when its keys are computed.
        start: special tokens before raw text.
        before, after: tokens that the chat template puts directly before a user's message, and after it up to the reply. Empty if
            the tokenizer has no template.
        lead: tokens that the template puts before the answer, such as an empty thinking block.
        chat_end, raw_end: tokens that end a reply in a chat, and in raw text.
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
    def from_json(cls, value: Mapping[str, Any]) -> PromptFormat:
        """Load what `to_json` returned."""
        return cls(**{field.name: tuple(value.get(field.name, ())) for field in fields(cls)})

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON can represent them."""
        return asdict(self)

    def split(self, prompt: Sequence[int]) -> SplitPrompt:
        """Split a prompt. In a chat, the question is the user's last message; in raw text, the whole prompt."""
        ids = tuple(prompt)
        end = _last(ids, self.after) if self.after else None
        if end is not None:
            begin = _last(ids[:end], self.before)
            prefill = ids[end + len(self.after) :]
            if begin is not None and _last(prefill, self.before) is None:
                question = ids[begin + len(self.before) : end]
                return SplitPrompt((*self.first, *question), True, prefill, self._is_open(prefill))
        has_start = bool(self.start) and ids[: len(self.start)] == self.start
        words = ids[len(self.start) :] if has_start else ids
        return SplitPrompt((*self.first, *words), False, (), self._is_open(words))

    def _is_open(self, ids: Ids) -> bool:
        """Return whether the word after some tokens is written without a space."""
        text = "".join(self.texts[i] if i < len(self.texts) else "" for i in ids[-2:])
        return not text or text[-1].isspace() or text.endswith(OPENING)

    def reply(self, prompt: SplitPrompt, spaced: Ids, bare: Ids, *, stops: bool) -> Ids:
        """Return the tokens that follow a prompt, in the form in which its question is asked.

        Args:
            spaced, bare: the answer's tokens after a space, and without one.
            stops: whether the reply ends after the answer.
        """
        end: Ids = ()
        if stops:
            end = self.chat_end if prompt.is_chat else self.raw_end
        whole = (*self.lead, *bare)
        if prompt.is_chat and whole[: len(prompt.prefill)] == prompt.prefill:
            return (*whole[len(prompt.prefill) :], *end)
        # Raw text, or a reply that begins with other words: the answer follows them.
        return (*(bare if prompt.is_open else spaced), *end)


def _last(ids: Ids, part: Ids) -> int | None:
    """Return the last place at which a sequence contains another one; None if it does not."""
    for place in range(len(ids) - len(part), -1, -1):
        if ids[place : place + len(part)] == part:
            return place
    return None
