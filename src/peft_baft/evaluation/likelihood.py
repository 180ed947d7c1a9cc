"""How probable a model finds given answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_baft.adapter.model_call import full_logits, input_device
from peft_baft.data.batching import Tokens, collate, encode_fitting, padding_id
from peft_baft.evaluation.scoring import BATCH_SIZE


@torch.no_grad()
def log_probabilities(
    model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]], batch_size: int = BATCH_SIZE, *, chat: bool = False
) -> list[Tensor]:
    """Log-probability of each answer token of (prompt, answer) pairs, given the prompt and the answer so far.

    The prompt's end is told to the adapter by the labels, as in `predicted_tokens`.

    Args:
        chat: ask in the tokenizer's chat template.

    Returns:
        For each pair, (answer tokens,) float32 in nats: the sum is that of the whole answer, and exp(-mean) its perplexity.

    Raises:
        ValueError: a text is longer than the model can read.
    """
    device = input_device(model)
    rows = [encode_fitting(model, tokenizer, prompt, answer, chat=chat) for prompt, answer in pairs]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))  # for little padding
    found = [torch.empty(0)] * len(rows)
    for start in range(0, len(rows), batch_size):
        part = order[start : start + batch_size]
        batch = {name: t.to(device) for name, t in collate([rows[i] for i in part], padding_id(tokenizer)).items()}
        for i, logits in zip(part, full_logits(model, **batch), strict=True):
            found[i] = _of_answer(logits, rows[i])
    return found


def _of_answer(logits: Tensor, row: Tokens) -> Tensor:
    """(answer tokens,) of one row, from its logits (tokens, vocabulary)."""
    answer = torch.tensor(row.ids[row.prompt_length :], device=logits.device)
    before = logits[row.prompt_length - 1 : len(row.ids) - 1].float()
    return -F.cross_entropy(before, answer, reduction="none").cpu()
