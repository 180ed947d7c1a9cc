"""Neighbours of an edit: made from the other rows, never a question that some row teaches."""

from __future__ import annotations

import pytest

from peft_baft import Case, Edit, Probe
from peft_baft.data.cases import Message
from peft_baft_bench.questions.neighbour_questions import OTHER_RELATION, OTHER_SUBJECT, Neighbours

RELATIONS = ("The capital of {} is", "Who rules {}?", "{} was founded in", "The food of {} is")


def case(row: int, prompt: str, subject: str | None, target: str = "", **more: str) -> Case:
    probes = tuple(Probe(kind, text, "x") for kind, text in more.items() if kind != "old")
    text = prompt.format(subject)
    return Case(Edit(text, target or f"answer {row}", subject), probes, more.get("old"))


def rows(count: int) -> list[Case]:
    """Each country once, asked about one relation after another."""
    return [case(i, RELATIONS[i % 4], f"Land {chr(65 + i)}") for i in range(count)]


def asked(cases: list[Case], row: int, topic: str) -> list[str]:
    return [str(n.prompt) for n in Neighbours(cases).for_row(row) if n.topic == topic]


def test_the_subjects_of_the_next_rows_are_asked_for_the_same() -> None:
    assert asked(rows(8), 0, OTHER_SUBJECT) == [f"The capital of Land {x} is" for x in "BCDF"]
    # E's is passed over: row 4 teaches it. At the end, the rows begin again.
    assert asked(rows(8), 7, OTHER_SUBJECT) == [f"The food of Land {x} is" for x in "ABCE"]


def test_equal_subjects_are_passed_over_and_each_is_taken_once() -> None:
    names = ["Ulm", "ULM", "Rom", "Rom", "Ulm", "Bern"]
    cases = [case(i, f"{'x' * (i + 1)} of {{}} is", name) for i, name in enumerate(names)]
    assert asked(cases, 0, OTHER_SUBJECT) == ["x of Rom is", "x of Bern is"]


def test_a_question_that_another_row_teaches_comes_last() -> None:
    cases = rows(6)
    cases[2] = case(2, RELATIONS[2], "Land C", generality="The capital of  land B is")
    assert asked(cases, 0, OTHER_SUBJECT) == [f"The capital of Land {x} is" for x in "CDFB"]
    assert "the capital of land b is" in Neighbours(cases).taught_by([2, 3])
    assert "the capital of land b is" not in Neighbours(cases).taught_by([0, 1, 3])


def test_the_subject_is_asked_what_other_rows_ask_about_theirs() -> None:
    assert asked(rows(8), 0, OTHER_RELATION) == ["Who rules Land A?", "Land A was founded in"]
    assert asked(rows(8), 6, OTHER_RELATION) == [
        "The food of Land G is",
        "The capital of Land G is",
    ]


def test_a_question_that_may_ask_for_the_edit_in_other_words_is_passed_over() -> None:
    cases = [
        case(0, "When was {} discovered?", "Ulm", "1925", generality="The finding of Ulm was in"),
        case(1, "The discovery of {} was by", "Bern"),  # the same word, but for its end
        case(2, "In which year did {} appear?", "Rom"),  # asks for a time too
        case(3, "Who found it, {}? finding", "Nizza"),  # a word of the rephrasing
        case(4, "{} belongs to", "Ulm"),  # the same subject: it would be what that row teaches
        case(5, "{} is known for", "Graz", "1925"),  # the same answer
        case(6, "{} was named by", "Linz", old="1925"),
        case(7, "{} lies near", "Wien"),
    ]
    assert asked(cases, 0, OTHER_RELATION) == ["Ulm lies near"]


def test_a_records_own_questions_about_its_subject_come_first() -> None:
    cases = rows(8)
    own = case(0, RELATIONS[0], "Land A", locality="The river of Land A is")
    forgetful = Probe("locality", "The capital of Land A, which is not Ulm, is", "x")
    far = Probe("locality", "The river of Land B is", "x")
    cases[0] = Case(own.edit, (far, forgetful, *own.probes))
    assert asked(cases, 0, OTHER_RELATION) == ["The river of Land A is", "Who rules Land A?"]


def test_messages_keep_all_but_the_subject_of_the_last_one() -> None:
    cases = rows(3)
    turns = (
        {"role": "system", "content": "Land A."},
        {"role": "user", "content": "Where is Land A?"},
    )
    cases[0] = Case(Edit(turns, "here", "Land A"))
    other = next(n for n in Neighbours(cases).for_row(0) if n.topic == OTHER_SUBJECT)
    assert other.prompt == (Message("system", "Land A."), Message("user", "Where is Land B?"))


def test_rows_without_a_subject_have_no_neighbours_and_lend_none() -> None:
    cases = [case(0, "a {}", "Ulm"), case(1, "b", None), case(2, "c {}", "Bern")]
    assert Neighbours(cases).for_row(1) == []
    assert [n.prompt for n in Neighbours(cases).for_row(0)] == ["a Bern", "c Ulm"]
    with pytest.raises(ValueError, match="no record of the data names one"):
        Neighbours([case(1, "b", None)])
