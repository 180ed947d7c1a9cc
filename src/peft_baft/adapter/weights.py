"""Check that a saved adapter is whole, and of a format that this version reads, before a model is touched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch import Tensor

from peft_baft.adapter.embeddings import may_be_embeddings
from peft_baft.adapter.kinds import SavedTensor

if TYPE_CHECKING:
    from peft_baft.adapter.config import BaftConfig

FILE = "adapter_model.safetensors"
# A saved format has a number, one more whenever a tensor or a setting changes its name, its shape or its meaning. Which numbers
# are read is said by each kind of adapter.
FORMER_USAGE = "baft_load"  # what `baft_gate_usage` was called in folders without a number
NEWER = (
    "saved by a newer peft_baft (format {}); this version reads up to {}: pip install -U peft-baft"
)
UNNUMBERED = (
    "saved by a peft_baft from before saved formats had a number. Edit again; or bring it to format 1: in "
    f"{FILE}, rename the tensors that end in {FORMER_USAGE}, if there are any, so that they end in baft_gate_usage, and "
    'add the line "baft_format": 1 to adapter_config.json'
)
MARK = ".baft.baft_"  # between the name of a block and that of an adapter's tensor
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
    blocks = {name.rpartition(MARK)[0].removeprefix(BASE) for name in tensors} - {""}
    names_no_blocks = config.target_modules is None or isinstance(config.target_modules, str)
    if names_no_blocks or config.exclude_modules:
        config.target_modules, config.exclude_modules = sorted(blocks), None
    expected = _expected_shapes(tensors, blocks, config)
    check_tensors(expected, tensors, where)
    for block in blocks:
        start = f"{BASE}{block}{MARK}"
        of_block = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
        config.kind.check_tensors(of_block, where)
    others = sorted(tensors.keys() - expected.keys())
    of_adapter = [name for name in others if MARK in name]
    if of_adapter or not may_be_embeddings(others, tensors):
        # PEFT would write it over the model's own tensor of that name.
        raise ValueError(
            f"{where} holds {(of_adapter or others)[0]!r:.100}, which is no part of its adapter. Modules that are saved "
            "alongside an adapter are named in modules_to_save."
        )


def check_tensors(
    expected: Mapping[str, SavedTensor], tensors: Mapping[str, Tensor], where: str
) -> None:
    """Raise a ValueError unless the expected tensors are there, in their shapes and dtypes, and finite."""
    problems = []
    for name, wanted in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            problems.append(f"{name} is missing")
        elif not wanted.fits(tensor):
            dtype = "" if wanted.dtype is None else f" {wanted.dtype}"
            problems.append(f"{name} is {tuple(tensor.shape)} instead of {wanted.shape}{dtype}")
        elif tensor.device.type != "meta" and not _could_be_trained(tensor, wanted):
            problems.append(f"{name} holds NaN, infinity, or what no training gives")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(
            f"The weights in {where} do not fit their adapter_config.json: {'; '.join(problems[:3])}{more}. The file is damaged "
            "or belongs to another adapter; take a good copy, or edit again."
        )


def _could_be_trained(tensor: Tensor, wanted: SavedTensor) -> bool:
    if wanted.dtype is not None and not wanted.dtype.is_floating_point:
        return True
    # Of a tensor that is sharded over processes, this one's part: asking for the others would wait for them.
    own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.is_floating_point() and bool((own.float().abs() < LARGEST).all())


def _expected_shapes(
    tensors: Mapping[str, Tensor], blocks: set[str], config: BaftConfig
) -> dict[str, SavedTensor]:
    """Return the tensors that the config promises, for every block that it names in full or by its end.

    Args:
        blocks: those that the file has tensors for.
    """
    of_adapter = {
        f"{BASE}{block}{MARK}{name}": saved
        for block in _expected_blocks(blocks, config)
        for name, saved in config.kind.saved_tensors(config, block).items()
    }

    other_shapes = {
        name: tuple(tensor.shape) for name, tensor in tensors.items() if MARK not in name
    }
    of_saved_modules: dict[str, SavedTensor] = {}
    for module in config.modules_to_save or ():
        of_module = {
            name: SavedTensor(shape)
            for name, shape in other_shapes.items()
            if f"{module}." in name.removeprefix(BASE)
        }
        if not of_module and config.task_type not in HEADS:
            # A name that no file has: the module is reported as missing.
            of_module = {f"{BASE}{module}": SavedTensor(())}
        of_saved_modules |= of_module
    return of_saved_modules | of_adapter


def _expected_blocks(blocks: set[str], config: BaftConfig) -> set[str]:
    """Return the blocks that the config names, in full where the file has tensors for them."""
    expected: set[str] = set()
    for target in config.target_modules or ("a block",):
        expected |= {block for block in blocks if f".{block}".endswith(f".{target}")} or {target}
    return expected


def promised_tensors(blocks: set[str], config: BaftConfig) -> dict[str, SavedTensor]:
    """Return the tensors that a config promises for these blocks, as a saved file has them."""
    expected = _expected_shapes({}, blocks, config)
    return {name: expected[name] for name in sorted(expected) if MARK in name}
