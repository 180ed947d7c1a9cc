"""Find the decoder blocks of a model by its structure, whatever the model is called."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import nn

from peft_baft.adapter.model_call import takes_tokens

if TYPE_CHECKING:
    from peft_baft.adapter.config import BaftConfig

# Counted from 1: Sec. 3.1, for a model of 32 blocks.
PAPER_BLOCKS, PAPER_DEPTH = (
    (9, 18, 24, 28),
    32,
)


def default_blocks(depth: int) -> list[int]:
    """Scale the paper's 9;18;24;28 of 32 to `depth` blocks, as indices from 0.

    The paper's numbers are read as counting from 1: the only reading that also exists in its 28-block model.
    """
    scaled = {max(1, int(block * depth / PAPER_DEPTH + 0.5)) for block in PAPER_BLOCKS}
    return [block - 1 for block in sorted(scaled)]


def find_stack(model: nn.Module, pattern: list[str] | str | None = None) -> str:
    """Find the name of the `ModuleList` that holds the decoder blocks of `model`.

    It is the list as long as the model's config says, within the language part of the model; where there is no such
    list, the only list of blocks that there is, or the longest one of a model without a config. The blocks may be of
    several classes, as attention and recurrent ones are in a hybrid model. `pattern` names the list, in full or by the
    last parts of its name, where that finds none or the wrong one.

    Raises:
        ValueError: there is no such list, or several may be meant.
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
            f"{type(model).__name__} has no {wanted}. Name the modules whose output (batch, tokens, d) is to be edited "
            "with target_modules."
        )
    if not hasattr(model, "config"):
        return min(candidates, key=lambda name: (-len(lists[name]), name.count(".")))
    least_nested = min(name.count(".") for name in candidates)
    outermost = [name for name in candidates if name.count(".") == least_nested]
    as_long_as_configured = len(lists[outermost[0]]) == depth
    if len(candidates) == 1 or (as_long_as_configured and len(outermost) == 1):
        return outermost[0]
    raise ValueError(
        f"{type(model).__name__} has several lists that may hold its decoder blocks: {', '.join(candidates)}. Name the "
        "one whose modules each token passes once, in turn, with layers_pattern, or the modules with target_modules."
    )


def _lists_of_blocks(model: nn.Module, pattern: list[str] | str | None) -> dict[str, nn.ModuleList]:
    """Return the outermost `ModuleList`s of the language part of a model, by their names in the whole model.

    Left out are lists inside blocks (experts, adapters), and lists of single layers (embeddings, norms, heads): a block
    has parts.
    """
    names = [pattern] if isinstance(pattern, str) else pattern
    language_part = _language_part(model)
    lists: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if not isinstance(module, nn.ModuleList) or not len(module) or inside:
            continue
        if names is None and not any(True for block in module for _ in block.children()):
            continue
        if names is None or any(f".{name}".endswith(f".{wanted}") for wanted in names):
            lists[name] = module
    within = {name: module for name, module in lists.items() if name.startswith(language_part)}
    return within or lists


def _language_part(model: nn.Module) -> str:
    """Return how the names of the modules of a model's decoder begin: "" where the model does not tell its decoder apart."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    return f"{name}." if name else ""


def configured_depth(model: nn.Module) -> int | None:
    """Return the number of decoder blocks by the model's config; None where it does not say.

    A model with an encoder counts the two apart; its `num_hidden_layers` may then mean the encoder's.
    """
    config = text_config(model)
    return getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", None)


def blocks_left_out(model: nn.Module) -> frozenset[int]:
    """Return the indices of the blocks that do not run on text alone."""
    return frozenset(getattr(text_config(model), "cross_attention_layers", None) or ())


def text_config(model: nn.Module) -> Any:
    """Return the config of the model's language part; None where it has no config."""
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def attention_window(model: nn.Module) -> int | None:
    """Return how many columns a token of the model looks back over; None where that is not limited, or not known."""
    return getattr(text_config(model), "sliding_window", None)


def configured_width(model: nn.Module, block: nn.Module) -> int:
    """Return the width d of the hidden vectors that `block` gives: the block's own out_features, else the model's hidden size.

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
    """Return the full names of the chosen decoder blocks, the default ones where `indices` is None.

    Raises:
        TypeError, ValueError: an index is no integer, stands twice, or lies outside the model.
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
    """Return `index`, or the next lower index that is not left out; the next higher one where there is none."""
    while index in left_out and index > 0:
        index -= 1
    while index in left_out:
        index += 1
    return index


def blocks_before(model: nn.Module, name: str) -> list[nn.Module]:
    """List the blocks that run before the one in which a module stands: their outputs do not depend on that module."""
    stack = find_stack(model)
    number = int(name.removeprefix(f"{stack}.").partition(".")[0])
    return list(cast(nn.ModuleList, model.get_submodule(stack)))[:number]


def missing_targets(model: nn.Module, config: BaftConfig) -> list[str]:
    """Return those of the config's block names that `model` lacks, for example because it is not as deep."""
    targets = config.target_modules
    if isinstance(targets, str) or targets is None:
        return []
    names = {name for name, _ in model.named_modules()}
    return sorted(t for t in targets if not any(n == t or n.endswith(f".{t}") for n in names))


def stack_owner(model: nn.Module, block_name: str) -> nn.Module:
    """Find the module that runs the list in which `block_name` stands, and is called with tokens.

    In BERT and its kin the list's owner gets hidden vectors alone; mask and cache are then read at the next module around it
    that gets token ids. Where none gets any, it is the list's owner; the model itself where the block stands in no list.
    """
    parts = block_name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[:cut])), nn.ModuleList):
            around = [model.get_submodule(".".join(parts[:end])) for end in range(cut - 1, -1, -1)]
            return next((module for module in around if takes_tokens(module)), around[0])
    return model
