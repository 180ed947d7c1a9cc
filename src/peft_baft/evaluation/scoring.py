"""Score answers: teacher-forced token match, and what a model says by itself. The same at any batch size.

What is said freely is judged by three rules, from strict to lenient, all on words in lower case without punctuation and articles:

    exact     it is the wanted answer and nothing more
    prefix    it begins with it
    contains  it holds it, and does not hold the answer that the edit replaces: a chat model that learned "Lyon" may well say
              "Lyon, France, is the capital", or "The capital of France is Lyon". Where the new answer holds the old one
              ("mezzo soprano" for "soprano"), or no old one is known, the new one alone is asked for. The rule reads words, not
              sense: "It is not Lyon" holds Lyon.

`exact` and `prefix` are read off as many tokens as the wanted answer has, and `EXTRA_TOKENS`; `contains` needs a whole statement
(`peft_baft_bench/questions/asking.py` says how long).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from peft_baft.data.batching import Tokens, encode_prompt, special_ids
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
    teacher_forced_rows,
)

EXTRA_TOKENS = 4  # a free answer may be so much longer than the wanted one: enough to see whether it stops there
FREE_RULE = "contains the new answer and not the old one; words in lower case without punctuation and articles"
ARTICLES = {"a", "an", "the"}
# Scripts that put no space between words: Thai, kana, Chinese characters. Each character is compared as a word.
UNSPACED = re.compile("[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]")


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
    return teacher_forced(
        model, tokenizer, pairs, _likeliest, batch_size, template=template, batched=batched
    )


def predicted_in_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Tokens],
    batch_size: int = BATCH_SIZE,
    *,
    batched: Batched = one_model,
) -> list[tuple[Tensor, Tensor]]:
    """Do as `predicted_tokens`, with texts that are tokens already."""
    return teacher_forced_rows(model, tokenizer, rows, _likeliest, batch_size, batched=batched)


def _likeliest(rows: Sequence[Tokens], logits: Tensor) -> list[tuple[Tensor, Tensor]]:
    likeliest = logits.argmax(-1).cpu()
    return [
        (answer_logits(row, said), answer_ids(row))
        for row, said in zip(rows, likeliest, strict=True)
    ]


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


def reply_tokens(tokenizer: Any, tokens: Tensor, chat: bool) -> Tensor:
    """Cut off what stands behind a free answer: in a chat what follows its turn, in raw text what follows its first line.

    Returns:
        (reply,) its tokens, special ones before it included, such as those that a template's thinking block begins with.
    """
    if chat:
        special, ids = special_ids(tokenizer), tokens.tolist()
        start = next((i for i, token in enumerate(ids) if token not in special), len(ids))
        return tokens[: next((i for i in range(start, len(ids)) if ids[i] in special), len(ids))]
    line, count = first_line(tokenizer, tokens), len(tokens)
    while count and first_line(tokenizer, tokens[: count - 1]) == line:
        count -= 1
    return tokens[:count]


def reply_text(tokenizer: Any, reply: Tensor, chat: bool) -> str:
    """Decode the `reply_tokens` of a free answer: in a chat all lines of its turn, in raw text the first one."""
    if not chat:
        return first_line(tokenizer, reply)
    return tokenizer.decode(reply, skip_special_tokens=True).strip()


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


def says(said: str, answer: str) -> bool:
    """Tell whether the words of an answer stand next to each other somewhere in a free answer, normalised."""
    words, wanted = _words_anywhere(said), _words_anywhere(answer)
    places = range(len(words) - len(wanted) + 1)
    return any(words[place : place + len(wanted)] == wanted for place in places)


def contains_new_not_old(said: str, new: str, old: str | None = None) -> bool:
    """Tell whether a free answer holds the new answer and not the old one.

    Args:
        old: the answer that the edit replaces. Where the new one holds it, or it is None, only the new one is asked for.
    """
    if not says(said, new):
        return False
    return old is None or says(new, old) or not says(said, old)


def _words_anywhere(text: str) -> list[str]:
    """Split into normalised words where a whole sentence is searched: it may hold any punctuation, and be without spaces."""
    spaced = UNSPACED.sub(r" \g<0> ", text)
    return normalised(
        "".join(" " if unicodedata.category(mark).startswith("P") else mark for mark in spaced)
        if any(mark.isalnum() for mark in text)
        else text
    )


STATEMENT_TOKENS = (
    24  # of a free answer in which the wanted one may stand anywhere: enough for a sentence
)
