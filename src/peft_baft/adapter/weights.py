"""Check that a saved adapter is whole, and of a format that this version reads, before a model is touched."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor

from peft_baft.adapter.base_identity import SAMPLE
from peft_baft.adapter.embeddings import may_be_embeddings
from peft_baft.adapter.memory import SIZES, unpacked
from peft_baft.adapter.parameters import gate_shapes

if TYPE_CHECKING:
    from peft_baft.adapter.config import BaftConfig

FILE = "adapter_model.safetensors"
# Numbers of saved formats: one more whenever a tensor or a setting changes its name, its shape or its meaning. Adapters with
# `pack_ranks` or `answer_positions` have the second, and memories of edits the third, so that versions which do not know these
# refuse them; all others still have the first.
FORMAT, EXTENDED_FORMAT, MEMORY_FORMAT = 1, 2, 3
FORMER_USAGE = "baft_load"  # what `baft_gate_usage` was called in folders without a number
NEWER = f"saved by a newer peft_baft (format {{}}); this version reads up to {MEMORY_FORMAT}: pip install -U peft-baft"
UNNUMBERED = (
    "saved by a peft_baft from before saved formats had a number. Edit again; or bring it to format 1: in "
    f"{FILE}, rename the tensors that end in {FORMER_USAGE}, if there are any, so that they end in baft_gate_usage, and "
    'add the line "baft_format": 1 to adapter_config.json'
)
WITHOUT_RELATIONS = (
    "was saved before memories of edits told common relations apart, or is damaged: it has no relation_keys. "
    "Teach its facts again; `baft log` lists them."
)
# Tensors of a memory of edits: integers of these types, by the last part of their names; the others hold floating-point numbers.
IN_MEMORY = re.compile(r"\.baft_(?:codes|router)\.(?:.+\.)?(\w+)$")
INTEGERS = {
    **dict.fromkeys(("codes", "keys", "relation_keys"), torch.int8),
    **dict.fromkeys(
        ("numbers", "made", "lengths", "ids", "wordings", "before", "after"), torch.int32
    ),
    **dict.fromkeys(("texts", "relation_names"), torch.uint8),
}
BASE = "base_model.model."  # how PEFT begins the names of a model's tensors
LARGEST = 1e9  # no training gets there: a number beyond it is a flipped bit, and would overflow in the model
# Tasks for which PEFT adds names to modules_to_save, present or not.
HEADS = (
    "SEQ_CLS",
    "TOKEN_CLS",
    "QUESTION_ANS",
)


def check_folder(folder: Path, config: BaftConfig) -> dict[str, tuple[int, ...]]:
    """Check the weights in a folder against their config, and return the shapes of all tensors.

    Which blocks are edited is read from the file where the config leaves it to a default or a regular expression, so that
    no expression out of a file is run on a model.

    Returns:
        Shapes by the tensors' names in the base model.

    Raises:
        ValueError: the folder does not hold the adapter of `config` in safetensors, whole and nothing else.
    """
    file = folder / FILE
    if not file.is_file():
        raise ValueError(
            f"{file} is missing. Weights are read from that format alone: PEFT's older one is a pickle."
        )
    try:
        tensors = load_file(file)
    except Exception as error:
        # safetensors lets through torch's errors and Python's beside its own.
        raise ValueError(
            f"{file} cannot be read ({error}). It is damaged: take a good copy, or edit again."
        ) from None
    check_adapter(tensors, config, str(file))
    return {name.removeprefix(BASE): tuple(tensor.shape) for name, tensor in tensors.items()}


def check_adapter(tensors: Mapping[str, Tensor], config: BaftConfig, where: str) -> None:
    """Raise a ValueError unless tensors, by their names in a file, are the adapter of a config, whole and nothing else.

    PEFT may have added the model's embeddings. Whether they are those of a model is checked with the model; their values are
    the model's, and not checked.

    Args:
        config: its blocks are filled in from the tensors where a default or an expression would have chosen them.
    """
    if any(name.endswith(f".{FORMER_USAGE}") for name in tensors):
        raise ValueError(f"{where} was {UNNUMBERED}.")
    if config.memory and not any(name.endswith(".relation_keys") for name in tensors):
        raise ValueError(f"{where} {WITHOUT_RELATIONS}")
    blocks = {
        name.rpartition(".baft.baft_")[0].removeprefix(BASE)
        for name in tensors
        if ".baft.baft_router." not in name
    } - {""}
    names_no_blocks = config.target_modules is None or isinstance(config.target_modules, str)
    if names_no_blocks or config.exclude_modules:
        config.target_modules, config.exclude_modules = sorted(blocks), None
    expected = _expected_shapes(tensors, blocks, config)
    check_tensors(expected, tensors, where)
    if config.memory:
        check_memory(tensors, where)
    others = sorted(tensors.keys() - expected.keys())
    of_adapter = [name for name in others if ".baft.baft_" in name]
    if of_adapter or not may_be_embeddings(others, tensors):
        # PEFT would write it over the model's own tensor of that name.
        raise ValueError(
            f"{where} holds {(of_adapter or others)[0]!r:.100}, which is no part of its adapter. Modules that are saved "
            "alongside an adapter are named in modules_to_save."
        )


def check_tensors(
    expected: Mapping[str, tuple[int | None, ...]], tensors: Mapping[str, Tensor], where: str
) -> None:
    """Raise a ValueError unless the expected tensors are there, in their shapes (None fits any), and finite."""
    problems = []
    for name, shape in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            problems.append(f"{name} is missing")
        elif not _fits(tensor, shape):
            problems.append(f"{name} is {tuple(tensor.shape)} instead of {tuple(shape)}")
        elif tensor.device.type != "meta" and not _could_be_trained(name, tensor):
            problems.append(f"{name} holds NaN, infinity, or what no training gives")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(
            f"The weights in {where} do not fit their adapter_config.json: {'; '.join(problems[:3])}{more}. The file is damaged "
            "or belongs to another adapter; take a good copy, or edit again."
        )


def _fits(tensor: Tensor, shape: tuple[int | None, ...]) -> bool:
    sizes_fit = all(
        expected in (None, size) for expected, size in zip(shape, tensor.shape, strict=False)
    )
    return len(shape) == tensor.ndim and sizes_fit


def _could_be_trained(name: str, tensor: Tensor) -> bool:
    kind = IN_MEMORY.search(name)
    if kind is not None and INTEGERS.get(kind[1]) is not None:
        return tensor.dtype == INTEGERS[kind[1]]
    # Of a tensor that is sharded over processes, this one's part: asking for the others would wait for them.
    own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.is_floating_point() and bool((own.float().abs() < LARGEST).all())


def check_memory(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise a ValueError unless the tensors of a memory of edits belong together."""
    router, edits = {}, []
    for name, tensor in tensors.items():
        block, _, part = name.rpartition(".baft.baft_")
        if part.startswith("router."):
            router[part.removeprefix("router.")] = tensor
        elif block:
            edits.append(len(tensor))
    lengths, numbers = router["lengths"].long(), router["numbers"].tolist()
    count, ids = len(numbers), router["ids"]
    is_whole = (
        {*edits, len(lengths)} == {count}
        and len(set(numbers)) == count
        and all(1 <= number <= int(router["made"]) for number in numbers)
        and bool((lengths >= 1).all())
        and int(lengths.sum()) == len(ids) == len(router["keys"]) + count
    )
    if is_whole and count:
        try:
            is_whole = bool(((ids >= 0) & (ids < len(unpacked(router["texts"])))).all())
            is_whole = is_whole and _relations_are_whole(router)
        except ValueError:
            is_whole = False
    if not is_whole:
        raise ValueError(
            f"The memory of edits in {where} does not hold together: its tensors are those of different numbers of edits or "
            "tokens. The file is damaged; take a good copy, or edit again."
        )


def _relations_are_whole(router: Mapping[str, Tensor]) -> bool:
    """Tell whether the wordings of relations in a memory belong together."""
    lengths, relations, kinds = router["wordings"].long().unbind(1)
    names = len(unpacked(router["relation_names"]))
    return (
        bool((lengths >= 1).all())
        and int(lengths.sum()) == len(router["relation_keys"])
        and bool(((relations >= 0) & (relations < names) & (kinds >= 0)).all())
    )


def _expected_shapes(
    tensors: Mapping[str, Tensor], blocks: set[str], config: BaftConfig
) -> dict[str, tuple[int | None, ...]]:
    """Return names and shapes of the tensors that the config promises, for every block that it names in full or by its end.

    Args:
        blocks: those that the file has tensors for.
    """
    if config.memory:
        return _expected_of_memory(blocks, config)
    r, d, k = config.r, config.hidden_size, config.gate_count
    shapes: dict[str, tuple[int | None, ...]] = {
        "basis.weight": (r, d),
        "source.weight": (r, d),
        "source.bias": (r,),
    }
    if k:
        shapes |= {f"gate.{name}": shape for name, shape in gate_shapes(config, d).items()}
        shapes["gate_usage"] = (k + 1,)
    of_adapter = {
        f"{BASE}{block}.baft.baft_{name}": shape
        for block in _expected_blocks(blocks, config)
        for name, shape in shapes.items()
    }

    other_shapes = {
        name: tuple(tensor.shape) for name, tensor in tensors.items() if ".baft.baft_" not in name
    }
    of_saved_modules: dict[str, tuple[int | None, ...]] = {}
    for module in config.modules_to_save or ():
        of_module = {
            name: shape
            for name, shape in other_shapes.items()
            if f"{module}." in name.removeprefix(BASE)
        }
        if not of_module and config.task_type not in HEADS:
            # A name that no file has: the module is reported as missing.
            of_module = {f"{BASE}{module}": ()}
        of_saved_modules |= of_module
    return of_saved_modules | of_adapter


def memory_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Read from the shapes of a memory's tensors how many edits and tokens it holds, as its config has it."""
    of_router = {
        name.rpartition(".")[2]: shape for name, shape in shapes.items() if ".baft_router." in name
    }
    return {size: of_router[name][0] for size, name in SIZES.items()}


def _expected_blocks(blocks: set[str], config: BaftConfig) -> set[str]:
    """Return the blocks that the config names, in full where the file has tensors for them."""
    expected: set[str] = set()
    for target in config.target_modules or ("a block",):
        expected |= {block for block in blocks if f".{block}".endswith(f".{target}")} or {target}
    return expected


def _expected_of_memory(blocks: set[str], config: BaftConfig) -> dict[str, tuple[int | None, ...]]:
    """Return names and shapes of the tensors of a memory of edits; None for what their number decides."""
    d, k = config.hidden_size, config.key_dimensions
    of_block: dict[str, tuple[int | None, ...]] = {"codes": (None, config.r), "scales": (None,)}
    of_router: dict[str, tuple[int | None, ...]] = {
        **dict.fromkeys(("numbers", "lengths", "ids", "texts", "relation_names"), (None,)),
        **dict.fromkeys(("before", "after"), (None,)),
        "made": (),
        "keys": (None, k),
        "relation_keys": (None, k),
        "wordings": (None, 3),
        "mean": (d,),
        "sample": (SAMPLE,),
        "whitening": (d, k),
    }
    key_block = config.key_block or "the key block"
    return {
        f"{BASE}{block}.baft.baft_codes.{name}": shape
        for block in _expected_blocks(blocks, config)
        for name, shape in of_block.items()
    } | {f"{BASE}{key_block}.baft.baft_router.{name}": shape for name, shape in of_router.items()}


def promised_shapes(blocks: set[str], config: BaftConfig) -> dict[str, tuple[int | None, ...]]:
    """Return names and shapes of the tensors that a config promises for these blocks, as a saved file has them."""
    shapes = _expected_shapes({}, blocks, config)
    return {name: shapes[name] for name in sorted(shapes) if ".baft.baft_" in name}
