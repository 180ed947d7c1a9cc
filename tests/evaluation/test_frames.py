"""The frames that a benchmark asks in: what they do to a prompt, and that training does not know them."""

from __future__ import annotations

import re
from copy import deepcopy

import pytest

import facts
from facts import FactModel
from peft_baft.data.cases import Message, as_messages
from peft_baft.data.contexts import CHAT_CONTEXTS, RAW_CONTEXTS, Context
from peft_baft.data.templates import CHAT, RAW
from peft_baft.evaluation.frames import (
    CHAT_FRAMES,
    RAW_FRAMES,
    described_frames,
    framed,
    frames_that_render,
)

fact_model = facts.fact_model
QUESTION = "Where does the Dora rise?"
SYSTEM_REFUSED = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m['content'] }}\n{% endfor %}"
)


def runs_of_words(contexts: list[Context], length: int) -> set[tuple[str, ...]]:
    """All runs of so many words in the texts of some contexts."""
    found = set()
    for context in contexts:
        for text in (
            context.before,
            context.after,
            context.system,
            *(turn.content for turn in context.turns),
        ):
            words = re.findall(r"\w+", text.lower())
            found |= {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
    return found


def test_training_and_frames_share_no_three_words_in_a_row() -> None:
    trained = runs_of_words([*CHAT_CONTEXTS, *RAW_CONTEXTS], 3)
    asked = runs_of_words([*CHAT_FRAMES.values(), *RAW_FRAMES.values()], 3)
    assert trained and asked and not trained & asked
    copied = [*RAW_FRAMES.values(), Context(before=f"Now. {RAW_CONTEXTS[0].before}")]
    assert trained & runs_of_words(copied, 3)  # control: a borrowed sentence is seen


def test_there_are_frames_of_every_sort() -> None:
    assert len(CHAT_FRAMES) >= 5 and len(RAW_FRAMES) >= 3
    prompts = framed(QUESTION, CHAT)
    assert prompts.keys() == CHAT_FRAMES.keys() and len(set(map(repr, prompts.values()))) == len(
        prompts
    )
    assert (
        prompts["polite paraphrase"] == f"Would you be so kind as to answer this for me: {QUESTION}"
    )
    system, user = as_messages(prompts["system prompt"])
    assert system.role == "system"
    assert user == Message("user", QUESTION)
    earlier = as_messages(prompts["earlier turn"])
    assert [turn.role for turn in earlier] == ["user", "assistant", "user"]
    assert QUESTION not in earlier[0].content and earlier[-1].content == QUESTION
    request = prompts["longer request"]
    assert (
        isinstance(request, str)
        and not request.startswith(QUESTION)
        and not request.endswith(QUESTION)
    )


def test_in_raw_text_sentences_lead_to_the_prompt() -> None:
    for prompt in framed("The Dora rises in ", RAW).values():
        assert (
            isinstance(prompt, str) and prompt.endswith(" The Dora rises in") and len(prompt) > 40
        )


def test_messages_are_framed_as_a_chat_and_keep_their_own_system_prompt() -> None:
    own = (Message("system", "Be brief."), Message("user", QUESTION))
    for template in (RAW, CHAT):
        prompts = framed(own, template)
        assert prompts.keys() == CHAT_FRAMES.keys() - {"system prompt"}  # it would change nothing
        assert all(prompt[0] == own[0] for prompt in prompts.values())
    assert "system prompt" in framed(own[1:], RAW)


def test_a_frame_that_the_template_refuses_is_not_asked(fact_model: FactModel) -> None:
    tokenizer = deepcopy(fact_model.tokenizer)
    assert frames_that_render(tokenizer, RAW) == list(RAW_FRAMES)
    tokenizer.chat_template = SYSTEM_REFUSED
    rendering = frames_that_render(tokenizer, CHAT)
    assert rendering == [name for name in CHAT_FRAMES if name != "system prompt"]
    assert framed(QUESTION, CHAT, rendering).keys() == set(rendering)
    tokenizer.chat_template = "{{ raise_exception('closed') }}"
    with pytest.raises(ValueError, match=r"chat template rejects all frames.*closed"):
        frames_that_render(tokenizer, CHAT)


def test_a_result_line_names_the_frames_by_their_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    described = described_frames(["a heading"])
    assert described["frames"] == ["a heading"] and described == described_frames(["a heading"])
    assert described["sha256"] != described_frames(["a sentence"])["sha256"]
    monkeypatch.setitem(RAW_FRAMES, "a heading", Context(before="Another text."))
    assert described["sha256"] != described_frames(["a heading"])["sha256"]
