"""Take over LoReFT and DiReFT interventions that pyreft (pyvene) saved, and write ours in that layout.

Such a folder holds `config.json`, which lists the interventions, and for each of them a file `intkey_….bin` with the tensors
`weight` (r, d), `bias` (r,) and `rotate_layer` (d, r). With R the transpose of `rotate_layer`, LoReFT is

    h + Rᵀ (weight h + bias - R h)

(arXiv 2404.03592, Eq. 2), which is an adapter without gates (`weighting="none"`); DiReFT leaves R h out. What the folder does
not say is at which tokens they act: pyreft is told that with each call, and in generation acts on the prompt alone.
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
# Of pyvene's list of a representation's settings, which may be saved without their names.
REPRESENTATION = ("layer", "component", "unit", "max_number_of_units")
BLOCK_OUTPUT = "block_output"
# A block's output by its path, as in `model.layers[15].output` and `transformer.h[3].output`.
BLOCK_PATH = re.compile(r"[\w.]+\[(\d+)\]\.output")
FARTHEST_FROM_ORTHONORMAL = 0.05  # the rows of a basis that was saved in bfloat16 are within 0.02


@dataclass(frozen=True)
class _Intervention:
    """One intervention at the output of a block. weight: (r, d); bias: (r,); R: (r, d) with orthonormal rows."""

    block: int
    is_loreft: bool
    weight: Tensor
    bias: Tensor
    R: Tensor

    @property
    def shift_weight(self) -> Tensor:
        """D of an update Rᵀ (D h + bias), (r, d)."""
        return self.weight - self.R if self.is_loreft else self.weight


def load_loreft(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    prompt_positions: int,
    answer_positions: int | None = 0,
    adapter_name: str = "default",
) -> PeftModel:
    """Put the interventions of a folder that pyreft saved onto a model, as an adapter of this package without gates.

    Args:
        model: the base model that they were trained on, without adapters.
        folder: holds `config.json` and a file `intkey_….bin` for each intervention.
        prompt_positions: on how many of the last prompt tokens they act, which the folder does not say: n of pyreft's `l<n>`.
        answer_positions: on how many answer tokens they act: 0 as in pyreft, None for all of them as BaFT does.
        adapter_name: the name of the adapter.

    Raises:
        ValueError: the folder holds something else than one LoReFT or DiReFT intervention of one rank at the output of each of
            some blocks, or does not fit the model. The model is left as it was.
    """
    found = _read_folder(Path(folder))
    ranks = {tuple(one.weight.shape) for one in found}
    if len(ranks) > 1:
        raise ValueError(
            f"All interventions of {folder} must have one rank and width; they have (r, d) = {sorted(ranks)}."
        )
    ((r, d),) = ranks
    config = BaftConfig(
        task_type="CAUSAL_LM",
        r=r,
        prompt_positions=prompt_positions,
        answer_positions=answer_positions,
        weighting="none",
        layers_to_transform=[one.block for one in found],
    )
    width = configured_width(model, model)
    if width != d:
        raise ValueError(
            f"The interventions of {folder} are for a model of width {d}, and {type(model).__name__} has {width}."
        )
    peft_model = get_peft_model(model, config, adapter_name)
    layers = sorted(baft_layers(model), key=_block_number)
    for layer, one in zip(layers, sorted(found, key=lambda one: one.block), strict=True):
        source: Any = layer.baft_source[adapter_name]
        with torch.no_grad():
            layer.baft_basis[adapter_name].weight.copy_(one.R)
            source.weight.copy_(one.shift_weight)
            source.bias.copy_(one.bias)
    return peft_model


def save_loreft(model: PeftModel, folder: str | Path, adapter_name: str = "default") -> None:
    """Write an adapter without gates into a folder that pyreft's `ReftModel.load` reads, as LoReFT interventions.

    The folder does not say at which tokens the adapter acts: tell pyreft that, with each call.

    Raises:
        ValueError: the adapter has gates, or was combined from several, or is not at the output of blocks; or the folder
            holds files already.
    """
    config: Any = getattr(model, "peft_config", {}).get(adapter_name)
    if not isinstance(config, BaftConfig):
        raise ValueError(f"The model has no BaFT adapter {adapter_name!r}.")
    if config.weighting != "none" or config.pack_ranks:
        raise ValueError(
            "pyreft has neither gates nor combined bases: an adapter can be written in its layout with weighting='none' and "
            f"without pack_ranks, and this one has weighting={config.weighting!r} and pack_ranks={config.pack_ranks}."
        )
    path = Path(folder)
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty: name a new folder.")
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
            # The settings that pyvene lists after the unit's number: rank, and then what LoReFT does not use.
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
            f"pyreft's layout numbers blocks, and {layer.name} is the output of another module."
        )
    return int(numbers[0])


def _read_folder(folder: Path) -> list[_Intervention]:
    """Read the interventions of a folder, in the order of their list.

    Raises:
        ValueError: as `load_loreft`.
    """
    try:
        settings = json.loads((folder / CONFIG).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no folder that pyreft saved: {error}") from error
    listed = settings.get("representations") if isinstance(settings, Mapping) else None
    kinds = settings.get("intervention_types") if isinstance(settings, Mapping) else None
    if not isinstance(listed, list) or not isinstance(kinds, list) or len(listed) != len(kinds):
        raise ValueError(
            f"{folder / CONFIG} must list `representations` and as many `intervention_types`, as pyreft saves them."
        )
    found = [
        _read_intervention(folder, representation, str(kind))
        for representation, kind in zip(listed, kinds, strict=True)
    ]
    blocks = [one.block for one in found]
    if not blocks or len(set(blocks)) < len(blocks):
        raise ValueError(
            f"{folder} has {len(blocks)} interventions, at the blocks {blocks}; wanted is one at each of some blocks. Two at "
            "one block are pyreft's way of editing a prompt's first and last tokens with different weights, which this adapter "
            "type does not have."
        )
    return found


def _read_intervention(folder: Path, representation: Any, kind: str) -> _Intervention:
    name = re.sub(r"^.*\.|\W+$", "", kind)
    if name not in KINDS:
        raise ValueError(
            f"{folder} holds an intervention {kind}; those that have a counterpart here are {' and '.join(KINDS)}."
        )
    if isinstance(representation, list):
        representation = dict(zip(REPRESENTATION, representation, strict=False))
    values = [representation.get(key) for key in REPRESENTATION]
    layer, component, unit, units = values
    path = BLOCK_PATH.fullmatch(str(component))
    if (component != BLOCK_OUTPUT and path is None) or unit != "pos":
        raise ValueError(
            f"{folder} has an intervention at {component!r} of unit {unit!r}; wanted is the output of a block, "
            f"{BLOCK_OUTPUT!r}, of unit 'pos'."
        )
    block = int(path[1]) if path else layer
    if not isinstance(block, int) or block < 0:
        raise ValueError(f"{folder} has an intervention at block {layer!r}; wanted is its number.")
    where = re.sub(r"\.", "_", component) if path else f"{BLOCK_OUTPUT}"
    prefix = f"comp_{where}" if path else f"layer_{layer}_comp_{where}"
    file = folder / f"intkey_{prefix}_unit_{unit}_nunit_{units}#0.bin"
    return _Intervention(block, name == KINDS[0], *_read_tensors(file))


def _read_tensors(file: Path) -> tuple[Tensor, Tensor, Tensor]:
    """Read weight (r, d), bias (r,) and R (r, d) in float32; code in the file is not run."""
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch lets through errors of pickle, zip files and its own.
        raise ValueError(f"{file} cannot be read: {error}") from error
    if not isinstance(tensors, Mapping) or set(tensors) != set(SHAPES):
        raise ValueError(f"{file} must hold the tensors {SHAPES}, not {list(tensors)!r:.200}.")
    weight, bias, rotate = (tensors[name].float() for name in SHAPES)
    shapes = [tuple(tensor.shape) for tensor in (weight, bias, rotate)]
    if weight.ndim != 2 or shapes != [weight.shape, weight.shape[:1], weight.shape[::-1]]:
        raise ValueError(
            f"{file} must hold tensors of the shapes {SHAPES}, not {dict(zip(SHAPES, shapes, strict=True))}."
        )
    if not all(torch.isfinite(tensor).all() for tensor in (weight, bias, rotate)):
        raise ValueError(f"{file} holds numbers that are not finite: it is damaged.")
    distance = (rotate.mT @ rotate - torch.eye(len(bias))).abs().max().item()
    if distance > FARTHEST_FROM_ORTHONORMAL:
        raise ValueError(
            f"The columns of rotate_layer in {file} must be orthonormal; their products differ from that by {distance:.2g}."
        )
    return weight, bias, rotate.mT.contiguous()
