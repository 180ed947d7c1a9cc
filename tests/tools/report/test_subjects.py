"""Other subjects are of the fact's rough kind, and none that training has held in place."""

from __future__ import annotations

import pytest

from peft_baft.data.neighbours import SUBJECTS
from peft_baft.tools.report.subjects import NAMES, kind_of, neighbouring_subjects


def bare(names: tuple[str, ...]) -> set[str]:
    return {name.casefold().removeprefix("the ") for name in names}


def test_no_name_is_one_that_facts_are_trained_beside() -> None:
    built_in = bare(tuple(name for names in NAMES.values() for name in names))
    assert len(built_in) == sum(map(len, NAMES.values())) and not built_in & bare(SUBJECTS)


@pytest.mark.parametrize(
    ("prompt", "subject", "kind"),
    [
        ("What is the capital of Utopia?", "Utopia", "country"),
        ("Where was Jo Doe born?", "Jo Doe", "person"),
        ("Who is the author of Vast Skies?", "Vast Skies", "work"),
        ("Where are the headquarters of Acme?", "Acme", "organisation"),
        ("Which river flows through Utopia?", "Utopia", "place"),
        ("Tell me of Spain", "Spain", "country"),
        ("Tell me of Utopia", "Utopia", None),
        # What stands in the subject itself tells nothing.
        ("Tell me of River City", "River City", None),
    ],
)
def test_the_kind_is_told_by_the_name_or_by_the_question(prompt, subject, kind) -> None:
    assert kind_of(prompt, subject) == kind


def test_subjects_of_other_facts_of_the_kind_come_first_and_the_own_never() -> None:
    prompt = "What is the capital of Utopia?"
    others = [
        ("Utopia", "country"),
        ("Arcadia", "country"),
        ("Jo Doe", "person"),
        ("Spain", "country"),
    ]
    found = neighbouring_subjects(prompt, "Utopia", others)
    assert {name for name, of_fact in found if of_fact} == {"Arcadia", "Spain"}
    assert [of_fact for _, of_fact in found] == [True] * 2 + [False] * (len(NAMES["country"]) - 1)
    names = [name for name, _ in found]
    assert len(set(names)) == len(names) and found == neighbouring_subjects(
        prompt, "Utopia", others
    )


def test_without_a_kind_any_name_may_stand_there() -> None:
    found = neighbouring_subjects("Tell me of Utopia", "Utopia", [("Jo Doe", "person")])
    assert len(found) == sum(map(len, NAMES.values()))
