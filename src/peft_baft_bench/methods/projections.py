"""Find the weight matrices that editing methods change."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from peft_baft.adapter.blocks import find_stack

DOWN = ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "w2")
UP = ("up_proj", "gate_up_proj", "c_fc", "dense_h_to_4h", "fc1", "fc_in", "w3")
EASYEDIT_DEPTH = 32  # number of blocks of the models for which block numbers are published


def down_projection(model: nn.Module, layer: int | None, published: int, method: str) -> str:
    """Return the name of a block's down projection, the last matrix of its MLP.

    Args:
        layer: the block, counted from 0; None for block `published` of 32, scaled to the model's depth.
        method: the method's name in error messages.

    Raises:
        ValueError: the block does not exist, or does not have exactly one down projection with a known name.
    """
    if layer is None:
        layer = scale_block(model, published)
    return _projection(model, layer, method, "down", DOWN)


def up_projection(model: nn.Module, layer: int, method: str) -> str:
    """Return the name of a block's up projection, the first matrix of its MLP; see `down_projection`."""
    return _projection(model, layer, method, "up", UP)


def block_count(model: nn.Module) -> int:
    """Return the number of blocks of a model."""
    return len(cast(nn.ModuleList, model.get_submodule(find_stack(model))))


def scale_block(
    model: nn.Module, published: int, depth: int = EASYEDIT_DEPTH, blocks_after: int = 0
) -> int:
    """Scale a block number of a model with `depth` blocks to this model; at least `blocks_after` blocks follow it."""
    own_depth = block_count(model)
    return min(round(published * own_depth / depth), own_depth - 1 - blocks_after)


def _projection(
    model: nn.Module, layer: int, method: str, what: str, names: tuple[str, ...]
) -> str:
    stack = find_stack(model)
    depth = block_count(model)
    if not 0 <= layer < depth:
        raise ValueError(
            f"{method}: layer must be a block of the model, 0 to {depth - 1}, not {layer}."
        )
    block = model.get_submodule(f"{stack}.{layer}")
    found = [name for name, _ in block.named_modules() if _is_called(name, names)]
    if len(found) != 1:
        has = f"several ({', '.join(found)})" if found else "none"
        raise ValueError(
            f"{method}: block {layer} of {type(model).__name__} must have one {what} projection, named one of "
            f"{', '.join(names)}, but has {has}."
        )
    return f"{stack}.{layer}.{found[0]}"


def is_transposed(module: nn.Module) -> bool:
    """Return whether a linear module stores its weight as (inputs, outputs), like GPT-2's."""
    return type(module).__name__ == "Conv1D"


def weight_of(module: nn.Module) -> Tensor:
    """Return the weight of a linear module as (outputs, inputs), float32.

    Raises:
        ValueError: the weight is not of a floating-point type.
    """
    weight: Tensor = module.weight.detach()
    if not weight.is_floating_point():
        raise ValueError(
            f"The method needs a floating-point weight, but this one is {weight.dtype}: load the model without "
            "quantisation."
        )
    return (weight.mT if is_transposed(module) else weight).float()


def by_rows(hidden: Tensor, rows: int) -> Tensor:
    """Reshape hidden vectors to (rows, tokens, d); some modules, such as OPT's MLP, put all tokens in one row."""
    return hidden if hidden.dim() == 3 else hidden.reshape(rows, -1, hidden.shape[-1])


def _is_called(name: str, names: tuple[str, ...]) -> bool:
    """Return whether a module of a block is an MLP matrix; some attention modules use the same names."""
    parent, _, last = name.rpartition(".")
    return last in names and "attn" not in parent and "attention" not in parent
