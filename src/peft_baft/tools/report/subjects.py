"""Other subjects for a fact's question: those of the adapter's other facts, then well-known names of roughly the same kind.

None of these names is used in training (`data/neighbours.py`), so that the report asks questions that training did not protect.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from peft_baft.data.cases import Prompt, prompt_words
from peft_baft.data.neighbours import other_subjects

NAMES = {
    "country": (
        *("Spain", "Poland", "Kenya", "Thailand", "Chile", "Finland", "Egypt", "Portugal"),
        *("Vietnam", "Greece", "Morocco", "Mexico"),
    ),
    "place": (
        *("Vienna", "Boston", "Osaka", "Melbourne", "Warsaw", "Toronto", "Barcelona", "Havana"),
        *("the Rhine", "Lake Geneva", "Mount Etna", "the Golden Gate Bridge"),
    ),
    "person": (
        *("Albert Einstein", "Frida Kahlo", "Charles Dickens", "Ada Lovelace", "Rosa Parks"),
        *("Johann Sebastian Bach", "Alfred Hitchcock", "Muhammad Ali", "Galileo Galilei"),
        *("Agatha Christie", "Winston Churchill", "Ella Fitzgerald"),
    ),
    "organisation": (
        *("IBM", "Honda", "Volvo", "Harvard University", "Greenpeace", "FC Barcelona", "Sony"),
        *("the United Nations", "Boeing", "Nestlé", "the New York Times", "Adidas"),
    ),
    "work": (
        *("Macbeth", "The Godfather", "Star Wars", "Moby Dick", "War and Peace", "The Matrix"),
        *("Bohemian Rhapsody", "The Simpsons", "Guernica", "Jane Eyre", "Jurassic Park"),
        "The Magic Flute",
    ),
}
# Words that tell the kind of a question's subject. The first kind with a word in the question is used.
CLUES = {
    "work": "novel book film movie album song series episode opera painting author director composer lyrics character publisher",
    "organisation": "company founded headquarter headquarters ceo manufacturer club airline employer organisation organization",
    "person": "born birth died death mother father spouse wife husband child married he she his her profession occupation "
    "citizenship educated university attended played plays position award instrument gender",
    "country": "capital currency president anthem continent official",
    "place": "city river mountain lake located country population county region borders bridge",
}


def kind_of(prompt: Prompt, subject: str) -> str | None:
    """Guess the kind of a question's subject: a key of `NAMES`, or None if there is no clue."""
    for kind, names in NAMES.items():
        if _bare(subject) in map(_bare, names):
            return kind
    asked = prompt_words(prompt).replace(subject, " ").casefold()
    words = set(re.findall(r"\w+", asked))
    return next((kind for kind, clues in CLUES.items() if words & set(clues.split())), None)


def neighbouring_subjects(
    prompt: Prompt, subject: str, others: Iterable[tuple[str, str | None]]
) -> list[tuple[str, bool]]:
    """List subjects to replace a question's subject with, the best first.

    Args:
        others: the subjects of the adapter's other facts, each with its kind.

    Returns:
        First the subjects of other facts of the same kind (or also of unknown kind), then well-known names; each with whether it
        belongs to a fact. The list is the same whenever the question is.
    """
    kind = kind_of(prompt, subject)
    same_kind = list(dict.fromkeys(other for other, its_kind in others if its_kind == kind))
    from_facts = other_subjects(prompt, subject, len(same_kind), same_kind)
    names = _names(kind)
    built_in = other_subjects(prompt, subject, len(names), names)
    used = set(map(_bare, from_facts))
    new = [name for name in built_in if _bare(name) not in used]
    return [*((name, True) for name in from_facts), *((name, False) for name in new)]


def _names(kind: str | None) -> Sequence[str]:
    if kind is not None:
        return NAMES[kind]
    return [name for names in NAMES.values() for name in names]


def _bare(name: str) -> str:
    return name.casefold().removeprefix("the ")
