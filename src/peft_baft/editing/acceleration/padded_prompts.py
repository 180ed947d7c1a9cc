"""A test whether a model can answer prompts in a batch that is padded on the left.

Most models compute the same for a row in such a batch as for a single row. Some do not: BART counts positions by columns, and
RWKV includes padding in its state. Their prompts are answered one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_baft.data.batching import Tokens, collate
from peft_baft.editing.edit_cache import EditCache
from peft_baft.editing.module_patches import collected_outputs
from peft_baft.running import generate_greedily, input_device

logger = logging.getLogger(__name__)
# Tolerance relative to the size of the hidden vectors: a minimum, and in units of the dtype's spacing.
TOLERANCE, ROUNDINGS = 1e-3, 16
ONE_BY_ONE = (
    "%s computes other hidden vectors for a row in a left-padded batch than for a single row, so contrast texts are answered "
    "one by one, which is slower."
)


def takes_left_padding(
    model: PeftModel,
    block: nn.Module,
    prompts: Sequence[Tokens],
    padding: int,
    positions: int,
    prepared: EditCache,
) -> bool:
    """Return whether the shortest prompt has the same hidden vectors in a batch with the longest prompt as by itself.

    A model is tested once, with the first prompts that differ in length.

    Args:
        model: with its adapters disabled. block: its outputs at the last `positions` tokens are compared.
        padding: a token id for padding. prepared: stores the result.
    """
    shortest = min(prompts, key=lambda prompt: len(prompt.ids))
    longest = max(prompts, key=lambda prompt: len(prompt.ids))
    if len(shortest.ids) == len(longest.ids):
        return True
    if prepared.takes_left_padding is None:
        single = _hidden(model, block, [shortest], padding, positions)
        try:
            in_batch = _hidden(model, block, [shortest, longest], padding, positions)
            difference = torch.linalg.vector_norm(in_batch[-len(single) :] - single)
            tolerance = max(TOLERANCE, ROUNDINGS * torch.finfo(single.dtype).eps)
            equal = difference <= tolerance * torch.linalg.vector_norm(single)
            prepared.takes_left_padding = bool(equal)
        except (RuntimeError, IndexError, ValueError):  # the model does not accept such a batch
            prepared.takes_left_padding = False
        if not prepared.takes_left_padding:
            logger.warning(ONE_BY_ONE, type(model.get_base_model()).__name__)
    return prepared.takes_left_padding


def _hidden(
    model: PeftModel, block: nn.Module, rows: Sequence[Tokens], padding: int, positions: int
) -> Tensor:
    """Compute the first row's hidden vectors (positions + 1, d) at a block: of its last tokens and its first new token."""
    device, batch = input_device(model), collate(rows, padding, "left")
    ids, mask = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
    with torch.no_grad(), collected_outputs(block) as outputs:
        generate_greedily(model, ids, mask, padding, 2, min_new_tokens=2)
    return torch.cat([outputs[0][0, -positions:], outputs[-1][0, -1:]])
