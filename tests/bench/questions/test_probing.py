"""What a benchmark asks about each row beyond the data's own questions."""

from __future__ import annotations

import pytest

import facts
from facts import FactModel
from peft_baft import Case, Edit
from peft_baft.data.cases import Message
from peft_baft.data.templates import CHAT, RAW
from peft_baft.evaluation.frames import CHAT_FRAMES, RAW_FRAMES
from peft_baft.evaluation.scoring import STATEMENT_TOKENS
from peft_baft_bench.questions.probing import FURTHER_KINDS, Probing

fact_model = facts.fact_model
LANDS = [f"Land {letter}" for letter in "ABCDEF"]
CASES = [
    Case(Edit(f"The capital of {land} is", f"City {land[-1]}", land), (), "X") for land in LANDS
]
BOTH = ("in_context", "neighbour")


def asked(probing: Probing, rows: list[int], edited: list[int] | None = None) -> list[list[str]]:
    """Kind and prompt of everything that is asked about some rows."""
    questions = probing.questions(rows, CASES, edited or [])
    return [[q.kind, str(q.prompt)] for q in questions]


def test_nothing_further_is_asked_by_default() -> None:
    assert asked(Probing(), [0, 1]) == [
        ["reliability", "The capital of Land A is"],
        ["reliability", "The capital of Land B is"],
    ]
    assert Probing().describe() == {}


def test_every_frame_and_every_neighbour_is_asked_for_the_edits_answers(
    fact_model: FactModel,
) -> None:
    probing = Probing.for_kinds(BOTH, CASES, fact_model.tokenizer)
    questions = probing.questions([2], CASES)
    assert {q.row for q in questions} == {2} and {q.answer for q in questions} == {"City C"}
    framed = [q for q in questions if q.kind == "in_context"]
    assert [q.topic for q in framed] == list(RAW_FRAMES) and {q.old for q in framed} == {"X"}
    assert all("The capital of Land C is" in str(q.prompt) for q in framed)
    near = [q for q in questions if q.kind == "neighbour"]
    assert [q.prompt for q in near] == [f"The capital of Land {x} is" for x in "DEFA"]
    described = probing.describe()
    assert described["free_rule"]["tokens"] == STATEMENT_TOKENS
    assert described["probes"].keys() == set(FURTHER_KINDS) == set(BOTH)


def test_what_is_taught_together_is_no_neighbour(fact_model: FactModel) -> None:
    probing = Probing.for_kinds(["neighbour"], CASES, fact_model.tokenizer)
    single = asked(probing, [0], [0])
    together = asked(probing, [0], [0, 1, 2])
    dropped = [question for question in single if question not in together]
    assert dropped == [["neighbour", f"The capital of Land {x} is"] for x in "BC"]


def test_a_chat_is_judged_by_statements_whatever_is_asked(fact_model: FactModel) -> None:
    chat = Probing.for_kinds((), CASES, fact_model.tokenizer, CHAT)
    assert chat.describe()["free_rule"]["stop"] == "end of turn"
    raw = Probing.for_kinds((), CASES, fact_model.tokenizer, RAW)
    assert raw.describe() == {} and raw.statement_tokens == 0


def test_messages_are_asked_in_the_frames_of_a_chat_beside_texts(fact_model: FactModel) -> None:
    tokenizer = facts.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    messages = (Message("user", "What is the capital of Land A?"),)
    cases = [Case(Edit(messages, "City A", "Land A")), CASES[1]]
    probing = Probing.for_kinds(["in_context"], cases, tokenizer)
    topics = [[q.topic for q in probing.questions([row], cases)[1:]] for row in (0, 1)]
    assert topics == [list(CHAT_FRAMES), list(RAW_FRAMES)]


def test_what_cannot_be_asked_is_refused(fact_model: FactModel) -> None:
    with pytest.raises(ValueError, match="Unknown kind of probe 'near'; known are in_context"):
        Probing.for_kinds(["near"], CASES, fact_model.tokenizer)
    with pytest.raises(ValueError, match="no record of the data names one"):
        Probing.for_kinds(["neighbour"], [Case(Edit("a", "b"))], fact_model.tokenizer)
