"""Refuse models and modules that cannot be edited, before the model is changed, so that no wrong tokens are trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from peft_baft.adapter.blocks import blocks_left_out, configured_depth, find_stack, text_config
from peft_baft.adapter.config import BaftConfig

logger = logging.getLogger(__name__)
EVERY_LINEAR = "all-linear"  # PEFT's name for the linear layers of all blocks
NOT_BLOCKS = (
    "A BaFT adapter edits the output of decoder blocks, the vectors that one block passes to the next. %s"
    "To edit blocks, leave target_modules out and choose them with layers_to_transform=[...], counted from 0."
)
# Architectures that cannot be edited, for reasons that their structure does not show reliably.
UNFIT_ARCHITECTURES = {
    "blt": "its main stack reads patches of several bytes, so that a block's vectors are not those of tokens",
    "cpmant": "it puts learned vectors before the text, and reads a prompt in both directions",
    "prophetnet": "it predicts several tokens at once, in streams that follow the text in one sequence",
    "reformer": "its reversible blocks return two streams, and recompute them in backward without hooks",
    "xlm": "it reads text in both directions, and predicts the next word at a mask token",
    "xlnet": "it reads text in both directions, and its blocks return (tokens, rows, d)",
}
# Config fields with the number of hidden vectors that the blocks return per token.
STREAMS = ("altup_num_inputs", "hc_mult", "hc_count")


def require_decoder(model: nn.Module) -> None:
    """Raise a ValueError for a model that generates text, but not from a prompt that its decoder reads.

    Models that do not generate, such as classifiers, are accepted: the last tokens of their input are edited.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} has an encoder for the prompt and a decoder for the answer. A BaFT adapter edits the last "
            "prompt tokens and the answer in one stack of blocks: use a decoder-only model."
        )
    reason = UNFIT_ARCHITECTURES.get(getattr(config, "model_type", ""))
    if reason is not None and _generates(model):
        raise ValueError(
            f"{type(model).__name__} cannot be edited by a BaFT adapter: {reason}. Use one of the models that "
            "docs/architectures.md lists as whole."
        )


def require_editable(model: nn.Module, names: Sequence[str]) -> None:
    """Raise a ValueError if a model generates text, but its blocks do not return one hidden vector per token read.

    Args:
        names: the modules to edit.
    """
    if not _generates(model):
        return
    config, streams = text_config(model), streams_per_token(model)
    for name in names:
        block = model.get_submodule(name)
        if any(getattr(module, "is_decoder", None) is False for module in block.modules()):
            raise ValueError(
                f"{type(model).__name__} was built to read text in both directions (is_decoder=False), so that an answer would "
                "change the prompt before it. Load it with is_decoder=True: "
                "AutoModelForCausalLM.from_pretrained(name, is_decoder=True)."
            )
        is_block = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleList)
        if is_block and streams > 1:
            field = next(field for field in STREAMS if getattr(config, field, None) == streams)
            raise ValueError(
                f"The blocks of {type(model).__name__} return {streams} hidden vectors per token ({field} in its config), but a "
                "BaFT adapter edits one. Use target_modules to name modules inside the blocks that return (rows, tokens, d)."
            )
        if is_block and int(name.rpartition(".")[2]) in blocks_left_out(model):
            raise ValueError(
                f"{name} of {type(model).__name__} attends to pictures, and is skipped in a forward without one. Choose other "
                "blocks with layers_to_transform."
            )


def streams_per_token(model: nn.Module) -> int:
    """Return the number of hidden vectors that the blocks of a model return per token."""
    config = text_config(model)
    return max(getattr(config, field, None) or 1 for field in STREAMS)


def _generates(model: Any) -> bool:
    """Return whether a model is one of transformers' models that generate text."""
    return (
        hasattr(model, "generate") and hasattr(model, "can_generate") and bool(model.can_generate())
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
