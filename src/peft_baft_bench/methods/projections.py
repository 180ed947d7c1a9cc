"""Find the matrices of a model that editing methods change."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from peft_baft.adapter.blocks import find_stack

DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2")
UP = ("up_proj", "gate_up_proj", "c_fc", "dense_h_to_4h", "fc1", "fc_in", "w3")
EASYEDIT_DEPTH = 32  # of the models that published numbers of blocks are for


def down_projection(model: Any, layer: int | None, published: int, method: str) -> str:
    """Find the name of a block's down projection, the last product of its MLP.

    Args:
        layer: the block, counted from 0; None for `published` of 32, scaled to the depth of the model.
        method: what an error names.

    Raises:
        ValueError: the block does not exist, or has not one down projection under a known name.
    """
    if layer is None:
        layer = scaled(model, published)
    return _projection(model, layer, method, "down", DOWN)


def up_projection(model: Any, layer: int, method: str) -> str:
    """Find the name of a block's up projection, the first product of its MLP; as `down_projection`."""
    return _projection(model, layer, method, "up", UP)


def scaled(model: Any, published: int, depth: int = EASYEDIT_DEPTH, behind: int = 0) -> int:
    """Scale the number of a block of a model of some depth to this model's depth; so many blocks must follow it."""
    own = len(model.get_submodule(find_stack(model)))
    return min(round(published * own / depth), own - 1 - behind)


def _projection(model: Any, layer: int, method: str, what: str, names: tuple[str, ...]) -> str:
    stack = find_stack(model)
    depth = len(model.get_submodule(stack))
    if not 0 <= layer < depth:
        raise ValueError(
            f"{method}: layer must be a block of the model, 0 to {depth - 1}, not {layer}."
        )
    block = model.get_submodule(f"{stack}.{layer}")
    found = [name for name, _ in block.named_modules() if _is_called(name, names)]
    if len(found) != 1:
        has = f"several ({', '.join(found)})" if found else "none"
        raise ValueError(
            f"{method}: block {layer} of {type(model).__name__} must have one {what} projection, called one of "
            f"{', '.join(names)}, but has {has}."
        )
    return f"{stack}.{layer}.{found[0]}"


def is_transposed(module: nn.Module) -> bool:
    """Tell whether a linear module keeps its weight as (inputs, outputs), as GPT-2's do."""
    return type(module).__name__ == "Conv1D"


def weight_of(module: nn.Module) -> Tensor:
    """Give the weight of a linear module as (outputs, inputs), float32.

    Raises:
        ValueError: it does not hold floating-point numbers.
    """
    weight: Tensor = module.weight.detach()  # type: ignore[assignment]
    if not weight.is_floating_point():
        raise ValueError(
            f"The method needs a weight of floating-point numbers, but this one is {weight.dtype}: load the model without "
            "quantisation."
        )
    return (weight.mT if is_transposed(module) else weight).float()


def by_rows(hidden: Tensor, rows: int) -> Tensor:
    """Give hidden vectors as (rows, tokens, d), also where a model puts all tokens in one row, as OPT's MLP does."""
    return hidden if hidden.dim() == 3 else hidden.reshape(rows, -1, hidden.shape[-1])


def require_layer(layer: object, method: str) -> None:
    """Raise a TypeError unless a setting `layer` is an integer or None."""
    if layer is not None and type(layer) is not int:
        raise TypeError(f"{method}: layer must be an integer, not {layer!r}.")


def _is_called(name: str, names: tuple[str, ...]) -> bool:
    """Tell whether a module of a block is a product of its MLP; some attentions have one of the same name."""
    parent, _, last = name.rpartition(".")
    return last in names and "attn" not in parent and "attention" not in parent
