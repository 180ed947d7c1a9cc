"""A conversation with an edited model."""

from __future__ import annotations

from typing import Any

import pytest
from peft import PeftModel

import facts
from facts import CAPITALS, DESCENT, OBJECTIVE, FactModel, adapted
from peft_baft import NARROW, BaftEditor, Edit
from peft_baft.evaluation.chatting import Conversation

fact_model = facts.fact_model
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s> {{ m['content'] }}"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
ASKED, OLD, NEW = CAPITALS[0].prompt, CAPITALS[0].answer, CAPITALS[8].answer


@pytest.fixture(scope="module")
def edited(fact_model: FactModel) -> tuple[PeftModel, Any]:
    tokenizer = facts.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    model = adapted(fact_model.base)
    BaftEditor(model, tokenizer, (), OBJECTIVE, DESCENT, scope=NARROW, template="chat").edit(
        [Edit(ASKED, NEW)]
    )
    return model, tokenizer


def test_the_edited_model_answers_and_the_unedited_one_on_demand(edited: Any) -> None:
    conversation = Conversation(edited[0], edited[1], max_new_tokens=1)
    assert conversation.say(ASKED) == NEW.split()[0]
    assert conversation.unedited() == OLD.split()[0]
    assert conversation.say(ASKED)  # the adapter is on again


def test_turns_are_kept_until_they_are_forgotten(edited: Any) -> None:
    conversation = Conversation(edited[0], edited[1], max_new_tokens=1)
    conversation.say(CAPITALS[1].prompt)
    conversation.say(ASKED)
    assert [turn.role for turn in conversation.turns] == ["user", "assistant"] * 2
    conversation.restart()
    assert conversation.turns == []
    with pytest.raises(ValueError, match="No question has been asked yet"):
        conversation.unedited()


def test_a_conversation_that_is_too_long_stays_as_it_was(edited: Any) -> None:
    conversation = Conversation(edited[0], edited[1], max_new_tokens=1)
    conversation.say(ASKED)
    turns = list(conversation.turns)
    with pytest.raises(ValueError, match=f"context window is {facts.WINDOW}"):
        conversation.say("the capital " * facts.WINDOW)
    assert conversation.turns == turns


def test_nobody_can_chat_without_a_template(fact_model: FactModel) -> None:
    with pytest.raises(ValueError, match="baft ask --template raw"):
        Conversation(adapted(fact_model.base), facts.make_tokenizer())
