"""Linear layers that skip padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_baft.adapter import baft_layers

# Padding is skipped in batches of at least this many tokens, of which at most this share is real.
SPARED_FROM, SPARED_BELOW = 32, 0.9


def forwards_without_padding(
    model: Any, real: Tensor, forwards: Mapping[nn.Module, Callable[..., Any]]
) -> dict[nn.Module, Callable[..., Any]]:
    """Return forwards of the model's linear layers that compute only the real tokens and return 0 for padding.

    This is done only where it is faster: with few tokens, and on a GPU with many as well, a layer spends its time reading its
    weights.

    Args:
        real: (rows, tokens) bool.
        forwards: forwards that already replace those of some layers.
    """
    if (
        real.device.type != "cpu"
        or real.numel() < SPARED_FROM
        or real.float().mean() > SPARED_BELOW
    ):
        return dict(forwards)
    places, head = real.flatten().nonzero()[:, 0], model.get_output_embeddings()
    in_adapters = {id(module) for layer in baft_layers(model) for module in layer.modules()}
    replaced: dict[nn.Module, Any] = dict(forwards)
    for module in model.modules():
        is_linear = isinstance(module, nn.Linear | Conv1D)
        if is_linear and module is not head and id(module) not in in_adapters:
            forward = forwards.get(module, module.forward)
            replaced[module] = partial(_at_real_tokens, forward, real.shape, places)
    return replaced


def _at_real_tokens(
    forward: Callable[[Tensor], Tensor], shape: torch.Size, places: Tensor, h: Tensor
) -> Tensor:
    if h.shape[:-1] != shape:
        return forward(h)
    out = forward(h.flatten(0, 1).index_select(0, places))
    padded = out.new_zeros(shape.numel(), out.shape[-1]).index_copy(0, places, out)
    return padded.view(*shape, -1)
