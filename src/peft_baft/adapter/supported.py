"""Refuse models and blocks that cannot be edited, before the model is changed, so that no wrong tokens are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from peft_baft.adapter.blocks import blocks_left_out, text_config

# Architectures whose structure does not reliably show why they cannot be edited.
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
