"""Scores of answers: teacher-forced token match, and generated answers. The scores do not depend on the batch size.

A generated answer is compared with the target by one of three rules, from strict to lenient. All of them compare words in lower
case without punctuation and articles:

    exact     the answer is equal to the target
    prefix    the answer begins with the target
    contains  the answer contains the target and not the old answer that the edit replaces. A chat model that learned "Lyon" may
              say "Lyon, France, is the capital" or "The capital of France is Lyon". If the target contains the old answer
              ("mezzo soprano" for "soprano"), or no old answer is known, only the target is required. The rule compares words,
              not meaning: "It is not Lyon" contains Lyon.

For `exact` and `prefix` the answer has at most as many tokens as the target plus `EXTRA_TOKENS`; `contains` needs a whole
statement (see `peft_baft_bench/questions/asking.py` for its length).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor, nn

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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXTRA_TOKENS = (
    4  # tokens generated beyond the target's length, to see whether the answer stops there
)
STATEMENT_TOKENS = (
    24  # length of a generated answer that may contain the target anywhere: enough for a sentence
)
FREE_RULE = "contains the new answer and not the old one; words in lower case without punctuation and articles"
ARTICLES = {"a", "an", "the"}
# Scripts without spaces between words (Thai, kana, Chinese characters): each character is compared as a word.
UNSPACED = re.compile("[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff]")


def predicted_tokens(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Prompt, str]],
    batch_size: int = BATCH_SIZE,
    *,
    template: Template = RAW,
    batched: Batched = one_model,
) -> list[tuple[Tensor, Tensor]]:
    """Return the model's most likely token at each answer token of (prompt, answer) pairs, given the earlier answer tokens.

    The adapter gets the end of each prompt from the labels, so an edit applies to the same tokens as in `generate`.

    Args:
        template: the prompt format.
        batched: called with the indices of the pairs of a batch; returns the context to run it in, for example to select
            each row's adapter.

    Returns:
        For each pair, the model's and the answer's token ids, both (answer tokens,).

    Raises:
        ValueError: a text is longer than the context window.
    """
    return teacher_forced(
        model, tokenizer, pairs, _likeliest, batch_size, template=template, batched=batched
    )


def predicted_in_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Tokens],
    batch_size: int = BATCH_SIZE,
    *,
    batched: Batched = one_model,
) -> list[tuple[Tensor, Tensor]]:
    """Run `predicted_tokens` on rows that are tokenised already."""
    return teacher_forced_rows(model, tokenizer, rows, _likeliest, batch_size, batched=batched)


def _likeliest(rows: Sequence[Tokens], logits: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the most likely and the actual token ids of each row's answer."""
    predicted = logits.argmax(-1).cpu()
    return [
        (answer_logits(row, row_predicted), answer_ids(row))
        for row, row_predicted in zip(rows, predicted, strict=True)
    ]


def token_match(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Prompt, str]],
    batch_size: int = BATCH_SIZE,
    *,
    template: Template = RAW,
) -> list[float]:
    """Compute the share of each answer's tokens that the model predicts: reliability, generality or portability."""
    pairs_of_tokens = predicted_tokens(model, tokenizer, pairs, batch_size, template=template)
    return [(predicted == answer).float().mean().item() for predicted, answer in pairs_of_tokens]


def agreement(
    before: Sequence[tuple[Tensor, Tensor]], after: Sequence[tuple[Tensor, Tensor]]
) -> list[float]:
    """Compute the locality: the share of each answer's tokens where the model's prediction did not change.

    Args:
        before, after: `predicted_tokens` of the same pairs, of the unedited and the edited model.
    """
    shares = []
    for (predicted_before, _), (predicted_after, _) in zip(before, after, strict=True):
        shares.append((predicted_before == predicted_after).float().mean().item())
    return shares


def free_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: Sequence[int],
    batch_size: int = BATCH_SIZE,
    *,
    template: Template = RAW,
    batched: Batched = one_model,
) -> list[str]:
    """Continue each prompt by greedy decoding, up to the first line break.

    Args:
        max_new_tokens: the maximum number of new tokens of each prompt; also limited by the context window.
        batched: as in `predicted_tokens`.
    """
    rows = [encode_prompt(tokenizer, prompt, template=template) for prompt in prompts]
    new_tokens = greedy_tokens(model, tokenizer, rows, max_new_tokens, batch_size, batched=batched)
    return [first_line(tokenizer, tokens) for tokens in new_tokens]


def greedy_answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 12,
    *,
    template: Template = RAW,
) -> list[str]:
    """Return `free_answers` with the same maximum length for all prompts."""
    lengths = [max_new_tokens] * len(prompts)
    return free_answers(model, tokenizer, prompts, lengths, template=template)


def free_length(tokenizer: PreTrainedTokenizerBase, answer: str) -> int:
    """Return the maximum number of tokens to generate if `answer` is the target."""
    target_ids = tokenizer(f" {answer.strip()}", add_special_tokens=False)["input_ids"]
    return len(target_ids) + EXTRA_TOKENS


def first_line(tokenizer: PreTrainedTokenizerBase, tokens: Tensor) -> str:
    """Decode the first line that is not empty."""
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    return text.lstrip().split("\n")[0].strip()


def reply_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Tensor, chat: bool) -> Tensor:
    """Cut off the tokens after a generated answer: in a chat those after its turn, in raw text those after its first line.

    Returns:
        (reply,) the tokens of the answer, including special tokens before it, such as those of a template's thinking block.
    """
    if chat:
        special, ids = special_ids(tokenizer), tokens.tolist()
        start = 0
        while start < len(ids) and ids[start] in special:
            start += 1
        end = start
        while end < len(ids) and ids[end] not in special:
            end += 1
        return tokens[:end]
    line, count = first_line(tokenizer, tokens), len(tokens)
    while count and first_line(tokenizer, tokens[: count - 1]) == line:
        count -= 1
    return tokens[:count]


def reply_text(tokenizer: PreTrainedTokenizerBase, reply: Tensor, chat: bool) -> str:
    """Decode the `reply_tokens` of a generated answer: in a chat all lines, in raw text the first line."""
    if not chat:
        return first_line(tokenizer, reply)
    return str(tokenizer.decode(reply, skip_special_tokens=True)).strip()


def normalised(text: str) -> list[str]:
    """Split into words in lower case without punctuation and articles, as is usual in question answering."""
    words = re.sub(f"[{re.escape(string.punctuation)}]", " ", text.casefold()).split()
    return [word for word in words if word not in ARTICLES] or text.casefold().split()


def exact_match(answer: str, target: str) -> bool:
    """Return whether a generated answer is equal to the target, both normalised."""
    return normalised(answer) == normalised(target)


def prefix_match(answer: str, target: str) -> bool:
    """Return whether a generated answer begins with the target, both normalised."""
    words = normalised(target)
    return normalised(answer)[: len(words)] == words


def says(answer: str, target: str) -> bool:
    """Return whether a generated answer contains the words of the target consecutively, both normalised."""
    words, target_words = _words_anywhere(answer), _words_anywhere(target)
    count = len(target_words)
    starts = range(len(words) - count + 1)
    return any(words[start : start + count] == target_words for start in starts)


def contains_new_not_old(answer: str, new: str, old: str | None = None) -> bool:
    """Return whether a generated answer contains the new answer and not the old one.

    Args:
        old: the answer that the edit replaces. If it is None, or the new answer contains it, only the new answer is required.
    """
    if not says(answer, new):
        return False
    return old is None or says(new, old) or not says(answer, old)


def _words_anywhere(text: str) -> list[str]:
    """Split a sentence into normalised words, with any Unicode punctuation removed and scripts without spaces separated."""
    if not any(character.isalnum() for character in text):
        return normalised(text)  # the answer itself is punctuation
    spaced = UNSPACED.sub(r" \g<0> ", text)
    is_punctuation = [unicodedata.category(character).startswith("P") for character in spaced]
    return normalised("".join(" " if p else c for c, p in zip(spaced, is_punctuation, strict=True)))
