"""Asking a model: teacher-forced token match, and what it says by itself. Greedy, batched, the same at any batch size."""

from __future__ import annotations

import re
import string
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from peft_baft.adapter.model_call import full_logits, input_device
from peft_baft.data.batching import Tokens, collate, context_window, encode_fitting, encode_prompt, padding_id

BATCH_SIZE = 16
EXTRA_TOKENS = 4  # a free answer may be so much longer than the wanted one: enough to see whether it stops there
LONGER = 3  # one batch generates at most so many times the tokens that its shortest answer needs
ARTICLES = {"a", "an", "the"}
Batched = Callable[[Sequence[int]], AbstractContextManager[Any]]


def one_model(_: Sequence[int]) -> AbstractContextManager[None]:
    """Every batch is asked of the model as it is."""
    return nullcontext()


@torch.no_grad()
def predicted_tokens(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[str, str]],
    batch_size: int = BATCH_SIZE,
    *,
    chat: bool = False,
    batched: Batched = one_model,
) -> list[tuple[Tensor, Tensor]]:
    """What the model would say at each answer token of (prompt, answer) pairs, given the answer so far.

    The prompt's end is told to the adapter by the labels, so an edit acts here on the tokens it acts on in `generate`.

    Args:
        chat: ask in the tokenizer's chat template.
        batched: given the numbers of the pairs of a batch, a context to ask it in, say to choose each row's adapter.

    Returns:
        For each pair, the model's and the answer's token ids, both (answer tokens,).

    Raises:
        ValueError: a text is longer than the model can read.
    """
    device = input_device(model)
    rows = [encode_fitting(model, tokenizer, prompt, answer, chat=chat) for prompt, answer in pairs]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))  # for little padding
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for start in range(0, len(rows), batch_size):
        part = order[start : start + batch_size]
        batch = {name: t.to(device) for name, t in collate([rows[i] for i in part], padding_id(tokenizer)).items()}
        with batched(part):
            said = full_logits(model, **batch).argmax(-1).cpu()
        for i, predicted in zip(part, said, strict=True):
            answer = slice(rows[i].prompt_length, len(rows[i].ids))
            found[i] = predicted[answer.start - 1 : answer.stop - 1], torch.tensor(rows[i].ids[answer])
    return [found[i] for i in range(len(rows))]


def token_match(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_size: int = BATCH_SIZE, *, chat: bool = False
) -> list[float]:
    """Share of each answer's tokens that the model would say itself: reliability, generality, portability."""
    found = predicted_tokens(model, tokenizer, pairs, batch_size, chat=chat)
    return [(said == wanted).float().mean().item() for said, wanted in found]


def agreement(before: Sequence[tuple[Tensor, Tensor]], after: Sequence[tuple[Tensor, Tensor]]) -> list[float]:
    """Locality: share of the answer tokens at which the model says what it said before, right or wrong.

    Args:
        before, after: `predicted_tokens` of the same pairs, of the unedited and the edited model.
    """
    return [(said == now).float().mean().item() for (said, _), (now, _) in zip(before, after, strict=True)]


@torch.no_grad()
def free_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    max_new_tokens: Sequence[int],
    batch_size: int = BATCH_SIZE,
    *,
    chat: bool = False,
    batched: Batched = one_model,
) -> list[str]:
    """The model's own greedy continuation of each prompt, up to its first line break.

    Args:
        max_new_tokens: for each prompt, how many tokens at most; fewer where the context window ends before.
        batched: as in `predicted_tokens`.
    """
    rows = [encode_prompt(tokenizer, prompt, chat=chat) for prompt in prompts]
    window = context_window(model) or sys.maxsize
    limits = [min(limit, window - len(row.ids)) for row, limit in zip(rows, max_new_tokens, strict=True)]
    order = sorted(range(len(rows)), key=lambda i: limits[i])  # rows that stop together, together
    answers = [""] * len(rows)
    for part in batches_in_window(order, rows, limits, window, batch_size):
        with batched(part):
            new = greedy_tokens(model, tokenizer, [rows[i] for i in part], max(limits[i] for i in part))
        for i, tokens in zip(part, new, strict=True):
            answers[i] = first_line(tokenizer, tokens[: limits[i]])
    return answers


def greedy_answers(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 12) -> list[str]:
    """`free_answers` of one length."""
    return free_answers(model, tokenizer, prompts, [max_new_tokens] * len(prompts))


def free_length(tokenizer: Any, answer: str) -> int:
    """How many tokens to let the model say where `answer` is wanted."""
    return len(tokenizer(f" {answer.strip()}", add_special_tokens=False)["input_ids"]) + EXTRA_TOKENS


def batches_in_window(
    order: list[int], rows: list[Tokens], limits: list[int], window: int, size: int
) -> Iterator[list[int]]:
    """Batches of the rows that may say anything, such that none is driven beyond the context window by the others.

    order: by rising limits. Nor do many wait long for few: where limits rise beyond `LONGER` times a batch's smallest, a
    new batch begins.
    """
    batch: list[int] = []
    for i in (i for i in order if limits[i] > 0):
        longest = max(len(rows[j].ids) for j in [*batch, i])
        if batch and (len(batch) == size or limits[i] > min(window - longest, LONGER * limits[batch[0]])):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def greedy_tokens(model: Any, tokenizer: Any, rows: list[Tokens], tokens: int) -> Tensor:
    """Greedy continuations, (rows, up to `tokens`)."""
    batch = collate(rows, padding_id(tokenizer), side="left")
    inputs = {name: batch[name].to(input_device(model)) for name in ("input_ids", "attention_mask")}
    settings = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "pad_token_id": padding_id(tokenizer)}
    return model.generate(**inputs, max_new_tokens=tokens, **settings)[:, batch["input_ids"].shape[1] :]


def first_line(tokenizer: Any, tokens: Tensor) -> str:
    """The first line that is not empty."""
    return tokenizer.decode(tokens, skip_special_tokens=True).lstrip().split("\n")[0].strip()


def normalised(text: str) -> list[str]:
    """Words in lower case without punctuation and articles, as answers are compared in question answering."""
    words = re.sub(f"[{re.escape(string.punctuation)}]", " ", text.casefold()).split()
    return [word for word in words if word not in ARTICLES] or text.casefold().split()


def exact_match(said: str, wanted: str) -> bool:
    """The free answer is the wanted one and nothing more, normalised."""
    return normalised(said) == normalised(wanted)


def prefix_match(said: str, wanted: str) -> bool:
    """The free answer begins with the wanted one, normalised."""
    words = normalised(wanted)
    return normalised(said)[: len(words)] == words
