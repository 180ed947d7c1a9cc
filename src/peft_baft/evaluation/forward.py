"""The one way in which evaluation runs a model: forwards over given answers (teacher forcing), and greedy decoding."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from peft_baft.data.batching import Tokens, collate, context_window, encode_fitting, padding_id
from peft_baft.data.cases import Prompt
from peft_baft.data.templates import RAW, Template
from peft_baft.running import full_logits, generate_greedily, input_device

BATCH_SIZE = 16
LONGER = 3  # one batch generates at most so many times the tokens that its shortest answer needs
Batched = Callable[[Sequence[int]], AbstractContextManager[Any]]
T = TypeVar("T")
GenerateSettings = Callable[[Sequence[int]], dict[str, Any]]


def one_model(_: Sequence[int]) -> AbstractContextManager[None]:
    """Ask every batch of the model as it is."""
    return nullcontext()


def no_settings(_: Sequence[int]) -> dict[str, Any]:
    """Add nothing to the arguments of `generate`."""
    return {}


def teacher_forced(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[Prompt, str]],
    read: Callable[[Sequence[Tokens], Tensor], Iterable[T]],
    batch_size: int = BATCH_SIZE,
    *,
    template: Template = RAW,
    batched: Batched = one_model,
) -> list[T]:
    """Run the model over (prompt, answer) pairs in batches, and read something off each pair's forward.

    The prompt's end is told to the adapter by the labels, so an edit acts here on the tokens it acts on in `generate`.

    Args:
        read: called right after each forward with the rows of the batch and their logits (rows, longest, vocabulary), which
            are padded on the right; gives one value for each row. `answer_logits` finds the answer's among them.
        template: the form in which prompts are put to the model.
        batched: given the numbers of the pairs of a batch, a context to run it in, say to choose each row's adapter.

    Returns:
        What was read, in the order of the pairs.

    Raises:
        ValueError: a text is longer than the model can read; raised before the first forward.
    """
    rows = [
        encode_fitting(model, tokenizer, prompt, answer, template=template)
        for prompt, answer in pairs
    ]
    return teacher_forced_rows(model, tokenizer, rows, read, batch_size, batched=batched)


@torch.no_grad()
def teacher_forced_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Tokens],
    read: Callable[[Sequence[Tokens], Tensor], Iterable[T]],
    batch_size: int = BATCH_SIZE,
    *,
    batched: Batched = one_model,
) -> list[T]:
    """Do as `teacher_forced`, with texts that are tokens already: prompts with what shall be read as their answers."""
    # Texts of like length need little padding.
    order = sorted(range(len(rows)), key=lambda number: len(rows[number].ids))
    values: dict[int, T] = {}
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = [rows[number] for number in numbers]
        with batched(numbers):
            # Not bound to a name: the logits of one batch are freed before those of the next are computed.
            values_of_batch = read(batch, logits_of_rows(model, tokenizer, batch))
        values.update(zip(numbers, values_of_batch, strict=True))
    return [values[number] for number in range(len(rows))]


def answer_logits(row: Tokens, logits: Tensor) -> Tensor:
    """Take from a row's logits (tokens, …) those that predict its answer's tokens: each stands one token earlier."""
    return logits[row.prompt_length + row.lead - 1 : len(row.ids) - 1]


def answer_ids(row: Tokens) -> Tensor:
    """Give the ids of a row's answer, (answer tokens,)."""
    return torch.tensor(row.ids[row.prompt_length + row.lead :])


@torch.no_grad()
def logits_of_rows(model: Any, tokenizer: Any, rows: Sequence[Tokens]) -> Tensor:
    """Compute the logits (rows, longest, vocabulary) of one forward over rows that are padded on the right."""
    device = input_device(model)
    batch = collate(rows, padding_id(tokenizer))
    return full_logits(model, **{name: tensor.to(device) for name, tensor in batch.items()})


@torch.no_grad()
def greedy_tokens(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Tokens],
    max_new_tokens: Sequence[int],
    batch_size: int = BATCH_SIZE,
    *,
    batched: Batched = one_model,
    settings: GenerateSettings = no_settings,
) -> list[Tensor]:
    """Continue each row with the likeliest token, again and again.

    Args:
        max_new_tokens: for each row, how many tokens at most; fewer where the context window ends before.
        batched: as in `teacher_forced`.
        settings: given the numbers of the rows of a batch, further arguments of `generate`.

    Returns:
        For each row, its (up to max_new_tokens,) new tokens.
    """
    window = context_window(model) or sys.maxsize
    limits = [
        min(limit, window - len(row.ids)) for row, limit in zip(rows, max_new_tokens, strict=True)
    ]
    new_tokens = [torch.empty(0, dtype=torch.long)] * len(rows)
    for numbers in _batches_in_window(rows, limits, window, batch_size):
        batch = collate([rows[number] for number in numbers], padding_id(tokenizer), side="left")
        with batched(numbers):
            continuations = _generate(
                model,
                batch,
                padding_id(tokenizer),
                max(limits[number] for number in numbers),
                settings(numbers),
            )
        for number, tokens in zip(numbers, continuations, strict=True):
            new_tokens[number] = tokens[: limits[number]]
    return new_tokens


def _generate(
    model: Any,
    batch: dict[str, Tensor],
    pad_token_id: int,
    max_new_tokens: int,
    settings: dict[str, Any],
) -> Tensor:
    """Decode (rows, up to `max_new_tokens`) new tokens greedily, whatever the model's own generation config says."""
    prompt, mask = batch["input_ids"], batch["attention_mask"]
    return generate_greedily(model, prompt, mask, pad_token_id, max_new_tokens, **settings)


def _batches_in_window(
    rows: Sequence[Tokens], limits: Sequence[int], window: int, batch_size: int
) -> Iterator[list[int]]:
    """Batch the rows that may say anything, by rising limits, so that rows that stop together are together.

    No row is driven beyond the context window by the others of its batch. Nor do many wait long for few: where limits rise
    beyond `LONGER` times a batch's smallest, a new batch begins.
    """
    numbers = [number for number in range(len(rows)) if limits[number] > 0]
    batch: list[int] = []
    for number in sorted(numbers, key=lambda number: limits[number]):
        longest_prompt = max(len(rows[other].ids) for other in [*batch, number])
        if batch:
            largest_limit = min(window - longest_prompt, LONGER * limits[batch[0]])
            if len(batch) == batch_size or limits[number] > largest_limit:
                yield batch
                batch = []
        batch.append(number)
    if batch:
        yield batch
