"""Whether prompts can be answered together, in a batch that is padded on the left.

Most models give a row of such a batch what they give it alone. Some do not: BART counts positions by columns, and RWKV takes
padding into its state. Their prompts are answered one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_baft.data.batching import Tokens, collate
from peft_baft.editing.acceleration.module_patches import collected_outputs
from peft_baft.editing.edit_cache import EditCache
from peft_baft.running import generate_greedily, input_device

logger = logging.getLogger(__name__)
# Of the size of the compared hidden vectors: the least tolerance, and that in spacings of their dtype's numbers.
TOLERANCE, ROUNDINGS = 1e-3, 16
ONE_BY_ONE = (
    "%s gives a row of a left-padded batch other hidden vectors than the row alone, so contrast texts are answered one by one; "
    "this is slower."
)


def takes_left_padding(
    model: Any,
    block: nn.Module,
    prompts: Sequence[Tokens],
    padding: int,
    positions: int,
    prepared: EditCache,
) -> bool:
    """Tell whether the shortest of some prompts has the same hidden vectors in a batch with the longest one as alone.

    A model is asked once, with the first prompts that differ in length.

    Args:
        model: without its adapters. block: whose outputs are compared, at the last `positions` tokens.
        padding: a token id to pad with. prepared: remembers the answer.
    """
    shortest = min(prompts, key=lambda prompt: len(prompt.ids))
    longest = max(prompts, key=lambda prompt: len(prompt.ids))
    if len(shortest.ids) == len(longest.ids):
        return True
    if prepared.takes_left_padding is None:
        alone = _hidden(model, block, [shortest], padding, positions)
        try:
            beside = _hidden(model, block, [shortest, longest], padding, positions)
            difference = torch.linalg.vector_norm(beside[-len(alone) :] - alone)
            tolerance = max(TOLERANCE, ROUNDINGS * torch.finfo(alone.dtype).eps)
            equal = difference <= tolerance * torch.linalg.vector_norm(alone)
            prepared.takes_left_padding = bool(equal)
        except (RuntimeError, IndexError, ValueError):  # a model that cannot be called so
            prepared.takes_left_padding = False
        if not prepared.takes_left_padding:
            logger.warning(ONE_BY_ONE, type(model.get_base_model()).__name__)
    return prepared.takes_left_padding


def _hidden(
    model: Any, block: nn.Module, rows: Sequence[Tokens], padding: int, positions: int
) -> Tensor:
    """Compute the first row's hidden vectors (positions + 1, d) at a block: of its last tokens and of the first new one."""
    device, batch = input_device(model), collate(rows, padding, "left")
    ids, mask = (batch[name].to(device) for name in ("input_ids", "attention_mask"))
    with torch.no_grad(), collected_outputs(block) as outputs:
        generate_greedily(model, ids, mask, padding, 2, min_new_tokens=2)
    return torch.cat([outputs[0][0, -positions:], outputs[-1][0, -1:]])
