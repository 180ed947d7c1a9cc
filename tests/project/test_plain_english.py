"""Words and phrases that make a native reader stop: how often they stand in src/, docs/ and README.md may only fall.

The list is a help, not the aim. Words that have a plain meaning too ("alone", "beside") are counted where they stand in prose,
and a few of them stay.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PHRASES = (
    r"\balone\b",
    r"\bbeside\b",
    r"\bbehind\b",
    r"\banew\b",
    r"\bof (its|their|your|our) own\b",
    r"\bso (many|much)\b",
    r"\b(told|tell|tells) (them |it )?apart\b",
    r"\bgo(es)? on\b",
    r"\bis no\b",
    r"\bare no\b",
    r"\bby what\b",
    r"\bwhoever\b",
    r"\bwhat stands\b",
    r"\bstands? in (for|the)\b",
    r'"""(Give|Tell|Say|Do as|Let)\b',
    r"\bHeldVectors\b",
    r"\b(def|class) (of|held|told|said)_",
)
# By place, how many there are. Lower a number when you have removed some; never raise one.
MOST = {"src": 67, "docs": 102, "README.md": 0}


def occurrences(text: str) -> int:
    return sum(len(re.findall(phrase, text)) for phrase in PHRASES)


def count(place: str) -> int:
    path = ROOT / place
    if path.is_file():
        return occurrences(path.read_text("utf-8"))
    files = [file for kind in ("*.py", "*.md") for file in path.rglob(kind)]
    # The log quotes what was thought at the time.
    return sum(occurrences(file.read_text("utf-8")) for file in files if file.name != "log.md")


def test_the_count_of_odd_phrases_only_falls() -> None:
    found = {place: count(place) for place in MOST}
    too_many = {place: n for place, n in found.items() if n > MOST[place]}
    assert not too_many, f"more than {MOST}: {too_many}"
    fallen = {place: n for place, n in found.items() if n < MOST[place]}
    assert not fallen, f"fewer than before: write {fallen} into MOST"


def test_the_count_notices_a_phrase() -> None:
    assert occurrences('"""Give the sum. It goes on alone, beside the others."""') == 4
    assert occurrences('"""Return the sum. It continues by itself, next to the others."""') == 0
