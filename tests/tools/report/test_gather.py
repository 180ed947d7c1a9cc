"""A report says what the two models really answer: which facts hold and which do not, which neighbours moved and which not."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from peft import PeftModel

import facts
from facts import CAPITALS, COUNTRIES, MEALS, FactModel
from peft_baft import BaftEditor
from peft_baft.adapter.state import without_adapters
from peft_baft.data.cases import Message
from peft_baft.data.templates import CHAT, RAW
from peft_baft.editing.scope import NARROW
from peft_baft.evaluation.scoring import greedy_answers
from peft_baft.tools.report.folder import AdapterFolder
from peft_baft.tools.report.gather import evenly_spread, gather
from peft_baft.tools.report.questions import Question, ask_both
from peft_baft.tools.report.report import AdapterReport
from peft_baft.tools.report.taught import TaughtFact

fact_model = facts.fact_model
FOLDER = AdapterFolder("edits", "0", 1, {}, {}, None, ())
NEARBY = tuple(fact.prompt for fact in (*CAPITALS[1:8], *MEALS[:8]))


@pytest.fixture(scope="module")
def edited(fact_model: FactModel) -> PeftModel:
    """The toy model with one capital moved, beside no text that should stay."""
    model = facts.adapted(fact_model.base)
    editor = BaftEditor(
        model, fact_model.tokenizer, (), facts.OBJECTIVE, facts.DESCENT, scope=NARROW
    )
    assert editor.edit(facts.edits(0)).learned
    return model


def taught(number: int, **more: Any) -> TaughtFact:
    (edit,) = facts.edits(number)
    fields: dict[str, Any] = {"subject": COUNTRIES[number], "forms": ("raw",), **more}
    return TaughtFact(str(number + 1), edit.prompt, edit.target, **fields)


def report(
    fact_model: FactModel, model: PeftModel, *given: TaughtFact, **more: Any
) -> AdapterReport:
    return gather(model, fact_model.tokenizer, given, (RAW,), FOLDER, "toy", **more)


def test_exactly_the_neighbours_that_answer_otherwise_have_moved(fact_model, edited) -> None:
    (fact,) = report(fact_model, edited, taught(0, nearby=NEARBY), neighbours=0).facts
    after = greedy_answers(edited, fact_model.tokenizer, NEARBY, 24)
    with without_adapters(edited):
        before = greedy_answers(edited, fact_model.tokenizer, NEARBY, 24)
    wanted = {p for p, old, new in zip(NEARBY, before, after, strict=True) if old != new}
    assert {neighbour.prompt for neighbour in fact.moved} == wanted
    assert 0 < len(wanted) < len(NEARBY)  # one of each kind at least
    assert [(n.before, n.after) for n in fact.neighbours] == list(zip(before, after, strict=True))
    assert {neighbour.source for neighbour in fact.neighbours} == {"file"}


def test_a_fact_that_was_taught_holds_and_one_that_was_not_does_not(fact_model, edited) -> None:
    made = report(fact_model, edited, taught(0), taught(5, nearby=()))
    assert [fact.holds for fact in made.facts] == [True, False]
    assert made.counts["facts"] == 2 and made.counts["hold"] == 1
    assert made.count_holding("answers", "raw") == (1, 2) and made.count_holding(
        "rephrasings", "raw"
    ) == (0, 0)
    first = made.facts[0].answers[0]
    assert first.before.startswith(CAPITALS[0].answer) and first.after.startswith(
        CAPITALS[8].answer
    )


def test_neighbours_that_say_the_new_answer_come_first(fact_model, edited) -> None:
    (fact,) = report(fact_model, edited, taught(0, nearby=NEARBY), neighbours=0).facts
    # A word that a moved neighbour says now and did not say before, as if it were what was taught.
    moved = fact.moved[-1]
    leaked = next(word for word in moved.after.split() if word not in moved.before.split())
    as_if = replace(taught(0, nearby=NEARBY), target=leaked)
    made = report(fact_model, edited, as_if, neighbours=0)
    new = [neighbour.says_new for _, neighbour in made.moved]
    assert new == sorted(new, reverse=True) and new[0]
    assert made.counts["neighbours_say_new"] == sum(
        leaked in n.after.split() and leaked not in n.before.split() for n in fact.neighbours
    )


def test_the_subjects_of_other_facts_are_asked_first_and_no_question_that_was_taught(
    fact_model, edited
) -> None:
    other = TaughtFact("9", CAPITALS[5].rephrase, "x", subject=COUNTRIES[5], forms=("raw",))
    same = taught(6)
    made = report(fact_model, edited, taught(0), other, same, neighbours=2)
    prompts = [neighbour.prompt for neighbour in made.facts[0].neighbours]
    assert prompts[0] == CAPITALS[5].prompt and len(prompts) == 2
    assert CAPITALS[6].prompt not in prompts and made.facts[0].neighbours[1].source == "name"


def test_a_subject_that_nobody_has_named_is_found(fact_model, edited) -> None:
    named, found = report(fact_model, edited, taught(0), taught(1, subject=None)).facts
    assert (found.subject, found.subject_found) == (COUNTRIES[1], True)
    assert named.subject_found is False and found.neighbours


def test_rephrasings_and_contexts_are_asked(fact_model, edited) -> None:
    (fact,) = report(
        fact_model, edited, taught(0, rephrasings=(CAPITALS[0].rephrase,)), contexts=2
    ).facts
    assert [answer.prompt for answer in fact.rephrasings] == [CAPITALS[0].rephrase]
    assert [answer.asked_as for answer in fact.contexts] == ["a sentence", "two sentences"]
    assert all(str(answer.prompt).endswith(CAPITALS[0].prompt) for answer in fact.contexts)


def test_of_many_facts_some_are_asked_from_the_first_to_the_last_and_the_others_are_counted(
    fact_model, edited
) -> None:
    many = [taught(number) for number in range(9)]
    made = report(fact_model, edited, *many, limit=3, neighbours=1, contexts=0)
    assert [fact.fact.key for fact in made.facts] == ["1", "5", "9"] and made.left_out == 6
    for limit in (1, 2, 4, 9, 20):
        chosen = evenly_spread(many, limit)
        assert len(set(map(id, chosen))) == min(limit, 9) and chosen[-1] is many[-1]
    with pytest.raises(ValueError, match="limit of 1 or more"):
        report(fact_model, edited, *many, limit=0)


def test_facts_that_are_not_in_the_adapter_are_listed_and_not_asked(fact_model, edited) -> None:
    made = report(fact_model, edited, taught(0), taught(1, kept=False), taught(2, replaced_by="7"))
    assert len(made.facts) == 1 and [fact.key for fact in made.not_in_adapter] == ["2", "3"]


def test_a_question_that_does_not_fit_is_said_not_to_be_asked(fact_model, edited) -> None:
    long = TaughtFact("1", " ".join([CAPITALS[0].prompt] * 8), "x", forms=("raw",))
    messages = TaughtFact("2", (Message("user", CAPITALS[0].prompt),), "x", forms=("chat",))
    made = report(fact_model, edited, long, messages, contexts=0)
    assert [fact.holds for fact in made.facts] == [None, None]
    assert "too long: " in (made.facts[0].answers[0].problem or "")
    assert "no chat template" in (made.facts[1].answers[0].problem or "")
    assert made.counts["could_not_be_asked"] == 2 and made.counts["canaries"] == 8


def test_a_fact_is_judged_in_the_form_that_it_was_taught_in(fact_model, edited) -> None:
    tokenizer = facts.make_tokenizer()
    # A chat that the toy model does not know: the question stands twice.
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {{ m.content }}{% endfor %}"
    raw, chat = (
        gather(
            edited, tokenizer, [taught(0, forms=(form,))], (RAW, CHAT), FOLDER, "toy", contexts=0
        )
        for form in ("raw", "chat")
    )
    assert [answer.form for answer in raw.facts[0].answers] == ["raw", "chat"]
    assert raw.facts[0].judged == raw.facts[0].answers[:1] and raw.facts[0].holds is True
    assert chat.facts[0].judged == chat.facts[0].answers[1:]
    assert chat.facts[0].answers == raw.facts[0].answers


def test_equal_questions_are_asked_once_and_the_model_is_left_as_it_was(fact_model, edited) -> None:
    question = Question("raw", CAPITALS[0].prompt)
    ticks: list[int] = []
    edited.train()
    replies = ask_both(edited, fact_model.tokenizer, [question] * 3, (RAW,), ticks.append)
    assert edited.training and list(replies) == [question] and ticks == [1, 1]
    edited.eval()
    assert replies[question].before != replies[question].after


def test_the_data_is_what_json_takes_and_says_what_follows_from_it(fact_model, edited) -> None:
    made = report(fact_model, edited, taught(0, nearby=NEARBY))
    data = json.loads(json.dumps(made.to_dict()))
    assert data["counts"] == made.counts and data["facts"][0]["holds"] is True
    assert (
        sum(n["moved"] for n in data["facts"][0]["neighbours"]) == made.counts["neighbours_moved"]
    )
