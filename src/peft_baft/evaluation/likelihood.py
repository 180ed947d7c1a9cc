"""Log-probabilities of given answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from peft_baft.data.batching import Tokens
from peft_baft.data.cases import Prompt
from peft_baft.data.templates import RAW, Template
from peft_baft.evaluation.forward import BATCH_SIZE, answer_ids, answer_logits, teacher_forced

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def log_probabilities(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[Prompt, str]],
    batch_size: int = BATCH_SIZE,
    *,
    template: Template = RAW,
) -> list[Tensor]:
    """Compute the log-probability of each answer token of (prompt, answer) pairs, given the prompt and the earlier tokens.

    The adapter gets the end of each prompt from the labels, as in `predicted_tokens`.

    Args:
        template: the prompt format.

    Returns:
        For each pair, (answer tokens,) float32 in nats. Their sum is the log-probability of the whole answer, and exp(-mean)
        its perplexity.

    Raises:
        ValueError: a text is longer than the context window.
    """

    def read(rows: Sequence[Tokens], logits: Tensor) -> list[Tensor]:
        return [
            _log_probabilities_of_answer(row, row_logits)
            for row, row_logits in zip(rows, logits, strict=True)
        ]

    return teacher_forced(model, tokenizer, pairs, read, batch_size, template=template)


def _log_probabilities_of_answer(row: Tokens, logits: Tensor) -> Tensor:
    """Compute the log-probabilities of one row's answer, (answer tokens,), from its logits (tokens, vocabulary)."""
    answer = answer_ids(row).to(logits.device)
    return -F.cross_entropy(answer_logits(row, logits).float(), answer, reduction="none").cpu()
