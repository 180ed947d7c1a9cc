"""Ask the unedited and the edited model the questions of a report: each question once, in batches, freely."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftModel

from peft_baft.adapter.state import evaluating, without_adapters
from peft_baft.data.batching import Tokens, context_window, encode_prompt
from peft_baft.data.cases import Prompt
from peft_baft.data.templates import Template
from peft_baft.evaluation.forward import BATCH_SIZE, greedy_tokens
from peft_baft.evaluation.scoring import EXTRA_TOKENS, STATEMENT_TOKENS, first_line, free_length

TOGETHER = 16 * BATCH_SIZE  # so many questions are sorted into batches at once


@dataclass(frozen=True)
class Question:
    """A prompt in a form, and how many tokens its answer may and must have room for.

    Args:
        form: `raw` or `chat`. room: the longest answer. least: fewer tokens than this could not hold the wanted answer.
    """

    form: str
    prompt: Prompt
    room: int = STATEMENT_TOKENS
    least: int = 1


@dataclass(frozen=True)
class Replies:
    """The first line that the unedited (`before`) and the edited model (`after`) said; or why the question was not asked."""

    before: str = ""
    after: str = ""
    problem: str | None = None


def question_for(tokenizer: Any, form: str, prompt: Prompt, target: str) -> Question:
    """Make the question that leaves room for a sentence, and for the whole target."""
    length = free_length(tokenizer, target)
    return Question(form, prompt, max(STATEMENT_TOKENS, length), length - EXTRA_TOKENS)


def ask_both(
    model: PeftModel,
    tokenizer: Any,
    questions: Iterable[Question],
    forms: Sequence[Template],
    tick: Callable[[int], object] = lambda asked: None,
) -> dict[Question, Replies]:
    """Let the model answer every question greedily, without and with its adapter.

    Args:
        forms: the templates that the questions' forms name.
        tick: called with the number of answers whenever some more are known; a question has two.

    Returns:
        For each question its replies. A question that is too long for the model, or whose messages the chat template refuses,
        is not asked, and its replies say why.
    """
    template_of = {template.name: template for template in forms}
    window = context_window(model)
    replies: dict[Question, Replies] = {}
    rows: dict[Question, Tokens] = {}
    for question in dict.fromkeys(questions):
        try:
            row = encode_prompt(tokenizer, question.prompt, template=template_of[question.form])
        except ValueError as error:
            replies[question] = Replies(problem=str(error))
            continue
        if window is not None and len(row.ids) + question.least > window:
            replies[question] = Replies(
                problem=f"too long: {len(row.ids)} tokens before the answer, of {window} that the model reads"
            )
        else:
            rows[question] = row
    asked = list(rows)
    # Questions of like length go into one batch.
    asked.sort(key=lambda question: len(rows[question].ids))
    with evaluating(model):
        for start in range(0, len(asked), TOGETHER):
            some = asked[start : start + TOGETHER]
            after = _lines(model, tokenizer, some, rows)
            tick(len(some))
            with without_adapters(model):
                before = _lines(model, tokenizer, some, rows)
            tick(len(some))
            pairs = zip(before, after, strict=True)
            replies |= dict(zip(some, (Replies(*pair) for pair in pairs), strict=True))
    return replies


def _lines(
    model: PeftModel, tokenizer: Any, questions: Sequence[Question], rows: dict[Question, Tokens]
) -> list[str]:
    encoded = [rows[question] for question in questions]
    new = greedy_tokens(model, tokenizer, encoded, [question.room for question in questions])
    return [first_line(tokenizer, tokens) for tokens in new]
