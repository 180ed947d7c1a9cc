"""Find the decoder blocks of a model by its structure, whatever the model is called."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from peft_baft.adapter.config import BaftConfig

PAPER_BLOCKS, PAPER_DEPTH = (9, 18, 24, 28), 32  # counted from 1: Sec. 3.1, for a model of 32 blocks


def default_blocks(depth: int) -> list[int]:
    """The paper's 9;18;24;28 of 32 scaled to `depth` blocks, as indices from 0.

    The paper's numbers are read as counting from 1: the only reading that also exists in its 28-block model.
    """
    scaled = {max(1, int(block * depth / PAPER_DEPTH + 0.5)) for block in PAPER_BLOCKS}
    return [block - 1 for block in sorted(scaled)]


def find_stack(model: nn.Module, pattern: list[str] | str | None = None) -> str:
    """Name of the `ModuleList` that holds the decoder blocks of `model`.

    It is the longest list of modules of one class, or the one as long as the model's config says; of several, the
    outermost one. `pattern` names the list where that finds none or the wrong one.

    Raises:
        ValueError: there is no such list.
    """
    names = [pattern] if isinstance(pattern, str) else pattern
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and (names is None or name.rpartition(".")[2] in names)
        and len({type(block) for block in module}) == 1
    }
    depth = configured_depth(model)
    candidates = [name for name, module in lists.items() if len(module) == depth] or list(lists)
    if not candidates:
        wanted = "a ModuleList of blocks" if names is None else f"a ModuleList named {' or '.join(names)}"
        raise ValueError(
            f"{type(model).__name__} has no {wanted}. Name the blocks' list with layers_pattern, or the modules whose "
            "output is to be edited with target_modules."
        )
    return min(candidates, key=lambda name: (-len(lists[name]), name.count(".")))


def configured_depth(model: nn.Module) -> int | None:
    """Number of decoder blocks by the model's config, if it has one."""
    return getattr(text_config(model), "num_hidden_layers", None)


def text_config(model: nn.Module) -> Any:
    """The config of the model's language part; None where it has no config."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def configured_width(model: nn.Module, block: nn.Module) -> int:
    """Width d of the hidden vectors that `block` gives: the block's own out_features, else the model's hidden size.

    Raises:
        ValueError: neither is known.
    """
    width = getattr(block, "out_features", None)
    if not isinstance(width, int):
        width = getattr(text_config(model), "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(
            f"The width of the output of {type(block).__name__} is unknown: neither has it out_features nor the model a "
            "config with hidden_size."
        )
    return width


def block_names(model: nn.Module, indices: Any, pattern: list[str] | str | None) -> list[str]:
    """Full names of the chosen decoder blocks, the default ones where `indices` is None.

    Raises:
        TypeError, ValueError: an index is no integer, stands twice, or lies outside the model.
    """
    stack = find_stack(model, pattern)
    depth = len(cast(nn.ModuleList, model.get_submodule(stack)))
    indices = default_blocks(depth) if indices is None else [indices] if isinstance(indices, int) else indices
    if not indices or any(isinstance(i, bool) or not isinstance(i, int) for i in indices):
        raise TypeError(f"layers_to_transform must hold block indices (integers from 0), not {indices!r}.")
    outside = [i for i in indices if not 0 <= i < depth]
    if outside:
        raise ValueError(
            f"layers_to_transform names blocks {outside}, but {type(model).__name__} has {depth} blocks, 0 to {depth - 1} "
            f"({stack}). Was the adapter made for another model?"
        )
    if len(set(indices)) < len(indices):
        raise ValueError(f"layers_to_transform names a block twice: {indices}.")
    return [f"{stack}.{i}" for i in sorted(indices)]


def missing_targets(model: nn.Module, config: BaftConfig) -> list[str]:
    """Those of the config's full block names that `model` lacks, say because it is not as deep."""
    targets = config.target_modules
    if isinstance(targets, str) or targets is None:
        return []
    names = {name for name, _ in model.named_modules()}
    return sorted(t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names))


def stack_owner(model: nn.Module, block_name: str) -> nn.Module:
    """The module that runs the list in which `block_name` stands; the model itself where it stands in none."""
    parts = block_name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[:cut])), nn.ModuleList):
            return model.get_submodule(".".join(parts[: cut - 1]))
    return model
