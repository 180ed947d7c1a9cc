"""Probabilities of answers, and what is read off them: PIQA's choices and ConvSent's ES."""

# mypy: disable-error-code="func-returns-value"
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import PeftModel

import facts
from conftest import randomise
from facts import CAPITALS, MEALS, FactModel, adapted, questions
from peft_baft import Case, Edit
from peft_baft.data.batching import encode
from peft_baft.data.templates import CHAT, RAW, Template
from peft_baft.evaluation.likelihood import log_probabilities
from peft_baft_bench.metrics import piqa, sentiment
from peft_baft_bench.metrics.metrics import METRICS, piqa_cases
from peft_baft_bench.metrics.piqa import right_choices
from peft_baft_bench.metrics.sentiment import edit_success
from peft_baft_bench.run.scores import scores
from peft_baft_bench.tasks.formats import ConvSentCase, PiqaItem

fact_model = facts.fact_model
PAIRS = [*questions(CAPITALS[:8]), ("the", "capital of"), (" ".join(["the"] * 20), "food of a")]


@pytest.fixture(scope="module")
def edited(fact_model: FactModel) -> PeftModel:
    """The fact model with an adapter that visibly acts on the last prompt token and the answer."""
    model = adapted(fact_model.base, gate_offset=0.0, prompt_positions=1).eval()
    randomise(model, scale=0.3)
    return model


def plainly(model: Any, tokenizer: Any, prompt: str, answer: str) -> list[float]:
    """One token at a time, from the softmax."""
    row = encode(tokenizer, prompt, answer)
    found = []
    for end in range(row.prompt_length, len(row.ids)):
        lengths = (
            {"prompt_lengths": torch.tensor([row.prompt_length])}
            if isinstance(model, PeftModel)
            else {}
        )
        with torch.no_grad():
            last = model(
                input_ids=torch.tensor([row.ids[:end]]), **lengths, use_cache=False
            ).logits[0, -1]
        found.append(math.log(last.double().softmax(-1)[row.ids[end]]))
    return found


# probabilities of answers


def test_log_probabilities_equal_a_plain_reading_token_by_token(
    edited: PeftModel, fact_model: FactModel
) -> None:
    tokenizer = fact_model.tokenizer
    for model in (fact_model.base, edited):
        found = log_probabilities(model, tokenizer, PAIRS)
        for (prompt, answer), values in zip(PAIRS, found, strict=True):
            assert values.tolist() == pytest.approx(
                plainly(model, tokenizer, prompt, answer), abs=1e-4
            )
    without, within = (
        sum(x.sum() for x in log_probabilities(m, tokenizer, PAIRS))
        for m in (fact_model.base, edited)
    )
    assert abs(without - within) > 1  # control: the adapter acts


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_log_probabilities_depend_neither_on_the_batch_nor_on_its_padding(
    edited, fact_model, batch_size: int
) -> None:
    alone = [log_probabilities(edited, fact_model.tokenizer, [pair])[0] for pair in PAIRS]
    together = log_probabilities(edited, fact_model.tokenizer, PAIRS, batch_size)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_an_adapter_acts_from_the_last_prompt_tokens_on_and_not_before(
    edited: PeftModel, fact_model
) -> None:
    wider = adapted(fact_model.base, gate_offset=0.0, prompt_positions=2).eval()
    wider.load_state_dict(edited.state_dict())
    (pair,) = questions(CAPITALS[:1])
    one, two = (
        log_probabilities(model, fact_model.tokenizer, [pair])[0] for model in (edited, wider)
    )
    assert not torch.allclose(one, two, atol=1e-3)


def test_a_text_beyond_the_context_window_is_refused(fact_model: FactModel) -> None:
    with pytest.raises(ValueError, match="reads at most 32"):
        log_probabilities(*fact_model, [("the " * facts.WINDOW, "capital")])


# PIQA


def said(values: dict[str, list[float]]) -> Any:
    """A stand-in for `log_probabilities`: the solution's tokens after the goal, or after the question."""

    def log_probabilities(
        _model: Any, _tokenizer: Any, pairs: list[tuple[str, str]], **_: Any
    ) -> list[torch.Tensor]:
        return [
            torch.tensor(values[("Q: " if prompt.startswith("Question:") else "") + text])
            for prompt, text in pairs
        ]

    return log_probabilities


LONG, SHORT = "long one", "brief"
# after the goal: mean -1 and -2, sum -4 and -2; after the question: sum -4.8 and -3.5, by character -.6 and -.7
VALUES = {LONG: [-1.0] * 4, SHORT: [-2.0], f"Q: {LONG}": [-4.8], f"Q: {SHORT}": [-1.5, -2.0]}
PREFERRED = {
    "accuracy": LONG,
    "accuracy_sum": SHORT,
    "lm_eval_acc": SHORT,
    "lm_eval_acc_norm": LONG,
}


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("solutions", [(LONG, SHORT), (SHORT, LONG)])
def test_each_rule_prefers_its_solution(
    monkeypatch, solutions: tuple[str, str], label: int
) -> None:
    monkeypatch.setattr(piqa, "log_probabilities", said(VALUES))
    found = right_choices(None, None, PiqaItem("goal", *solutions, label))
    assert found == {rule: preferred == solutions[label] for rule, preferred in PREFERRED.items()}


@pytest.mark.parametrize(("value", "right"), [(-1.0, [True, False]), (math.nan, [False, False])])
def test_a_draw_is_the_first_solution_and_what_is_no_number_is_wrong(
    monkeypatch, value, right: list[bool]
) -> None:
    monkeypatch.setattr(
        piqa,
        "log_probabilities",
        said({key + name: [value] for key in ("", "Q: ") for name in "ab"}),
    )
    for label in (0, 1):
        assert set(right_choices(None, None, PiqaItem("goal", "a", "b", label)).values()) == {
            right[label]
        }


def test_a_model_that_knows_the_capital_chooses_it_and_an_edit_is_felt(
    fact_model: FactModel,
) -> None:
    items = [
        PiqaItem(f.prompt, f.answer, CAPITALS[(n + 8) % 24].answer, 0)
        for n, f in enumerate(CAPITALS[:12])
    ]
    items += [PiqaItem(item.goal, item.sol2, item.sol1, 1) for item in items]
    moved = adapted(fact_model.base, gate_offset=0.0).eval()
    randomise(moved, scale=2.0)
    asked = [
        piqa_cases(model, fact_model.tokenizer, items, range(2, 24))
        for model in (fact_model.base, moved)
    ]
    assert [case["row"] for case in asked[0]] == list(range(2, 24))
    known, lost = (scores(cases, ()) for cases in asked)
    assert set(known) == {"accuracy", "accuracy_sum", "lm_eval_acc", "lm_eval_acc_norm"}
    # Control: the adapter is not passed by.
    assert known["accuracy"] == 1 and lost["accuracy"] < 0.9


def test_the_question_is_asked_as_in_the_evaluation_harness(monkeypatch) -> None:
    asked: list[tuple[str, str]] = []
    forms: list[Any] = []

    def remembered(_m: Any, _t: Any, pairs: Any, *, template: Any) -> list[torch.Tensor]:
        asked.extend(pairs)
        forms.append(template)
        return [torch.zeros(1)] * 4

    monkeypatch.setattr(piqa, "log_probabilities", remembered)
    right_choices(None, None, PiqaItem("Open {it}", "a", "b", 0))
    assert [prompt for prompt, _ in asked] == ["Open {it}"] * 2 + [
        "Question: Open {it}\nAnswer:"
    ] * 2
    piqa_cases(None, None, [PiqaItem("Open {it}", "a", "b", 0)], [0], template=CHAT)
    assert forms == [RAW, CHAT]


# ConvSent


@dataclass
class Opinion:
    """A stand-in for `log_probabilities` with one value for each answer, before and after an edit."""

    after: dict[str, list[float]]
    before: dict[str, list[float]]
    asked: int = 0

    def __call__(
        self, _model: Any, _tokenizer: Any, pairs: list[tuple[str, str]], template: Template
    ) -> list[torch.Tensor]:
        assert template == RAW
        self.asked += 1
        values = self.after if self.asked == 1 else self.before
        return [torch.tensor(values[answer]) for _, answer in pairs]


@pytest.mark.parametrize(("before", "topic"), [(-1.0, math.exp(-1)), (-4.0, 1.0)])
def test_edit_success_on_a_hand_worked_case(monkeypatch, before: float, topic: float) -> None:
    """Means over tokens and not over answers: wanted (-1 - 1 - 4) / 3 = -2, unwanted -3."""
    after = {"good": [-1.0, -1.0], "fine": [-4.0], "bad": [-3.0]}
    monkeypatch.setattr(
        sentiment, "log_probabilities", Opinion(after, {"good": [before] * 2, "fine": [before]})
    )
    found = edit_success(None, None, "opinion?", ["good", "fine"], ["bad"])
    assert found == pytest.approx(topic / (1 + math.exp(-1)), rel=1e-5)


def test_edit_success_compares_with_the_model_without_its_adapter(
    edited: PeftModel, fact_model: FactModel
) -> None:
    wanted, unwanted = [MEALS[0].answer], [fact.answer for fact in MEALS[3:5]]
    question, tokenizer, base = MEALS[0].prompt, fact_model.tokenizer, fact_model.base
    edited.requires_grad_(False)  # as if reloaded

    def mean(model: Any, answers: list[str]) -> float:
        found = [
            value for answer in answers for value in plainly(model, tokenizer, question, answer)
        ]
        return sum(found) / len(found)

    turn = 1 / (1 + math.exp(mean(edited, unwanted) - mean(edited, wanted)))
    topic = min(1.0, math.exp(mean(edited, wanted) - mean(base, wanted)))
    assert edit_success(edited, tokenizer, question, wanted, unwanted) == pytest.approx(
        turn * topic, rel=1e-3
    )
    assert 0.1 < topic < 0.95 and not any(
        parameter.requires_grad for parameter in edited.parameters()
    )
    plain = 1 / (1 + math.exp(mean(base, unwanted) - mean(base, wanted)))
    assert edit_success(base, tokenizer, question, wanted, unwanted) == pytest.approx(
        plain, rel=1e-3
    )
    assert abs(plain - turn * topic) > 0.01
    with pytest.raises(ValueError, match="0 wanted and 2 unwanted"):
        edit_success(base, tokenizer, question, [], unwanted)


def test_sentiment_takes_the_side_that_the_edit_takes_and_refuses_other_benchmarks(
    fact_model: FactModel,
) -> None:
    case = Case(Edit("the capital of Arvia is", "Kasgrad"))
    with pytest.raises(ValueError, match="convsent"):
        METRICS["sentiment"](*fact_model, case, RAW)
    sides: dict[str, Any] = {"positive": (CAPITALS[0].answer,), "negative": (CAPITALS[8].answer,)}
    items = [
        ConvSentCase(case.edit, question=CAPITALS[0].prompt, wanted=wanted, **sides)
        for wanted in sides
    ]
    values = [METRICS["sentiment"](*fact_model, item, RAW)["sentiment"] for item in items]
    assert values[0] > 0.9 and sum(values) == pytest.approx(1, abs=1e-4)
