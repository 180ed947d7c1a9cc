"""Measure how probable a model finds given answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from peft_baft.data.batching import Tokens
from peft_baft.data.cases import Prompt
from peft_baft.data.templates import RAW, Template
from peft_baft.evaluation.forward import BATCH_SIZE, answer_ids, answer_logits, teacher_forced


def log_probabilities(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[tuple[Prompt, str]],
    batch_size: int = BATCH_SIZE,
    *,
    template: Template = RAW,
) -> list[Tensor]:
    """Log-probability of each answer token of (prompt, answer) pairs, given the prompt and the answer so far.

    The prompt's end is told to the adapter by the labels, as in `predicted_tokens`.

    Args:
        template: the form in which prompts are put to the model.

    Returns:
        For each pair, (answer tokens,) float32 in nats: the sum is that of the whole answer, and exp(-mean) its perplexity.

    Raises:
        ValueError: a text is longer than the model can read.
    """

    def read(rows: Sequence[Tokens], logits: Tensor) -> list[Tensor]:
        return [
            _log_probabilities_of_answer(row, of_row)
            for row, of_row in zip(rows, logits, strict=True)
        ]

    return teacher_forced(model, tokenizer, pairs, read, batch_size, template=template)


def _log_probabilities_of_answer(row: Tokens, logits: Tensor) -> Tensor:
    """Compute those of one row's answer, (answer tokens,), from its logits (tokens, vocabulary)."""
    answer = answer_ids(row).to(logits.device)
    return -F.cross_entropy(answer_logits(row, logits).float(), answer, reduction="none").cpu()
