"""Parse a question: its words, which of them name the subject, and which ask for something about it.

How rare a token is follows from its place in the vocabulary, because byte pair encoding merges the most frequent pairs first. No
statistics of texts are needed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from peft_baft.memory.english import (
    answer_kind,
    ends_sentence,
    is_function_word,
    numbers_in,
    preface_length,
)
from peft_baft.memory.keys import KEY_LENGTH
from peft_baft.memory.relations import Relations

RARE = 0.95  # a word is rare from this part of the vocabulary on, on a logarithmic scale
FUNCTION_WEIGHT = 0.5  # of a function word or sign in the relation; other words weigh 1
FUNCTION_RARITY = 0.3  # of a function word, in place of its own rarity
SHORTEST = 3  # tokens of a sentence that may be a question


@dataclass(frozen=True)
class Question:
    """A question as tokens.

    Attributes:
        ids: (n,) int32.
        keys: (n - 1, k) int8, of length 127. The first token has no key.
    """

    ids: Tensor
    keys: Tensor


@dataclass(frozen=True)
class ParsedQuestion:
    """A question as words. Tensors leave out the first token, which has no key.

    Attributes:
        keys: (n, k) float32, of length 1, one per token.
        word_index: (n,) long, the index in `words` of each token's word.
        words: in lower case.
        first_word: the text of the first token, in lower case.
        is_subject: (n,) bool, whether the token's word identifies the subject.
        is_content: (n,) bool, whether the token's word is neither a function word nor a sign.
        is_name: (n,) bool, whether the token's word is a name or a number.
        weights: the weight of each distinct word; together a vector of length 1.
        numbers: the numbers that the question mentions.
        answer_kind: the kind of answer it asks for, from `ANSWER_KINDS`, or `ANY_ANSWER`.
    """

    keys: Tensor
    word_index: Tensor
    words: list[str]
    first_word: str
    is_subject: Tensor
    is_content: Tensor
    is_name: Tensor
    weights: dict[str, float]
    numbers: frozenset[str]
    answer_kind: int

    @property
    def is_relation(self) -> Tensor:
        """(n,) bool, whether the token's word asks for something: it is neither part of the subject nor a function word."""
        return self.is_content & ~self.is_subject

    # The following are Python collections: for this few tokens they are faster to iterate over than tensors.
    @cached_property
    def all_words(self) -> frozenset[str]:
        """All words, including the first token."""
        return frozenset((*self.words, self.first_word))

    @cached_property
    def subject_tokens(self) -> list[tuple[int, str]]:
        """The places of the subject's tokens, each with its word."""
        word_index, is_subject = self.word_index.tolist(), self.is_subject.tolist()
        return [(n, self.words[word_index[n]]) for n in range(len(word_index)) if is_subject[n]]

    @cached_property
    def relation_tokens(self) -> list[tuple[int, float]]:
        """The places of the tokens outside the subject, each with its weight."""
        is_subject, is_content = self.is_subject.tolist(), self.is_content.tolist()
        return [
            (n, 1.0 if is_content[n] else FUNCTION_WEIGHT)
            for n in range(len(is_subject))
            if not is_subject[n]
        ]


@dataclass(frozen=True)
class _Word:
    """A word of a question. text: in lower case. rarity: at most 1."""

    text: str
    is_name: bool
    rarity: float

    @cached_property
    def has_letters(self) -> bool:
        return any(map(str.isalnum, self.text))

    @cached_property
    def is_content(self) -> bool:
        return self.has_letters and not is_function_word(self.text)


def parse_question(
    question: Question, texts: Sequence[str], relations: Relations | None = None
) -> ParsedQuestion:
    """Parse a question.

    Args:
        texts: the text of each token in the vocabulary, including the space before it.
        relations: common relations, whose words are not taken as the subject if there are other candidates.
    """
    words, word_index = _join_tokens(question, texts)
    keys = question.keys.float() / KEY_LENGTH
    relation_words: set[int] = set()
    if relations is not None:
        relation_words = set(word_index[relations.contains(keys)].tolist())
    first = _token_text(int(question.ids[0]), texts).strip() if len(question.ids) else ""

    def per_token(values: Sequence[bool]) -> Tensor:
        return torch.tensor(values, dtype=torch.bool)[word_index]

    return ParsedQuestion(
        keys=keys,
        word_index=word_index,
        words=[word.text for word in words],
        first_word=first.casefold(),
        is_subject=per_token(_are_subject(words, relation_words)),
        is_content=per_token([word.is_content for word in words]),
        is_name=per_token([word.is_name for word in words]),
        weights=_word_weights(words),
        numbers=frozenset(number for word in words for number in numbers_in(word.text)),
        # Names are left out: "Who" may be a band. The first token may be the word that asks.
        answer_kind=answer_kind([first, *(word.text for word in words if not word.is_name)]),
    )


def _join_tokens(question: Question, texts: Sequence[str]) -> tuple[list[_Word], Tensor]:
    """Join a question's tokens, except the first, to words.

    Returns:
        The words, and the index of each token's word, (n,).
    """
    tokens = question.ids[1:].tolist()
    token_texts = [_token_text(token, texts) for token in tokens]
    starts = [
        place
        for place, text in enumerate(token_texts)
        if place == 0 or text[:1] == " " or not text[:1].isalnum()
    ]
    words: list[_Word] = []
    word_index = torch.zeros(len(tokens), dtype=torch.long)
    for start, end in pairwise([*starts, len(tokens)]):
        parts = [text.strip() for text in token_texts[start:end]]
        is_name = start > 0 and (parts[0][:1].isupper() or parts[0][:1].isdigit())
        if start == 0 and (word_start := _split_word_start(question, texts)):
            parts = [word_start, *parts]
        # Frequent words are single tokens.
        rarity = 1.0 if len(parts) > 1 else _rarity(tokens[start], len(texts))
        word_index[start:end] = len(words)
        words.append(_Word("".join(parts).casefold(), is_name, rarity))
    return words, word_index


def _split_word_start(question: Question, texts: Sequence[str]) -> str:
    """Return the start of a word that was split across the first two tokens; "" if the second one begins a word."""
    if len(question.ids) < 2:
        return ""
    first, second = (_token_text(token, texts) for token in question.ids[:2].tolist())
    return first.strip() if first[-1:].isalnum() and second[:1].isalnum() else ""


def _token_text(token: int, texts: Sequence[str]) -> str:
    """Return the text of a token; a token added to the vocabulary later gets a word that no edit contains."""
    return texts[token] if token < len(texts) else f" <{token}>"


def _rarity(token: int, vocabulary: int) -> float:
    return math.log(max(token, 1)) / math.log(max(vocabulary, 2))


def _are_subject(words: Sequence[_Word], relation_words: Collection[int]) -> list[bool]:
    """Return for each word whether it identifies the subject.

    Names and rare words do. If there are none, all content words do. In either case, words of a common relation are left out if
    others remain.
    """
    content = [word.is_content for word in words]
    rare = [word.is_content and (word.is_name or word.rarity >= RARE) for word in words]
    for candidates in (rare, content):
        chosen = [is_in and n not in relation_words for n, is_in in enumerate(candidates)]
        if any(chosen):
            return chosen
    return rare if any(rare) else content


def _word_weights(words: Sequence[_Word]) -> dict[str, float]:
    """Return the weight of each distinct word with letters, normalised to a vector of length 1."""
    weights: dict[str, float] = defaultdict(float)
    for word in words:
        if word.has_letters:
            weights[word.text] += (word.rarity if word.is_content else FUNCTION_RARITY) ** 2
    length = math.sqrt(sum(weight**2 for weight in weights.values())) or 1.0
    return {text: weight / length for text, weight in weights.items() if weight}


def sentences(question: Question, texts: Sequence[str]) -> Iterator[Question]:
    """Yield a prompt as a whole, and then each part of it that may be the actual question.

    The parts are its sentences, and what follows a preface in them ("As far as Kurt Moor knows, where …").
    """
    yield question
    tokens = [_token_text(token, texts) for token in question.ids.tolist()]
    ends = [place + 1 for place in range(1, len(tokens)) if ends_sentence(tokens, place)]
    for start, end in pairwise(sorted({0, *ends, len(tokens)})):
        preface = preface_length(tokens[start:end])
        for first in sorted({start, start + preface}):
            is_part = (first, end) != (0, len(tokens))
            if is_part and end - first >= SHORTEST:
                before = max(first - 1, 0)  # the first token of a question has no key
                yield Question(question.ids[before:end], question.keys[before : end - 1])
