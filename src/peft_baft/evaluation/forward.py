"""How evaluation runs a model: forward passes over given answers (teacher forcing), and greedy decoding."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from peft_baft.data.batching import Tokens, collate, context_window, encode_fitting, padding_id
from peft_baft.data.cases import Prompt
from peft_baft.data.templates import RAW, Template
from peft_baft.running import full_logits, generate_greedily, input_device

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_SIZE = 16
MAX_LIMIT_RATIO = 3  # largest ratio between the token limits of two rows in one batch of generation
# Both are called with the indices of the rows of a batch: the context to run the batch in, and arguments of `generate`.
Batched = Callable[[Sequence[int]], AbstractContextManager[Any]]
GenerateSettings = Callable[[Sequence[int]], dict[str, Any]]
T = TypeVar("T")


def one_model(_: Sequence[int]) -> AbstractContextManager[None]:
    """Return a context without effect: every batch is run on the model as it is."""
    return nullcontext()


def no_settings(_: Sequence[int]) -> dict[str, Any]:
    """Return no further arguments of `generate`."""
    return {}


def teacher_forced(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Prompt, str]],
    read: Callable[[Sequence[Tokens], Tensor], Iterable[T]],
    batch_size: int = BATCH_SIZE,
    *,
    template: Template = RAW,
    batched: Batched = one_model,
) -> list[T]:
    """Run the model over (prompt, answer) pairs in batches, and compute one value per pair from its logits.

    The adapter gets the end of each prompt from the labels, so an edit applies to the same tokens as in `generate`.

    Args:
        read: called after each forward pass with the rows of the batch and their logits (rows, longest, vocabulary), which
            are padded on the right; returns one value per row. `answer_logits` selects those of the answer.
        template: the prompt format.
        batched: called with the indices of the pairs of a batch; returns the context to run it in, for example to select
            each row's adapter.

    Returns:
        The values in the order of the pairs.

    Raises:
        ValueError: a text is longer than the context window; raised before the first forward pass.
    """
    rows = [
        encode_fitting(model, tokenizer, prompt, answer, template=template)
        for prompt, answer in pairs
    ]
    return teacher_forced_rows(model, tokenizer, rows, read, batch_size, batched=batched)


@torch.no_grad()
def teacher_forced_rows(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Tokens],
    read: Callable[[Sequence[Tokens], Tensor], Iterable[T]],
    batch_size: int = BATCH_SIZE,
    *,
    batched: Batched = one_model,
) -> list[T]:
    """Run `teacher_forced` on rows that are tokenised already."""
    # Sorting by length reduces padding.
    order = sorted(range(len(rows)), key=lambda number: len(rows[number].ids))
    values: dict[int, T] = {}
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = [rows[number] for number in numbers]
        with batched(numbers):
            # The logits are not bound to a name, so that they are freed before the next batch is computed.
            values_of_batch = read(batch, logits_of_rows(model, tokenizer, batch))
        values.update(zip(numbers, values_of_batch, strict=True))
    return [values[number] for number in range(len(rows))]


def answer_logits(row: Tokens, logits: Tensor) -> Tensor:
    """Select the logits (tokens, …) of a row that predict its answer's tokens: those one token earlier."""
    return logits[row.prompt_length + row.lead - 1 : len(row.ids) - 1]


def answer_ids(row: Tokens) -> Tensor:
    """Return the token ids of a row's answer, (answer tokens,)."""
    return torch.tensor(row.ids[row.prompt_length + row.lead :])


@torch.no_grad()
def logits_of_rows(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Tokens]
) -> Tensor:
    """Compute the logits (rows, longest, vocabulary) of rows, padded on the right, in one forward pass."""
    device = input_device(model)
    batch = collate(rows, padding_id(tokenizer))
    return full_logits(model, **{name: tensor.to(device) for name, tensor in batch.items()})


@torch.no_grad()
def greedy_tokens(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Tokens],
    max_new_tokens: Sequence[int],
    batch_size: int = BATCH_SIZE,
    *,
    batched: Batched = one_model,
    settings: GenerateSettings = no_settings,
) -> list[Tensor]:
    """Continue each row by greedy decoding.

    Args:
        max_new_tokens: the maximum number of new tokens of each row; also limited by the context window.
        batched: as in `teacher_forced`.
        settings: called with the indices of the rows of a batch; returns further arguments of `generate`.

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
    model: nn.Module,
    batch: dict[str, Tensor],
    pad_token_id: int,
    max_new_tokens: int,
    settings: dict[str, Any],
) -> Tensor:
    """Decode (rows, up to `max_new_tokens`) new tokens greedily, whatever the model's generation config contains."""
    prompt, mask = batch["input_ids"], batch["attention_mask"]
    return generate_greedily(model, prompt, mask, pad_token_id, max_new_tokens, **settings)


def _batches_in_window(
    rows: Sequence[Tokens], limits: Sequence[int], window: int, batch_size: int
) -> Iterator[list[int]]:
    """Group the rows with a positive limit into batches of similar limits.

    A batch ends before the longest prompt plus the largest limit would exceed the context window, and before the largest limit
    would exceed `MAX_LIMIT_RATIO` times the smallest.
    """
    numbers = [number for number in range(len(rows)) if limits[number] > 0]
    batch: list[int] = []
    for number in sorted(numbers, key=lambda number: limits[number]):
        longest_prompt = max(len(rows[other].ids) for other in [*batch, number])
        if batch:
            largest_limit = min(window - longest_prompt, MAX_LIMIT_RATIO * limits[batch[0]])
            if len(batch) == batch_size or limits[number] > largest_limit:
                yield batch
                batch = []
        batch.append(number)
    if batch:
        yield batch
