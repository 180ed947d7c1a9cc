"""Distinguish modules that `target_modules` names on purpose from those named out of habit, as for LoRA."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from peft_baft.adapter.blocks import configured_depth, find_stack
from peft_baft.adapter.config import BaftConfig
from peft_baft.adapter.supported import streams_per_token

logger = logging.getLogger(__name__)
EVERY_LINEAR = "all-linear"  # PEFT's name for the linear layers of all blocks
NOT_BLOCKS = (
    "A BaFT adapter edits the output of decoder blocks, the vectors that one block passes to the next. %s"
    "To edit blocks, leave target_modules out and choose them with layers_to_transform=[...], counted from 0."
)


def require_blocks(model: nn.Module, config: BaftConfig, names: Sequence[str]) -> None:
    """Raise a ValueError if a suffix such as `q_proj` targets modules inside several blocks and no block.

    Modules that are named individually, or by an expression, are edited with a warning. Configs that were already fitted to a
    model, such as that of a saved adapter, are accepted, and so is any config for a model without a list of blocks.

    Args:
        names: all modules that the config targets.
    """
    blocks = _block_names(model)
    if config.saved_shapes or config.hidden_size is not None:
        return
    for name in names:
        if isinstance(model.get_submodule(name), nn.ModuleList | nn.ModuleDict):
            raise ValueError(NOT_BLOCKS % f"{name} is a list of modules, which has no output. ")
    if not blocks:
        return
    if config.target_modules == EVERY_LINEAR:
        raise ValueError(
            NOT_BLOCKS % f"target_modules={EVERY_LINEAR!r} names the linear layers inside. "
        )
    ends = [] if isinstance(config.target_modules, str) else config.target_modules or []
    for end in ends:
        found = [name for name in names if f".{name}".endswith(f".{end}")]
        if len(found) > 1 and blocks.isdisjoint(found):
            raise ValueError(
                NOT_BLOCKS % f"target_modules names {end!r}, which is {_in_words(found)}. "
                + " To edit the output of these modules, give the full name of each."
            )
    others = [name for name in names if name not in blocks]
    if others:
        logger.warning(NOT_BLOCKS, f"This one edits the output of {_in_words(others)}. ")


def _block_names(model: nn.Module) -> frozenset[str]:
    """Return the names of the blocks that can be edited; empty if these are unknown."""
    try:
        stack = find_stack(model)
    except ValueError:
        return frozenset()
    if streams_per_token(model) > 1:
        return frozenset()
    blocks = dict(model.get_submodule(stack).named_children())
    if len(blocks) != configured_depth(model):
        return frozenset()
    return frozenset(f"{stack}.{number}" for number in blocks)


def _in_words(names: Sequence[str]) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"{', '.join(names[:2])}{more}"
