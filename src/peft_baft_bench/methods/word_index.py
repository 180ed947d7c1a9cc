"""Find the most similar text by its words: cosines of tf-idf vectors."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cached_property

from peft_baft.data.cases import prompt_words
from peft_baft.data.unrelated import GENERAL


class WordIndex:
    """Compares texts with a list of texts by their words.

    Words are weighted by how rare they are in the list and the neutral texts.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = list(texts)
        self._neutral = [prompt_words(text.prompt) for text in GENERAL]
        corpus = [*self._texts, *self._neutral]
        self._documents = Counter(word for text in corpus for word in set(_words(text)))
        self._count = len(corpus)
        self._vectors = [self._vector(text) for text in self._texts]

    def _vector(self, text: str) -> dict[str, float]:
        """Return a text's tf-idf weights, normalised to length 1."""
        weights = {
            word: times * (1 + math.log((1 + self._count) / (1 + self._documents[word])))
            for word, times in Counter(_words(text)).items()
        }
        length = math.sqrt(sum(weight**2 for weight in weights.values())) or 1.0
        return {word: weight / length for word, weight in weights.items()}

    @cached_property
    def threshold(self) -> float:
        """The largest cosine of a neutral text with a listed text or with another neutral text."""
        neutral = [self._vector(text) for text in self._neutral]
        others = [cosine(a, b) for i, a in enumerate(neutral) for b in neutral[:i]]
        edits = [cosine(a, b) for a in neutral for b in self._vectors]
        return max(*others, *edits, 0.0)

    def cosines(self, text: str) -> list[float]:
        """Compute the cosine of a text with each listed text."""
        vector = self._vector(text)
        return [cosine(vector, other) for other in self._vectors]

    def match(self, text: str) -> int | None:
        """Return the index of the most similar listed text; None unless its cosine is above the threshold."""
        best, number = max(
            zip(self.cosines(text), range(len(self._texts)), strict=True), default=(0.0, 0)
        )
        return number if best > self.threshold else None


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def cosine(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """Compute the dot product of two sparse vectors of length 1."""
    small, large = sorted((a, b), key=len)
    return sum(weight * large[word] for word, weight in small.items() if word in large)
