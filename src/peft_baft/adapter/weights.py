"""Whether a saved adapter is whole: checked before a model is touched."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

if TYPE_CHECKING:
    from peft_baft.adapter.config import BaftConfig

FILE = "adapter_model.safetensors"


def check_folder(folder: Path, config: BaftConfig) -> None:
    """Raise a ValueError unless the safetensors file in `folder`, if there is one, holds the adapter of `config`."""
    file = folder / FILE
    if not file.is_file():
        return  # on the Hub, or PEFT's older format: PEFT says what it misses
    try:
        found = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read ({error}). It is damaged: take a good copy, or edit again.") from None
    check_tensors(_expected(found, config), found, str(file))


def check_tensors(expected: Mapping[str, tuple[int | None, ...]], found: Mapping[str, Tensor], where: str) -> None:
    """Raise a ValueError unless every expected tensor is there, in its shape (None fits any), and finite."""
    wrong = []
    for name, shape in expected.items():
        tensor = found.get(name)
        if tensor is None:
            wrong.append(f"{name} is missing")
        elif len(shape) != tensor.ndim or any(n not in (None, m) for n, m in zip(shape, tensor.shape, strict=True)):
            wrong.append(f"{name} is {tuple(tensor.shape)} instead of {tuple(shape)}")
        elif tensor.device.type != "meta" and not tensor.isfinite().all():
            wrong.append(f"{name} holds NaN or infinity")
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise ValueError(
            f"The weights in {where} do not fit their adapter_config.json: {'; '.join(wrong[:3])}{more}. The file is damaged "
            "or belongs to another adapter; take a good copy, or edit again."
        )


def _expected(found: Mapping[str, Tensor], config: BaftConfig) -> dict[str, tuple[int | None, ...]]:
    """Names and shapes of the tensors that the config promises, for every block that the file names."""
    r, d, k = config.r, config.hidden_size, config.gate_count
    shapes: dict[str, tuple[int | None, ...]] = {"basis.weight": (r, d), "source.weight": (r, d), "source.bias": (r,)}
    if k:
        rows = k + (config.weighting == "product")
        shapes |= {"gate.weight": (rows, d), "load": (k + 1,)}
        shapes |= {"gate.bias": (rows,)} if config.gate_bias else {}
        shapes |= {f"gate.{config.gate_norm}": (d,)} if config.gate_norm in ("scale", "center") else {}
    targets = config.target_modules if isinstance(config.target_modules, (list, set)) else ()
    blocks = {name.rpartition(".baft.baft_")[0] for name in found} - {""} | {f"base_model.model.{t}" for t in targets}
    return {f"{block}.baft.baft_{name}": shape for block in blocks for name, shape in shapes.items()}
