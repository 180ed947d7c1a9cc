"""Read the package's list of common relations, by which a memory of edits tells what a question asks of its subject."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files


def wordings(subject: str) -> Iterator[tuple[str, str]]:
    """Give the name of a relation and a question or statement about a subject that asks for it, for all wordings of all."""
    text = files("peft_baft.data").joinpath("relations.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        name, listed = line.split(":", 1)
        for wording in listed.split("|"):
            yield name, wording.strip().replace("{}", subject)
