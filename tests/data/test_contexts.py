"""What stands around a fact while it is learned."""

from __future__ import annotations

import pytest

from peft_baft import Edit
from peft_baft.data.cases import Message, prompt_words
from peft_baft.data.contexts import CHAT_CONTEXTS, RAW_CONTEXTS, Context, contexts_for, in_contexts

QUESTION = "What is the capital of France?"


def test_a_prompt_is_taught_bare_and_in_so_many_different_contexts() -> None:
    # Raw text has fewer of them.
    for chat, count in ((False, 4), (True, 6)):
        prompts = in_contexts(QUESTION, chat, 6)
        assert prompts[0] == QUESTION
        assert len(set(prompts)) == 1 + count
        assert in_contexts(QUESTION, chat, 0) == [QUESTION]
        for prompt in prompts:
            Edit(prompt, "Lyon", "France")  # every one is a prompt of a fact about the same subject
            assert QUESTION in prompt_words(prompt)


def test_raw_text_stays_text() -> None:
    assert all(isinstance(prompt, str) for prompt in in_contexts(QUESTION, False, 6))
    assert not any(context.needs_chat for context in RAW_CONTEXTS)
    assert any(context.needs_chat for context in CHAT_CONTEXTS)


def test_messages_keep_their_own_system_prompt_and_turns() -> None:
    own = (
        Message("system", "Be brief."),
        Message("user", "Hello."),
        Message("assistant", "Hello!"),
        Message("user", QUESTION),
    )
    around = Context(
        before="Tell me:",
        system="You know much.",
        turns=(Message("user", "Hi."), Message("assistant", "Hi!")),
    ).around(own)
    assert around == (own[0], *around[1:3], *own[1:3], Message("user", f"Tell me: {QUESTION}"))
    assert Context(system="You know much.").around(own[3:]) == (
        Message("system", "You know much."),
        own[3],
    )


def test_more_contexts_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="contexts must be 0 to 6, not 7"):
        contexts_for(True, 7)
