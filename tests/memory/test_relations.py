"""The package's list of relations: every wording is about the subject, and names and wordings stand once."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from peft_baft.memory.statistics import relation_wordings


def test_every_wording_is_about_the_subject_and_stands_once() -> None:
    found = list(relation_wordings("Nobody"))
    assert all(text.count("Nobody") == 1 and "{" not in text for _, text in found)
    assert max(Counter(found).values()) == 1 and all(name.strip() == name for name, _ in found)
    # A relation stands in one line.
    names = [name for name, _ in found]
    changes = 1 + sum(a != b for a, b in pairwise(names))
    assert changes == len(set(names)) > 100
