"""Convert LoReFT and DiReFT interventions that pyreft (pyvene) saved to adapters, and adapters to that format.

A saved folder has a `config.json`, which lists the interventions, and for each intervention a file `intkey_….bin` with the
tensors `weight` (r, d), `bias` (r,) and `rotate_layer` (d, r). With R the transpose of `rotate_layer`, LoReFT is

    h + Rᵀ (weight h + bias - R h)

(arXiv 2404.03592, Eq. 2), which is an adapter without gates (`weighting="none"`). DiReFT omits R h. The folder does not say which
tokens are edited: pyreft takes them as an argument of each call, and edits only prompt tokens in generation.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from peft_baft.adapter.blocks import configured_width
from peft_baft.adapter.config import BaftConfig
from peft_baft.adapter.layer import BaftLayer
from peft_baft.adapter.model import baft_layers
from peft_baft.intervention import orthonormal_rows

CONFIG = "config.json"
KINDS = ("LoreftIntervention", "DireftIntervention")
SHAPES = {"weight": "(r, d)", "bias": "(r,)", "rotate_layer": "(d, r)"}
# The first settings in pyvene's list for a representation; they may be saved as a list without names.
REPRESENTATION = ("layer", "component", "unit", "max_number_of_units")
BLOCK_OUTPUT = "block_output"
# The output of a block given as a path, such as `model.layers[15].output` or `transformer.h[3].output`.
BLOCK_PATH = re.compile(r"[\w.]+\[(\d+)\]\.output")
ORTHONORMAL_TOLERANCE = 0.05  # the error of a basis that was saved in bfloat16 is below 0.02


@dataclass(frozen=True)
class _Intervention:
    """An intervention at the output of a block. weight: (r, d); bias: (r,); R: (r, d) with orthonormal rows."""

    block: int
    is_loreft: bool
    weight: Tensor
    bias: Tensor
    R: Tensor

    @property
    def shift_weight(self) -> Tensor:
        """D in the update Rᵀ (D h + bias), (r, d)."""
        return self.weight - self.R if self.is_loreft else self.weight


def load_loreft(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    prompt_positions: int,
    answer_positions: int | None = 0,
    adapter_name: str = "default",
) -> PeftModel:
    """Load interventions that pyreft saved onto a model, as an adapter without gates.

    Args:
        model: the base model that they were trained on, without adapters.
        folder: has `config.json` and a file `intkey_….bin` for each intervention.
        prompt_positions: the number of last prompt tokens to edit, n in pyreft's `l<n>`; the folder does not contain it.
        answer_positions: the number of answer tokens to edit: 0 as in pyreft, or None for all of them as in BaFT.
        adapter_name: the name of the adapter.

    Raises:
        ValueError: the folder is not a set of LoReFT or DiReFT interventions of the same rank, at most one at the output of each
            block, or does not fit the model. The model is not changed.
    """
    interventions = _read_folder(Path(folder))
    shapes = {tuple(intervention.weight.shape) for intervention in interventions}
    if len(shapes) > 1:
        raise ValueError(
            f"All interventions of {folder} must have the same rank and width; they have (r, d) = {sorted(shapes)}."
        )
    ((r, d),) = shapes
    config = BaftConfig(
        task_type="CAUSAL_LM",
        r=r,
        prompt_positions=prompt_positions,
        answer_positions=answer_positions,
        weighting="none",
        layers_to_transform=[intervention.block for intervention in interventions],
    )
    width = configured_width(model, model)
    if width != d:
        raise ValueError(
            f"The interventions of {folder} are for a model of width {d}, but {type(model).__name__} has width {width}."
        )
    peft_model = get_peft_model(model, config, adapter_name)
    layers = sorted(baft_layers(model), key=_block_number)
    interventions.sort(key=lambda intervention: intervention.block)
    for layer, intervention in zip(layers, interventions, strict=True):
        basis: Any = layer.baft_basis[adapter_name]
        source: Any = layer.baft_source[adapter_name]
        with torch.no_grad():
            basis.weight.copy_(intervention.R)
            source.weight.copy_(intervention.shift_weight)
            source.bias.copy_(intervention.bias)
    return peft_model


def save_loreft(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> None:
    """Save an adapter without gates as LoReFT interventions, in a folder that pyreft's `ReftModel.load` reads.

    The folder does not say which tokens the adapter edits; pyreft takes them as an argument of each call.

    Raises:
        ValueError: the adapter has gates, was combined from several adapters, or is not at the output of blocks; or the folder is
            not empty.
    """
    config: Any = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, BaftConfig):
        raise ValueError(f"The model has no BaFT adapter {adapter_name!r}.")
    if config.weighting != "none" or config.pack_ranks:
        raise ValueError(
            "pyreft has neither gates nor combined bases: its format needs weighting='none' and no pack_ranks, but this adapter "
            f"has weighting={config.weighting!r} and pack_ranks={config.pack_ranks}."
        )
    path = Path(folder)
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty; name a new folder.")
    layers = {_block_number(layer): layer for layer in baft_layers(model.get_base_model())}
    path.mkdir(parents=True, exist_ok=True)
    keys = []
    for block, layer in sorted(layers.items()):
        source: Any = layer.baft_source[adapter_name]
        R = orthonormal_rows(layer.baft_basis[adapter_name].weight.detach()).cpu()
        keys.append(f"layer_{block}_comp_{BLOCK_OUTPUT}_unit_pos_nunit_1#0")
        tensors = {
            "weight": source.weight.detach().cpu().float() + R,
            "bias": source.bias.detach().cpu().float(),
            "rotate_layer": R.mT.contiguous(),
        }
        torch.save(tensors, path / f"intkey_{keys[-1]}.bin")
    kind = f"<class 'pyreft.interventions.{KINDS[0]}'>"
    settings = {
        "representations": [
            # After the number of units, pyvene lists the rank and then settings that LoReFT does not use.
            [block, BLOCK_OUTPUT, "pos", 1, config.r, *[None] * 9]
            for block in sorted(layers)
        ],
        "intervention_types": [kind] * len(keys),
        "intervention_dimensions": [config.hidden_size] * len(keys),
        "intervention_constant_sources": [True] * len(keys),
        "sorted_keys": keys,
        "mode": "parallel",
        "model_type": f"<class '{type(model.get_base_model()).__module__}.{type(model.get_base_model()).__name__}'>",
    }
    (path / CONFIG).write_text(json.dumps(settings, indent=2), "utf-8")


def _block_number(layer: BaftLayer) -> int:
    numbers = re.findall(r"\.(\d+)$", layer.name)
    if not numbers:
        raise ValueError(
            f"pyreft's format refers to blocks by number, but {layer.name} is not a numbered block."
        )
    return int(numbers[0])


def _read_folder(folder: Path) -> list[_Intervention]:
    """Read the interventions of a folder, in the order in which it lists them.

    Raises:
        ValueError: as `load_loreft`.
    """
    try:
        settings = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is not a folder that pyreft saved: {error}") from error
    listed = settings.get("representations") if isinstance(settings, Mapping) else None
    kinds = settings.get("intervention_types") if isinstance(settings, Mapping) else None
    if not isinstance(listed, list) or not isinstance(kinds, list) or len(listed) != len(kinds):
        raise ValueError(
            f"{folder / CONFIG} must list `representations` and as many `intervention_types`, as pyreft saves them."
        )
    interventions = [
        _read_intervention(folder, representation, str(kind))
        for representation, kind in zip(listed, kinds, strict=True)
    ]
    blocks = [intervention.block for intervention in interventions]
    if not blocks or len(set(blocks)) < len(blocks):
        raise ValueError(
            f"{folder} has {len(blocks)} interventions, at the blocks {blocks}; there must be at least one, and at most one at "
            "each block. With two at one block, pyreft edits a prompt's first and last tokens with different weights, which "
            "this adapter type does not support."
        )
    return interventions


def _read_intervention(folder: Path, representation: Any, kind: str) -> _Intervention:
    name = re.sub(r"^.*\.|\W+$", "", kind)
    if name not in KINDS:
        raise ValueError(
            f"{folder} has an intervention {kind}; only {' and '.join(KINDS)} are supported."
        )
    if isinstance(representation, list):
        representation = dict(zip(REPRESENTATION, representation, strict=False))
    values = [representation.get(key) for key in REPRESENTATION]
    layer, component, unit, units = values
    path = BLOCK_PATH.fullmatch(str(component))
    if (component != BLOCK_OUTPUT and path is None) or unit != "pos":
        raise ValueError(
            f"{folder} has an intervention at {component!r} with unit {unit!r}; only the output of a block, {BLOCK_OUTPUT!r}, "
            "with unit 'pos' is supported."
        )
    block = int(path[1]) if path else layer
    if not isinstance(block, int) or block < 0:
        raise ValueError(f"{folder} has an intervention at block {layer!r}, which is not a number.")
    where = re.sub(r"\.", "_", component) if path else BLOCK_OUTPUT
    prefix = f"comp_{where}" if path else f"layer_{layer}_comp_{where}"
    file = folder / f"intkey_{prefix}_unit_{unit}_nunit_{units}#0.bin"
    return _Intervention(block, name == KINDS[0], *_read_tensors(file))


def _read_tensors(file: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Load weight (r, d), bias (r,) and R (r, d) as float32, without executing code in the file."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises errors of pickle, of zip files and its own.
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(tensors, Mapping) or set(tensors) != set(SHAPES):
        raise ValueError(f"{file} must contain the tensors {SHAPES}, not {list(tensors)!r:.200}.")
    weight, bias, rotate = (tensors[name].float() for name in SHAPES)
    shapes = [tuple(tensor.shape) for tensor in (weight, bias, rotate)]
    if weight.ndim != 2 or shapes != [weight.shape, weight.shape[:1], weight.shape[::-1]]:
        raise ValueError(
            f"{file} must contain tensors of the shapes {SHAPES}, not {dict(zip(SHAPES, shapes, strict=True))}."
        )
    if not all(torch.isfinite(tensor).all() for tensor in (weight, bias, rotate)):
        raise ValueError(f"{file} has values that are not finite; it is damaged.")
    distance = (rotate.mT @ rotate - torch.eye(len(bias))).abs().max().item()
    if distance > ORTHONORMAL_TOLERANCE:
        raise ValueError(
            f"The columns of rotate_layer in {file} must be orthonormal, but their products are off by {distance:.2g}."
        )
    return weight, bias, rotate.mT.contiguous()
