"""Find the matrices of a model that editing methods change."""

from __future__ import annotations

from typing import Any

from peft_baft.adapter.blocks import find_stack

DOWN_PROJECTIONS = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2")
EASYEDIT_DEPTH = 32  # of the models that published numbers of blocks are for


def down_projection(model: Any, layer: int | None, published: int, method: str) -> str:
    """Find the name of a block's down projection, the last product of its MLP.

    Args:
        layer: the block, counted from 0; None for `published` of 32, scaled to the depth of the model.
        method: what an error names.

    Raises:
        ValueError: the block does not exist, or has not one down projection under a known name.
    """
    stack = find_stack(model)
    depth = len(model.get_submodule(stack))
    if layer is None:
        layer = round(published * depth / EASYEDIT_DEPTH)
    if not 0 <= layer < depth:
        raise ValueError(
            f"{method}: layer must be a block of the model, 0 to {depth - 1}, not {layer}."
        )
    block = model.get_submodule(f"{stack}.{layer}")
    found = [name for name, _ in block.named_modules() if _is_down_projection(name)]
    if len(found) != 1:
        what = f"several ({', '.join(found)})" if found else "none"
        raise ValueError(
            f"{method}: block {layer} of {type(model).__name__} must have one down projection, called one of "
            f"{', '.join(DOWN_PROJECTIONS)}, but has {what}."
        )
    return f"{stack}.{layer}.{found[0]}"


def require_layer(layer: object, method: str) -> None:
    """Raise a TypeError unless a setting `layer` is an integer or None."""
    if layer is not None and type(layer) is not int:
        raise TypeError(f"{method}: layer must be an integer, not {layer!r}.")


def _is_down_projection(name: str) -> bool:
    """Tell whether a module of a block, by its name, is the last product of an MLP; some attentions end in one alike."""
    parent, _, last = name.rpartition(".")
    return last in DOWN_PROJECTIONS and "attn" not in parent and "attention" not in parent
