"""Questions and replies: what a neighbour is compared with, and what a free answer is judged by."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

import facts
from facts import CAPITALS, FactModel
from peft_baft import Case, Edit, Probe
from peft_baft.data.templates import CHAT
from peft_baft_bench.questions import asking
from peft_baft_bench.questions.asking import (
    Question,
    Reply,
    UneditedReplies,
    ask,
    data_questions,
    judge,
)

fact_model = facts.fact_model
NOTHING = torch.empty(0, dtype=torch.long)


def reply(statement: str | None, said: list[int], text: str = "") -> Reply:
    return Reply(torch.tensor(said), torch.tensor([1, 2, 3, 4]), text or statement or "", statement)


def neighbours(count: int) -> list[Question]:
    """The capitals of some countries, as neighbours of an edit to "Rom"."""
    return [Question(0, "neighbour", "subject", CAPITALS[n].prompt, "Rom") for n in range(count)]


def test_a_neighbour_is_judged_by_tokens_by_letters_and_by_the_new_answer() -> None:
    question = neighbours(1)[0]
    before = reply("Kasgrad lies there", [1, 2, 3, 4])
    same = judge(question, before, before)
    assert (same["match"], same["unchanged"], same["spared"]) == (1, True, True)
    other = judge(question, reply("Kasgrad lay there", [1, 2, 9, 9]), before)
    assert (other["match"], other["unchanged"], other["spared"]) == (0.5, False, True)
    moved = judge(question, reply("ROM, of course", [9, 9, 9, 9]), before)
    assert (moved["match"], moved["unchanged"], moved["spared"]) == (0, False, False)
    assert moved["before"] == "Kasgrad lies there" and moved["said"] == "ROM, of course"
    # What said the new answer before has not begun to say it.
    assert judge(question, reply("Rom", [1]), reply("Rom it is", [1]))["spared"] is True


def test_a_neighbour_about_which_nothing_is_said_should_stay_silent() -> None:
    question, silent = neighbours(1)[0], Reply(NOTHING, NOTHING, "", "")
    assert judge(question, silent, silent)["match"] == 1
    assert judge(question, Reply(NOTHING, NOTHING, "Rom", "Rom"), silent)["match"] == 0


def test_a_statement_is_right_if_it_holds_the_new_answer_and_not_the_old_one() -> None:
    question = Question(0, "reliability", "", "Where?", "Rom", old="Ulm")
    for statement, right in (("It is Rom.", True), ("Rom, once Ulm", False), ("", False)):
        entry = judge(question, reply(statement, [1], "It"), None)
        assert entry["contains"] is right and entry["statement"] == statement
        assert entry["said"] == "It" and entry["exact"] is False
    assert "contains" not in judge(question, reply(None, [1], "It"), None)  # it was not asked for


def test_the_old_answer_counts_where_the_new_one_is_asked_for() -> None:
    kinds = ("generality", "locality", "portability")
    probes = tuple(Probe(kind, "Where?", "there") for kind in kinds)
    questions = data_questions(3, Case(Edit("Where?", "Rom"), probes, old_answer="Ulm"))
    assert [(q.kind, q.old) for q in questions] == [
        ("reliability", "Ulm"),
        ("generality", "Ulm"),
        ("locality", None),
        ("portability", None),
    ]


def test_the_tokens_of_a_neighbour_are_what_the_unedited_model_says(fact_model: FactModel) -> None:
    base, tokenizer = fact_model.base, fact_model.tokenizer
    unedited, questions = UneditedReplies(tokenizer), neighbours(4)
    unedited.ask(base, questions)
    for n, question in enumerate(questions):
        known = unedited.reply(question)
        assert known is not None and known.text.startswith(CAPITALS[n].answer)
        assert torch.equal(known.predicted, known.expected)  # greedily, it says what it would say
        assert str(tokenizer.decode(known.expected)).strip() == known.statement
    again = ask(base, tokenizer, questions, unedited=unedited.reply)
    moved_model = deepcopy(base)
    moved_model.lm_head.weight.data = base.lm_head.weight.data.roll(1, 0)
    moved = ask(moved_model, tokenizer, questions, unedited=unedited.reply)
    for question, same, other in zip(questions, again, moved, strict=True):
        before = unedited.reply(question)
        assert judge(question, same, before)["match"] == 1
        assert judge(question, other, before)["match"] == 0  # the control


def test_the_unedited_model_is_asked_about_a_neighbour_once(
    fact_model: FactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    unedited, asked = UneditedReplies(fact_model.tokenizer), []
    real = asking.greedy_tokens

    def counted(model: Any, tokenizer: Any, rows: Any, *more: Any, **named: Any) -> Any:
        asked.append(len(rows))
        return real(model, tokenizer, rows, *more, **named)

    monkeypatch.setattr(asking, "greedy_tokens", counted)
    # Rows with other new answers ask alike; another kind with the same prompt does not.
    alike = [Question(row, "neighbour", "subject", CAPITALS[0].prompt, f"{row}") for row in (1, 2)]
    local = Question(0, "locality", "", CAPITALS[0].prompt, CAPITALS[0].answer)
    unedited.ask(fact_model.base, [*alike, local, *neighbours(2)])
    unedited.ask(fact_model.base, [*neighbours(3), local])
    assert asked == [3, 1]


def test_a_question_of_two_kinds_is_asked_for_a_statement_where_one_is_wanted(
    fact_model: FactModel,
) -> None:
    fact = CAPITALS[0]
    questions = [
        Question(0, kind, "", fact.prompt, fact.answer) for kind in ("locality", "reliability")
    ]
    local, edit = ask(fact_model.base, fact_model.tokenizer, questions, statement_tokens=8)
    assert local.statement is None
    assert edit.statement is not None and edit.statement.startswith(fact.answer)
    # The short text is the same with and without a statement.
    (short, _) = ask(fact_model.base, fact_model.tokenizer, questions[1:] * 2)
    assert short.statement is None and short.text == edit.text


def test_in_a_chat_a_statement_is_the_whole_turn(fact_model: FactModel) -> None:
    tokenizer = deepcopy(fact_model.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    question = neighbours(1)[0]
    line, stop = tokenizer("\n")["input_ids"][-1:], [tokenizer.eos_token_id]
    answer = tokenizer(" Kasgrad", add_special_tokens=False)["input_ids"]
    said = torch.tensor([*answer, *line, *answer, *stop, *answer])
    asked = asking._Asking(torch.nn.Module(), tokenizer, CHAT, 8, lambda _: None)
    assert asked._free(question, said)[1:] == ("Kasgrad\n Kasgrad", (*answer, *line, *answer))
    raw = asking._Asking(torch.nn.Module(), tokenizer, asking.RAW, 8, lambda _: None)
    assert raw._free(question, said)[1:] == ("Kasgrad", tuple(answer))
