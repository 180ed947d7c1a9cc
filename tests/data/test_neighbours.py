"""Prompts that look like a fact's and ask for something else."""

from __future__ import annotations

import pytest

from peft_baft.data.cases import Message
from peft_baft.data.neighbours import (
    SUBJECTS,
    other_questions,
    other_subjects,
    subject_candidates,
    terse_wordings,
    with_other_subject,
)

QUESTION = "What is the capital of France?"


def test_other_subjects_are_the_same_ones_each_time_and_never_the_fact_s_own() -> None:
    chosen = other_subjects("Where is the Eiffel Tower?", "Eiffel Tower", len(SUBJECTS))
    assert chosen == other_subjects("Where is the Eiffel Tower?", "Eiffel Tower", len(SUBJECTS))
    assert "the Eiffel Tower" not in chosen
    assert len(set(chosen)) == len(SUBJECTS) - 1
    assert other_subjects(QUESTION, "France", 5) != other_subjects("Who leads France?", "France", 5)


def test_the_subject_is_exchanged_and_nothing_else() -> None:
    assert with_other_subject(QUESTION, "France", "Peru") == "What is the capital of Peru?"
    assert with_other_subject("The Nile ends in", "Nile", "the Danube") == "the Danube ends in"
    turns = (Message("user", "France?"), Message("assistant", "Yes."), Message("user", QUESTION))
    exchanged = with_other_subject(turns, "France", "Peru")
    assert exchanged == (*turns[:2], Message("user", "What is the capital of Peru?"))
    with pytest.raises(ValueError, match="'Spain' does not occur in the prompt"):
        with_other_subject(QUESTION, "Spain", "Peru")


def test_other_questions_are_about_the_same_subject() -> None:
    for chat in (False, True):
        questions = other_questions(QUESTION, "France", chat, 3)
        assert len(set(questions)) == 3
        assert all(
            "France" in str(question) and "capital" not in str(question) for question in questions
        )
    turns = (Message("system", "Be brief."), Message("user", QUESTION))
    assert other_questions(turns, "France", True, 1)[0][0] == turns[0]


def test_terse_wordings_hold_the_subject_and_the_content_words() -> None:
    assert terse_wordings(QUESTION, "France")[:2] == ["France: capital", "capital, France"]
    for text in terse_wordings("Which capital does France have?", "France"):
        assert isinstance(text, str)
        assert "France" in text
        assert "capital" in text
        assert "Which" not in text
    assert terse_wordings("What is France?", "France") == []


@pytest.mark.parametrize(
    ("prompt", "subject"),
    [
        (QUESTION, "France"),
        ("The headquarters of Nokia is in", "Nokia"),
        ("Who directed Gone with the Wind?", "Gone"),
        ("The University of Oxford was founded in", "University of Oxford"),
        ("who wrote the origin of species", "species"),
        ('Who sings "Let It Be"?', "Let It Be"),
    ],
)
def test_the_subject_is_among_the_candidates(prompt: str, subject: str) -> None:
    candidates = subject_candidates(prompt)
    assert subject in candidates
    assert all(candidate in prompt for candidate in candidates)
    assert "What" not in candidates
    assert "Who" not in candidates
