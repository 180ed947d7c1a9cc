"""What cannot be edited, and why: found before a model is touched, so that nothing is trained at wrong tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from peft_baft.adapter.blocks import blocks_left_out, text_config

# Architectures whose structure does not show, or not reliably, what an edit needs.
UNFIT_ARCHITECTURES = {
    "blt": "its main stack reads patches of several bytes, so that a block's vectors are not those of tokens",
    "cpmant": "it puts learned vectors before the text, and reads a prompt in both directions",
    "prophetnet": "it predicts several tokens at once, in streams that stand behind the text in one sequence",
    "reformer": "its reversible blocks give two streams, and compute them again in backward without hooks",
    "xlm": "it reads text in both directions, and asks for the next word at a mask token",
    "xlnet": "it reads text in both directions, and its blocks give (tokens, rows, d)",
}
# Config fields that say how many hidden vectors the blocks give for each token.
STREAMS = ("altup_num_inputs", "hc_mult", "hc_count")


def require_decoder(model: nn.Module) -> None:
    """Refuse a model that generates text, but not from a prompt that its decoder reads.

    Models that do not generate, such as classifiers, are let through: there the last tokens of the input are edited.

    Raises:
        ValueError: with the reason, and what to do.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} has an encoder for the prompt and a decoder for the answer. A BaFT adapter edits the last "
            "prompt tokens and the answer in one stack of blocks: take a decoder-only model."
        )
    reason = UNFIT_ARCHITECTURES.get(getattr(config, "model_type", ""))
    if reason is not None and _generates(model):
        raise ValueError(
            f"{type(model).__name__} cannot be edited by a BaFT adapter: {reason}. Take another model, of those in "
            "docs/architectures.md that are whole."
        )


def require_editable(model: nn.Module, names: Sequence[str]) -> None:
    """Refuse blocks of a model that generates text, if their outputs are not one hidden vector for each token read so far.

    Args:
        names: of the modules to edit.

    Raises:
        ValueError: with the reason, and what to do.
    """
    if not _generates(model):
        return
    config, streams = text_config(model), streams_per_token(model)
    for name in names:
        block = model.get_submodule(name)
        if any(getattr(module, "is_decoder", None) is False for module in block.modules()):
            raise ValueError(
                f"{type(model).__name__} was built to read text in both directions (is_decoder=False), so that an answer would "
                "change what stands before it. Load it with is_decoder=True: "
                "AutoModelForCausalLM.from_pretrained(name, is_decoder=True)."
            )
        is_block = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.ModuleList)
        if is_block and streams > 1:
            field = next(field for field in STREAMS if getattr(config, field, None) == streams)
            raise ValueError(
                f"The blocks of {type(model).__name__} give {streams} hidden vectors for each token ({field} in its "
                "config), but a BaFT adapter edits one. Name modules inside the blocks that give (rows, tokens, d), with "
                "target_modules."
            )
        if is_block and int(name.rpartition(".")[2]) in blocks_left_out(model):
            raise ValueError(
                f"{name} of {type(model).__name__} attends to pictures, and is left out of a forward without one. Choose other "
                "blocks with layers_to_transform."
            )


def streams_per_token(model: nn.Module) -> int:
    """Return how many hidden vectors the blocks of a model give for each token."""
    config = text_config(model)
    return max(getattr(config, field, None) or 1 for field in STREAMS)


def _generates(model: Any) -> bool:
    """Tell whether a model is one of transformers' that generate text."""
    return (
        hasattr(model, "generate") and hasattr(model, "can_generate") and bool(model.can_generate())
    )
