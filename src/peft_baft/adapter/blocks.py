"""Find the decoder blocks of a model by its structure, whatever they are called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import nn

from peft_baft.adapter.model_call import takes_tokens

if TYPE_CHECKING:
    from peft_baft.adapter.config import BaftConfig

# Counted from 1: Sec. 3.1, for a model of 32 blocks.
PAPER_BLOCKS, PAPER_DEPTH = ((9, 18, 24, 28), 32)


def default_blocks(depth: int) -> list[int]:
    """Scale the paper's 9;18;24;28 of 32 to `depth` blocks, as indices from 0.

    The paper's numbers are read as counting from 1: the only reading that also exists in its 28-block model.
    """
    scaled = {max(1, int(block * depth / PAPER_DEPTH + 0.5)) for block in PAPER_BLOCKS}
    return [block - 1 for block in sorted(scaled)]


def find_stack(model: nn.Module, pattern: list[str] | str | None = None) -> str:
    """Return the name of the `ModuleList` that holds the decoder blocks of `model`.

    This is the list in the language part of the model whose length is the depth in the model's config; otherwise the only
    list of blocks, or the longest one of a model without a config. Blocks may have different classes, such as the
    attention and recurrent blocks of a hybrid model. If the right list is not found, `pattern` names it, in full or by the
    last parts of its name.

    Raises:
        ValueError: there is no such list, or several candidates.
    """
    lists = _lists_of_blocks(model, pattern)
    depth = configured_depth(model)
    candidates = [name for name, blocks in lists.items() if len(blocks) == depth] or list(lists)
    if not candidates:
        names = [pattern] if isinstance(pattern, str) else pattern
        wanted = (
            "ModuleList of blocks" if names is None else f"ModuleList named {' or '.join(names)}"
        )
        raise ValueError(
            f"{type(model).__name__} has no {wanted}. Use target_modules to name the modules whose output (batch, tokens, d) "
            "should be edited."
        )
    if not hasattr(model, "config"):
        return min(candidates, key=lambda name: (-len(lists[name]), name.count(".")))
    least_nested = min(name.count(".") for name in candidates)
    outermost = [name for name in candidates if name.count(".") == least_nested]
    as_long_as_configured = len(lists[outermost[0]]) == depth
    if len(candidates) == 1 or (as_long_as_configured and len(outermost) == 1):
        return outermost[0]
    raise ValueError(
        f"{type(model).__name__} has several lists that may hold its decoder blocks: {', '.join(candidates)}. Use "
        "layers_pattern to name the one whose modules each token passes once, in turn, or name modules with target_modules."
    )


def _lists_of_blocks(model: nn.Module, pattern: list[str] | str | None) -> dict[str, nn.ModuleList]:
    """Return the outermost `ModuleList`s of the language part of a model, by their full names.

    Lists inside blocks (experts, adapters) are excluded, and so are lists of modules without children (embeddings, norms,
    heads).
    """
    names = [pattern] if isinstance(pattern, str) else pattern
    language_part = _language_part(model)
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if not isinstance(module, nn.ModuleList) or not len(module) or inside:
            continue
        if names is None and not any(list(block.children()) for block in module):
            continue
        if names is None or any(f".{name}".endswith(f".{wanted}") for wanted in names):
            lists[name] = module
    within = {name: module for name, module in lists.items() if name.startswith(language_part)}
    return within or lists


def _language_part(model: nn.Module) -> str:
    """Return the prefix of the names of the modules in a model's decoder; "" if the model does not declare its decoder."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    return f"{name}." if name else ""


def configured_depth(model: nn.Module) -> int | None:
    """Return the number of decoder blocks in the model's config; None if it is missing.

    A model with an encoder has two numbers, and its `num_hidden_layers` may be the encoder's.
    """
    config = text_config(model)
    return getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", None)


def blocks_left_out(model: nn.Module) -> frozenset[int]:
    """Return the indices of the blocks that do not run on text only."""
    return frozenset(getattr(text_config(model), "cross_attention_layers", None) or ())


def text_config(model: nn.Module) -> Any:
    """Return the config of the model's language part; None if the model has no config."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def attention_window(model: nn.Module) -> int | None:
    """Return the number of columns that a token can attend to; None if unlimited or unknown."""
    return getattr(text_config(model), "sliding_window", None)


def configured_width(model: nn.Module, block: nn.Module) -> int:
    """Return the width d of the output of `block`: its `out_features`, otherwise the model's hidden size.

    Raises:
        ValueError: neither is known.
    """
    width = getattr(block, "out_features", None)
    if not isinstance(width, int):
        width = getattr(text_config(model), "hidden_size", None)
    if not isinstance(width, int):
        raise ValueError(
            f"The width of the output of {type(block).__name__} is unknown: it has no out_features, and the model has no config "
            "with hidden_size."
        )
    return width


def block_names(model: nn.Module, indices: Any, pattern: list[str] | str | None) -> list[str]:
    """Return the full names of the chosen decoder blocks; the default ones if `indices` is None.

    Raises:
        TypeError, ValueError: an index is not an integer, occurs twice, or is out of range.
    """
    stack = find_stack(model, pattern)
    depth = len(cast(nn.ModuleList, model.get_submodule(stack)))
    if indices is None:
        left_out = blocks_left_out(model)
        indices = sorted({_first_not_in(left_out, index) for index in default_blocks(depth)})
    elif isinstance(indices, int):
        indices = [indices]
    if not indices or any(isinstance(i, bool) or not isinstance(i, int) for i in indices):
        raise TypeError(
            f"layers_to_transform must hold block indices (integers from 0), not {indices!r}."
        )
    outside = [i for i in indices if not 0 <= i < depth]
    if outside:
        raise ValueError(
            f"layers_to_transform names blocks {outside}, but {type(model).__name__} has {depth} blocks, 0 to {depth - 1} "
            f"({stack}). Was the adapter made for another model?"
        )
    if len(set(indices)) < len(indices):
        raise ValueError(f"layers_to_transform names a block twice: {indices}.")
    return [f"{stack}.{i}" for i in sorted(indices)]


def last_block(model: nn.Module) -> str:
    """Return the full name of the last decoder block that runs on text."""
    stack = find_stack(model)
    depth = len(cast(nn.ModuleList, model.get_submodule(stack)))
    return f"{stack}.{_first_not_in(blocks_left_out(model), depth - 1)}"


def _first_not_in(left_out: frozenset[int], index: int) -> int:
    """Return `index`, or the next lower index that is not left out; the next higher one if there is none."""
    while index in left_out and index > 0:
        index -= 1
    while index in left_out:
        index += 1
    return index


def blocks_before(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the blocks before the one that contains a module: their outputs do not depend on that module."""
    stack = find_stack(model)
    number = int(name.removeprefix(f"{stack}.").partition(".")[0])
    return list(cast(nn.ModuleList, model.get_submodule(stack)))[:number]


def missing_targets(model: nn.Module, config: BaftConfig) -> list[str]:
    """Return the config's block names that `model` lacks, for example because it has fewer blocks."""
    targets = config.target_modules
    if isinstance(targets, str) or targets is None:
        return []
    names = {name for name, _ in model.named_modules()}
    return sorted(t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names))


def stack_owner(model: nn.Module, block_name: str) -> nn.Module:
    """Return the module that runs the list containing `block_name`, and is called with tokens.

    In models like BERT the list's owner receives hidden vectors only; mask and cache are then read at the next enclosing
    module that takes token ids. If none does, it is the list's owner, or the model itself if the block is not in a list.
    """
    parts = block_name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[:cut])), nn.ModuleList):
            owners = [model.get_submodule(".".join(parts[:end])) for end in range(cut - 1, -1, -1)]
            return next((module for module in owners if takes_tokens(module)), owners[0])
    return model
