"""Score answers: teacher-forced token match, and what a model says by itself. The same at any batch size."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from peft_baft.data.batching import Tokens, encode_prompt
from peft_baft.data.cases import Prompt
from peft_baft.data.templates import RAW, Template
from peft_baft.evaluation.forward import (
    BATCH_SIZE,
    Batched,
    answer_ids,
    answer_logits,
    greedy_tokens,
    one_model,
    teacher_forced,
)

EXTRA_TOKENS = 4  # a free answer may be so much longer than the wanted one: enough to see whether it stops there
ARTICLES = {"a", "an", "the"}


def predicted_tokens(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[Prompt, str]],
    batch_size: int = BATCH_SIZE,
    *,
    template: Template = RAW,
    batched: Batched = one_model,
) -> list[tuple[Tensor, Tensor]]:
    """Find what the model would say at each answer token of (prompt, answer) pairs, given the answer so far.

    The prompt's end is told to the adapter by the labels, so an edit acts here on the tokens it acts on in `generate`.

    Args:
        template: the form in which prompts are put to the model.
        batched: given the numbers of the pairs of a batch, a context to ask it in, say to choose each row's adapter.

    Returns:
        For each pair, the model's and the answer's token ids, both (answer tokens,).

    Raises:
        ValueError: a text is longer than the model can read.
    """

    def read(rows: Sequence[Tokens], logits: Tensor) -> list[tuple[Tensor, Tensor]]:
        likeliest = logits.argmax(-1).cpu()
        return [
            (answer_logits(row, said), answer_ids(row))
            for row, said in zip(rows, likeliest, strict=True)
        ]

    return teacher_forced(
        model, tokenizer, pairs, read, batch_size, template=template, batched=batched
    )


def token_match(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[Prompt, str]],
    batch_size: int = BATCH_SIZE,
    *,
    template: Template = RAW,
) -> list[float]:
    """Compute the share of each answer's tokens that the model would say itself: reliability, generality, portability."""
    predicted = predicted_tokens(model, tokenizer, pairs, batch_size, template=template)
    return [(said == wanted).float().mean().item() for said, wanted in predicted]


def agreement(
    before: Sequence[tuple[Tensor, Tensor]], after: Sequence[tuple[Tensor, Tensor]]
) -> list[float]:
    """Locality: share of the answer tokens at which the model says what it said before, right or wrong.

    Args:
        before, after: `predicted_tokens` of the same pairs, of the unedited and the edited model.
    """
    shares = []
    for (said_before, _), (said_after, _) in zip(before, after, strict=True):
        shares.append((said_before == said_after).float().mean().item())
    return shares


def free_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: Sequence[int],
    batch_size: int = BATCH_SIZE,
    *,
    template: Template = RAW,
    batched: Batched = one_model,
) -> list[str]:
    """Let the model continue each prompt greedily, up to its first line break.

    Args:
        max_new_tokens: for each prompt, how many tokens at most; fewer where the context window ends before.
        batched: as in `predicted_tokens`.
    """
    rows = [encode_prompt(tokenizer, prompt, template=template) for prompt in prompts]
    new_tokens = greedy_tokens(model, tokenizer, rows, max_new_tokens, batch_size, batched=batched)
    return [first_line(tokenizer, tokens) for tokens in new_tokens]


def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 12,
    *,
    template: Template = RAW,
) -> list[str]:
    """Give `free_answers` of one length."""
    lengths = [max_new_tokens] * len(prompts)
    return free_answers(model, tokenizer, prompts, lengths, template=template)


def free_length(tokenizer: Any, answer: str) -> int:
    """Count the tokens that the model may say where `answer` is wanted."""
    return (
        len(tokenizer(f" {answer.strip()}", add_special_tokens=False)["input_ids"]) + EXTRA_TOKENS
    )


def first_line(tokenizer: Any, tokens: Tensor) -> str:
    """Decode the first line that is not empty."""
    return tokenizer.decode(tokens, skip_special_tokens=True).lstrip().split("\n")[0].strip()


def normalised(text: str) -> list[str]:
    """Split into words in lower case without punctuation and articles, as answers are compared in question answering."""
    words = re.sub(f"[{re.escape(string.punctuation)}]", " ", text.casefold()).split()
    return [word for word in words if word not in ARTICLES] or text.casefold().split()


def exact_match(said: str, wanted: str) -> bool:
    """Tell whether the free answer is the wanted one and nothing more, normalised."""
    return normalised(said) == normalised(wanted)


def prefix_match(said: str, wanted: str) -> bool:
    """Tell whether the free answer begins with the wanted one, normalised."""
    words = normalised(wanted)
    return normalised(said)[: len(words)] == words
