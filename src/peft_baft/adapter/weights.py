"""Check that a saved adapter is complete, and in a format that this version reads, before the model is changed."""

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
# The saved format has a number, which increases whenever a tensor or setting changes its name, shape or meaning. Each kind of
# adapter declares which formats it reads.
FORMER_USAGE = "baft_load"  # what `baft_gate_usage` was called in folders without a number
NEWER = (
    "saved by a newer peft_baft (format {}); this version reads up to {}: pip install -U peft-baft"
)
UNNUMBERED = (
    "saved by a version of peft_baft whose formats had no number. Edit again, or convert it to format 1: in "
    f"{FILE}, rename the tensors that end in {FORMER_USAGE}, if any, so that they end in baft_gate_usage, and "
    'add the line "baft_format": 1 to adapter_config.json'
)
MARK = ".baft.baft_"  # between the name of a block and that of an adapter's tensor
BASE = "base_model.model."  # PEFT's prefix for the names of a model's tensors
LARGEST = 1e9  # beyond what training produces: a larger number is a flipped bit, and would overflow in the model
# Tasks for which PEFT adds names to modules_to_save, whether the model has such modules or not.
HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def check_folder(folder: Path, config: BaftConfig) -> dict[str, tuple[int, ...]]:
    """Check the weights in a folder against their config.

    If the config leaves the edited blocks to a default or a regular expression, they are read from the file, so that no
    expression from a file is run on a model.

    Returns:
        The shapes of all tensors, by their names in the base model.

    Raises:
        ValueError: the folder does not contain exactly the adapter of `config`, in safetensors.
    """
    file = folder / FILE
    if not file.is_file():
        raise ValueError(
            f"{file} is missing. Weights are read from this format only: PEFT's older one is a pickle."
        )
    try:
        tensors = load_file(file)
    except Exception as error:
        # Not only safetensors' own errors, but also torch's and Python's.
        raise ValueError(
            f"{file} cannot be read ({error}). It is damaged: use an intact copy, or edit again."
        ) from None
    check_adapter(tensors, config, str(file))
    return {name.removeprefix(BASE): tuple(tensor.shape) for name, tensor in tensors.items()}


def check_adapter(tensors: Mapping[str, Tensor], config: BaftConfig, where: str) -> None:
    """Raise a ValueError unless tensors, by their names in a file, are exactly the adapter of a config.

    PEFT may have added the model's embeddings. These are checked when the model is known; their values are not.

    Args:
        config: its blocks are filled in from the tensors if it leaves them to a default or an expression.
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
        # PEFT would overwrite the model's own tensor of this name.
        raise ValueError(
            f"{where} holds {(of_adapter or others)[0]!r:.100}, which is not part of its adapter. Modules that are saved "
            "with an adapter must be named in modules_to_save."
        )


def check_tensors(
    expected: Mapping[str, SavedTensor], tensors: Mapping[str, Tensor], where: str
) -> None:
    """Raise a ValueError unless all expected tensors are present, finite, and have the right shapes and dtypes."""
    problems = []
    for name, wanted in expected.items():
        tensor = tensors.get(name)
        if tensor is None:
            problems.append(f"{name} is missing")
        elif not wanted.fits(tensor):
            dtype = "" if wanted.dtype is None else f" {wanted.dtype}"
            problems.append(f"{name} is {tuple(tensor.shape)} instead of {wanted.shape}{dtype}")
        elif tensor.device.type != "meta" and not _could_be_trained(tensor, wanted):
            problems.append(f"{name} holds NaN, infinity or implausible numbers")
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise ValueError(
            f"The weights in {where} do not fit their adapter_config.json: {'; '.join(problems[:3])}{more}. The file is damaged "
            "or belongs to another adapter; use an intact copy, or edit again."
        )


def _could_be_trained(tensor: Tensor, wanted: SavedTensor) -> bool:
    if wanted.dtype is not None and not wanted.dtype.is_floating_point:
        return True
    # Only this process's shard of a sharded tensor: reading the others would wait for their processes.
    own = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return tensor.is_floating_point() and bool((own.float().abs() < LARGEST).all())


def _expected_shapes(
    tensors: Mapping[str, Tensor], blocks: set[str], config: BaftConfig
) -> dict[str, SavedTensor]:
    """Return the tensors that the config requires, for every block that it names in full or by suffix.

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
            # No file has this name, so the module is reported as missing.
            of_module = {f"{BASE}{module}": SavedTensor(())}
        of_saved_modules |= of_module
    return of_saved_modules | of_adapter


def _expected_blocks(blocks: set[str], config: BaftConfig) -> set[str]:
    """Return the blocks that the config names, by their full names if the file has tensors for them."""
    expected: set[str] = set()
    for target in config.target_modules or ("a block",):
        expected |= {block for block in blocks if f".{block}".endswith(f".{target}")} or {target}
    return expected


def promised_tensors(blocks: set[str], config: BaftConfig) -> dict[str, SavedTensor]:
    """Return the tensors that a config requires for these blocks, by their names in a saved file."""
    expected = _expected_shapes({}, blocks, config)
    return {name: expected[name] for name in sorted(expected) if MARK in name}
