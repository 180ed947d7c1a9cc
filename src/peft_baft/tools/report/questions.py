"""Generate the answers of the unedited and the edited model to the questions of a report, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from peft_baft.adapter.state import evaluating, without_adapters
from peft_baft.data.batching import Tokens, context_window, encode_prompt
from peft_baft.data.cases import Prompt
from peft_baft.data.templates import Template
from peft_baft.evaluation.forward import BATCH_SIZE, greedy_tokens
from peft_baft.evaluation.scoring import EXTRA_TOKENS, STATEMENT_TOKENS, first_line, free_length

CHUNK_SIZE = (
    16 * BATCH_SIZE
)  # number of questions to answer before the adapter is switched on or off


@dataclass(frozen=True)
class Question:
    """A prompt in a format, with the maximum and minimum number of tokens for its answer.

    Args:
        form: `raw` or `chat`. room: maximum length of the answer. least: length of the expected answer.
    """

    form: str
    prompt: Prompt
    room: int = STATEMENT_TOKENS
    least: int = 1


@dataclass(frozen=True)
class Replies:
    """The first lines that the unedited (`before`) and the edited model (`after`) generate; or why it was not asked."""

    before: str = ""
    after: str = ""
    problem: str | None = None


def question_for(
    tokenizer: PreTrainedTokenizerBase, form: str, prompt: Prompt, target: str
) -> Question:
    """Return a question whose answer has room for a sentence and for the whole target."""
    length = free_length(tokenizer, target)
    return Question(form, prompt, max(STATEMENT_TOKENS, length), length - EXTRA_TOKENS)


def ask_both(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Iterable[Question],
    forms: Sequence[Template],
    tick: Callable[[int], object] = lambda asked: None,
) -> dict[Question, Replies]:
    """Answer every question greedily, with and without the adapter.

    Args:
        forms: the templates for the formats of the questions.
        tick: called with the number of new answers after each batch of them; each question has two answers.

    Returns:
        The replies to each question. A question that is too long for the model, or whose messages the chat template rejects, is
        not asked, and its replies say why.
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
                problem=f"too long: {len(row.ids)} tokens before the answer, of at most {window} that the model reads"
            )
        else:
            rows[question] = row
    asked = list(rows)
    # Questions of similar length share a batch.
    asked.sort(key=lambda question: len(rows[question].ids))
    with evaluating(model):
        for start in range(0, len(asked), CHUNK_SIZE):
            chunk = asked[start : start + CHUNK_SIZE]
            after = _first_lines(model, tokenizer, chunk, rows)
            tick(len(chunk))
            with without_adapters(model):
                before = _first_lines(model, tokenizer, chunk, rows)
            tick(len(chunk))
            replies |= dict(zip(chunk, map(Replies, before, after), strict=True))
    return replies


def _first_lines(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    rows: dict[Question, Tokens],
) -> list[str]:
    encoded = [rows[question] for question in questions]
    new = greedy_tokens(model, tokenizer, encoded, [question.room for question in questions])
    return [first_line(tokenizer, tokens) for tokens in new]
