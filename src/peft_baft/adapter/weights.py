"""Whether a saved adapter is whole: checked before a model is touched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file
from torch import Tensor

from peft_baft.adapter.parameters import gate_shapes

if TYPE_CHECKING:
    from peft_baft.adapter.config import BaftConfig

FILE = "adapter_model.safetensors"
FORMAT = 1  # of saved folders: one more whenever a tensor or a setting changes its name, its shape or its meaning
FORMER_USAGE = "baft_load"  # what `baft_gate_usage` was called in folders without a number
NEWER = f"saved by a newer peft_baft (format {{}}); this version reads up to {FORMAT}: pip install -U peft-baft"
UNNUMBERED = (
    "saved by a peft_baft from before saved formats had a number. Edit again; or bring it to format 1: in "
    f"{FILE}, rename the tensors that end in {FORMER_USAGE}, if there are any, so that they end in baft_gate_usage, and "
    'add the line "baft_format": 1 to adapter_config.json'
)
BASE = "base_model.model."  # how PEFT begins the names of a model's tensors
LARGEST = 1e9  # no training gets there: a number beyond it is a flipped bit, and would overflow in the model
HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")  # tasks for which PEFT adds names to modules_to_save, present or not


def check_folder(folder: Path, config: BaftConfig) -> dict[str, tuple[int, ...]]:
    """Names in the base model, and shapes, of all tensors in a folder.

    Raises a ValueError unless it holds the adapter of `config` in safetensors, whole and nothing else.

    Which blocks are edited is read from the file where the config leaves it to a default or a regular expression, so that
    no expression out of a file is run on a model.
    """
    file = folder / FILE
    if not file.is_file():
        raise ValueError(f"{file} is missing. Weights are read from that format alone: PEFT's older one is a pickle.")
    try:
        found = load_file(file)
    except Exception as error:  # safetensors lets through torch's and Python's beside its own
        raise ValueError(f"{file} cannot be read ({error}). It is damaged: take a good copy, or edit again.") from None
    if any(name.endswith(f".{FORMER_USAGE}") for name in found):
        raise ValueError(f"{file} was {UNNUMBERED}.")
    blocks = {name.rpartition(".baft.baft_")[0].removeprefix(BASE) for name in found} - {""}
    if config.exclude_modules or config.target_modules is None or isinstance(config.target_modules, str):
        config.target_modules, config.exclude_modules = sorted(blocks), None
    expected = _expected(found, blocks, config)
    check_tensors(expected, found, str(file))
    stray = sorted(found.keys() - expected.keys())
    if stray:  # PEFT would write it over the model's own tensor of that name
        raise ValueError(
            f"{file} holds {stray[0]!r:.100}, which is no part of its adapter. Modules that are saved beside an adapter are "
            "named in modules_to_save; embeddings are left out with save_pretrained(..., save_embedding_layers=False)."
        )
    return {name.removeprefix(BASE): tuple(tensor.shape) for name, tensor in found.items()}


def check_tensors(expected: Mapping[str, tuple[int | None, ...]], found: Mapping[str, Tensor], where: str) -> None:
    """Raise a ValueError unless the expected tensors are there, in their shapes (None fits any), and finite."""
    wrong = []
    for name, shape in expected.items():
        tensor = found.get(name)
        if tensor is None:
            wrong.append(f"{name} is missing")
        elif len(shape) != tensor.ndim or any(n not in (None, m) for n, m in zip(shape, tensor.shape, strict=True)):
            wrong.append(f"{name} is {tuple(tensor.shape)} instead of {tuple(shape)}")
        elif tensor.device.type != "meta" and not (
            tensor.is_floating_point() and (tensor.float().abs() < LARGEST).all()
        ):
            wrong.append(f"{name} holds NaN, infinity, or what no training gives")
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(
            f"The weights in {where} do not fit their adapter_config.json: {'; '.join(wrong[:3])}{more}. The file is damaged "
            "or belongs to another adapter; take a good copy, or edit again."
        )


def _expected(found: Mapping[str, Tensor], blocks: set[str], config: BaftConfig) -> dict[str, tuple[int | None, ...]]:
    """Names and shapes of the tensors that the config promises, for every block that it names in full or by its end."""
    r, d, k = config.r, config.hidden_size, config.gate_count
    shapes: dict[str, tuple[int | None, ...]] = {"basis.weight": (r, d), "source.weight": (r, d), "source.bias": (r,)}
    if k:
        shapes |= {f"gate.{name}": shape for name, shape in gate_shapes(config, d).items()}
        shapes["gate_usage"] = (k + 1,)
    named: set[str] = set()
    for target in config.target_modules or ("a block",):
        named |= {block for block in blocks if f".{block}".endswith(f".{target}")} or {target}
    expected = {f"{BASE}{block}.baft.baft_{name}": shape for block in named for name, shape in shapes.items()}
    others = {name: tuple(tensor.shape) for name, tensor in found.items() if ".baft.baft_" not in name}
    for module in config.modules_to_save or ():
        own = {name: shape for name, shape in others.items() if f"{module}." in name.removeprefix(BASE)}
        expected = (own or ({} if config.task_type in HEADS else {f"{BASE}{module}": ()})) | expected
    return expected
