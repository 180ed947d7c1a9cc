"""The facts of a journal: which of them the adapter should know, and in which form they were taught."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from peft_baft.data.cases import Case, Edit, Message, Probe
from peft_baft.editing.journal import EditLine, Journal, ReturnLine, RunLine
from peft_baft.tools.report.taught import (
    facts_of_cases,
    facts_of_journal,
    unknown_cases,
    with_cases,
)

CHAT = {"templates": "(Template(chat=True, options={}),)"}
BOTH = {"templates": "(Template(chat=False, options={}), Template(chat=True, options={}))"}


def line(number: int, *facts: list[Any], **more: Any) -> EditLine:
    fields: dict[str, Any] = {"steps": 5, "loss": 0.01, "seconds": 1.5, "learned": True}
    fields |= {"problem": None, "kept": True, **more}
    return EditLine(number, facts, **fields)


def journal(folder: Path, *lines: Any) -> Journal:
    made = Journal(folder)
    for each in lines:
        made.add(each)
    return made


def test_each_fact_has_the_form_of_the_run_that_taught_it(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "d"}]
    lines = [RunLine(0, {}), line(1, ["a", "x"]), RunLine(1, CHAT), line(2, ["b", "x"])]
    lines += [RunLine(2, BOTH), line(3, ["c", "x"]), line(4, [messages, "x"])]
    facts = facts_of_journal(journal(tmp_path, *lines))
    assert [fact.forms for fact in facts] == [("raw",), ("chat",), ("raw", "chat"), ("chat",)]
    assert facts[3].prompt == (Message("user", "d"),)


def test_facts_of_a_batch_have_their_place_in_it_and_share_its_cost(tmp_path: Path) -> None:
    facts = facts_of_journal(
        journal(tmp_path, line(1, ["a", "x"]), line(2, ["b", "x"], ["c", "y"]))
    )
    assert [fact.key for fact in facts] == ["1", "2.1", "2.2"]
    assert [fact.batch for fact in facts] == [1, 2, 2] and facts[2].seconds == 1.5


def test_what_was_rolled_back_taken_back_or_replaced_is_not_in_the_adapter(tmp_path: Path) -> None:
    lines = [line(1, ["a", "x"]), line(2, ["b", "x"]), ReturnLine(1), line(2, ["c", "x"])]
    lines += [line(3, ["d", "x"], kept=False, problem="harm"), line(4, [" a ", "y"])]
    facts = facts_of_journal(journal(tmp_path, *lines))
    assert [fact.prompt for fact in facts] == ["a", "c", "d", " a "]
    assert [fact.in_adapter for fact in facts] == [False, True, False, True]
    assert facts[0].replaced_by == "4" and facts[2].replaced_by is None


def test_a_later_edit_that_was_taken_back_replaces_nothing(tmp_path: Path) -> None:
    lines = [line(1, ["a", "x"]), line(2, ["a", "y"], kept=False)]
    first, second = facts_of_journal(journal(tmp_path, *lines))
    assert first.in_adapter and not second.in_adapter


@pytest.mark.parametrize("fact", [["a"], ["a", ""], [7, "x"], [[], "x"]])
def test_a_fact_that_is_none_is_refused_with_its_edit(tmp_path: Path, fact: list[Any]) -> None:
    with pytest.raises(ValueError, match="edit 3, is damaged"):
        facts_of_journal(journal(tmp_path, line(3, fact)))


def test_the_edit_file_adds_what_a_journal_does_not_know(tmp_path: Path) -> None:
    probes = (Probe("generality", "is a?", "x"), Probe("locality", "is c?", "no"))
    case = Case(Edit("what is a", "x", "a"), probes, "old")
    other = Case(Edit("what is b", "x"))
    facts = facts_of_journal(journal(tmp_path, line(1, ["what is a ", "x"]), line(2, ["e", "x"])))
    first, second = with_cases(facts, [case, other])
    assert (first.subject, first.rephrasings, first.nearby) == ("a", ("is a?",), ("is c?",))
    assert first.old == "old" and second == facts[1]
    assert unknown_cases(facts, [case, other]) == 1
    alone = facts_of_cases([case])
    assert alone == [
        replace(
            first, prompt="what is a", forms=(), steps=None, seconds=None, loss=None, learned=None
        )
    ]
