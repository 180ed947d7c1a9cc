"""Other subjects for a fact's question: those of the adapter's other facts first, then well-known names of the same rough kind.

None of these names is among those that facts are trained beside (`data/neighbours.py`), so that what is asked here was never
held in place by the training.
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
# Words of a question that tell what it is about. The first kind whose words occur is taken.
CLUES = {
    "work": "novel book film movie album song series episode opera painting author director composer lyrics character publisher",
    "organisation": "company founded headquarter headquarters ceo manufacturer club airline employer organisation organization",
    "person": "born birth died death mother father spouse wife husband child married he she his her profession occupation "
    "citizenship educated university attended played plays position award instrument gender",
    "country": "capital currency president anthem continent official",
    "place": "city river mountain lake located country population county region borders bridge",
}


def kind_of(prompt: Prompt, subject: str) -> str | None:
    """Guess what a question's subject is: a key of `NAMES`; None where nothing tells."""
    for kind, names in NAMES.items():
        if _bare(subject) in map(_bare, names):
            return kind
    asked = prompt_words(prompt).replace(subject, " ").casefold()
    words = set(re.findall(r"\w+", asked))
    return next((kind for kind, clues in CLUES.items() if words & set(clues.split())), None)


def neighbouring_subjects(
    prompt: Prompt, subject: str, others: Iterable[tuple[str, str | None]]
) -> list[tuple[str, bool]]:
    """List the subjects to exchange a question's own for, the best first.

    Args:
        others: the subjects of the adapter's other facts, each with its kind.

    Returns:
        Subjects of other facts of the same kind, or of no known one, then well-known names; whether each is of a fact. They are
        always the same ones for the same question.
    """
    kind = kind_of(prompt, subject)
    alike = [other for other, of_kind in others if of_kind == kind]
    of_facts = other_subjects(prompt, subject, len(alike), list(dict.fromkeys(alike)))
    names = _names(kind)
    built_in = other_subjects(prompt, subject, len(names), names)
    chosen = dict.fromkeys((name, True) for name in of_facts)
    known = set(map(_bare, of_facts))
    return [*chosen, *((name, False) for name in built_in if _bare(name) not in known)]


def _names(kind: str | None) -> Sequence[str]:
    if kind is not None:
        return NAMES[kind]
    return [name for names in NAMES.values() for name in names]


def _bare(name: str) -> str:
    return name.casefold().removeprefix("the ")
