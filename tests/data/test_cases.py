"""Facts as values."""

from __future__ import annotations

import pytest

from peft_baft import Edit
from peft_baft.data.cases import Message, asked_words


def test_a_subject_is_a_hint_that_stands_in_the_prompt() -> None:
    fact = Edit("The capital of France is", "Lyon", "France")
    assert fact == Edit("The capital of France is", "Lyon")
    with pytest.raises(ValueError, match="does not occur in the prompt"):
        Edit("The capital of France is", "Lyon", "Spain")


def test_two_prompts_ask_the_same_whatever_the_case_and_the_spaces() -> None:
    assert asked_words("Who  is A?") == asked_words((Message("user", " who is a?"),))
    assert asked_words("Who is A?") != asked_words("Who is B?")
