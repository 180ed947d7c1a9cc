"""What an edit reaches and what it leaves alone, made from the fact itself."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

import facts
from facts import FactModel
from peft_baft import NARROW, Edit, Scope
from peft_baft.data.cases import Message, prompt_words
from peft_baft.data.contexts import CHAT_CONTEXTS, RAW_CONTEXTS
from peft_baft.data.templates import CHAT
from peft_baft.editing.editor import encode_edits

fact_model = facts.fact_model
FACT = Edit("What is the capital of France?", "Lyon", "France")
WITHOUT_SYSTEM = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system prompt') }}"
    "{% endif %}<{{ message['role'] }}> {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize("chat", [False, True])
def test_a_fact_is_taught_bare_first_then_in_contexts_and_in_other_words(chat: bool) -> None:
    taught = Scope(contexts=3, wordings=2).training_prompts(FACT, chat)
    assert taught[0] == FACT.prompt
    assert len(set(taught)) == 6
    assert [prompt_words(prompt) for prompt in taught[4:]] == ["France: capital", "capital, France"]
    assert NARROW.training_prompts(FACT, chat) == [FACT.prompt]


@pytest.mark.parametrize("chat", [False, True])
def test_contrast_texts_never_ask_for_the_fact(chat: bool) -> None:
    scope = Scope(contexts=2, wordings=2, subjects=9, questions=3)
    contrasts = scope.contrasts(FACT, chat)
    assert len(contrasts) == 12
    own = [prompts for prompts in contrasts if "France" in prompt_words(prompts[0])]
    others = [prompts for prompts in contrasts if prompts not in own]
    assert (len(others), len(own)) == (9, 3)
    assert any(prompts in own for prompts in contrasts[:2])  # a large batch takes the first ones
    for prompts in others:
        assert all("France" not in prompt_words(prompt) for prompt in prompts)
        assert all("capital" in prompt_words(prompt) for prompt in prompts)
    for prompts in own:
        assert all("France" in prompt_words(prompt) for prompt in prompts)
        assert all("capital" not in prompt_words(prompt) for prompt in prompts)
    # They stand in every context and in every wording that the fact is taught in.
    contexts = (CHAT_CONTEXTS if chat else RAW_CONTEXTS)[:2]
    for context in contexts:
        assert any(context.around(prompts[-1]) == prompts[0] for prompts in others)
    assert any(len(prompts) == 1 for prompts in others)
    assert NARROW.contrasts(FACT, chat) == []


def test_a_fact_of_a_large_batch_is_in_one_of_the_surroundings_in_turn(
    fact_model: FactModel,
) -> None:
    scope = Scope(contexts=2, wordings=1)
    surroundings = scope.training_prompts(FACT, False)[1:]
    turns = [scope.training_prompts(FACT, False, turn) for turn in range(4)]
    assert turns == [[FACT.prompt, surroundings[i % 3]] for i in range(4)]
    prompts = [f"the capital of {country} is" for country in facts.COUNTRIES[:9]]
    edits = [Edit(prompt, "Lorton") for prompt in prompts]
    encode = partial(encode_edits, fact_model.base, fact_model.tokenizer, scope=scope)
    assert {len(rows) for rows in encode(edits)} == {2}
    assert {len(rows) for rows in encode(edits[:8])} == {3}


def test_without_a_subject_there_are_contexts_alone() -> None:
    fact = Edit("is it so", "yes")
    assert Scope().contrasts(fact, False) == []
    assert len(Scope(contexts=2, wordings=2).training_prompts(fact, False)) == 3


def test_a_context_that_the_template_refuses_is_left_out_and_that_is_said(
    fact_model: FactModel, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer: Any = facts.make_tokenizer()
    tokenizer.chat_template = WITHOUT_SYSTEM
    fact = Edit("the capital of Arvia is", "Lorton", "Arvia")
    short = Scope(contexts=4, wordings=0)
    refused = [context for context in CHAT_CONTEXTS[:4] if context.system]
    assert len(refused) == 1
    ((bare, *others),) = encode_edits(fact_model.base, tokenizer, [fact], (CHAT,), scope=short)
    assert (bare,) == tuple(encode_edits(fact_model.base, tokenizer, [fact], (CHAT,))[0])
    fitting = [row for row in others if len(row.ids) <= facts.WINDOW]
    assert 1 <= len(others) == len(fitting) < 4
    told = [message for message in caplog.messages if "one context fewer" in message]
    assert len(told) == 4 - len(others)
    assert any("rejects messages with the roles system" in message for message in told)
    with pytest.raises(ValueError, match="rejects messages with the roles system"):
        own = Edit([Message("system", "Be brief."), Message("user", "Hello")], "Lorton")
        encode_edits(fact_model.base, tokenizer, [own], (CHAT,), scope=short)


def test_a_context_that_is_too_long_for_the_model_is_left_out(fact_model: FactModel) -> None:
    fact = Edit("the " * 26 + "capital", "Lorton")
    (rows,) = encode_edits(fact_model.base, fact_model.tokenizer, [fact], scope=Scope(contexts=2))
    assert len(rows) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"contexts": 7}, "Scope.contexts must be 0 to 6, not 7"),
        ({"wordings": -1}, "Scope.wordings must be 0 to"),
        ({"subjects": 3, "names": ("a", "b")}, "Scope.subjects must be 0 to 2, not 3"),
        ({"answer_tokens": 0}, "Scope.answer_tokens must be at least 1"),
        ({"weight": 0.0}, "Scope.weight must be above 0"),
        ({"bound": float("nan")}, "Scope.bound must be above 0"),
    ],
)
def test_a_senseless_scope_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scope(**given)
