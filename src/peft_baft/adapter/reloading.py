"""Load a saved adapter into an existing one with the same parameters; its settings are adopted."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from peft_baft.adapter.balance import attach_balance
from peft_baft.adapter.config import BaftConfig
from peft_baft.adapter.embeddings import plain_name, require_embeddings
from peft_baft.adapter.layer import BaftLayer
from peft_baft.adapter.weights import BASE, MARK

# Fields of a config that belong to the model it is on, and do not affect what the adapter computes.
MODEL_FIELDS = (
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "target_modules",
    "exclude_modules",
)
REMEDY = (
    "Load it under another adapter_name, or call delete_adapter({!r}) first. Nothing was changed."
)


def require_fitting(model: PeftModel, adapter_name: str, config: Any, where: str) -> None:
    """Raise a ValueError unless a saved adapter can be loaded into an existing adapter of a model.

    Args:
        config: the saved config, with the shapes of the saved tensors. where: the folder's name.
    """
    remedy = REMEDY.format(adapter_name)
    if not isinstance(config, BaftConfig):
        raise ValueError(
            f"{where} holds an adapter of type {config.peft_type.value}, and {adapter_name!r} is a BaFT adapter. {remedy}"
        )
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    own = {name.removeprefix(BASE): tuple(tensor.shape) for name, tensor in state.items()}
    differing = sorted(name for name in own if not _fits(name, own[name], config))
    others = {name: shape for name, shape in config.saved_shapes.items() if name not in own}
    parts = (".baft.", *(f"{module}." for module in config.modules_to_save or ()))
    # If the embeddings are saved too, a saved module's tensors also have the names that they have in PEFT's wrapper.
    unknown = [name for name in others if plain_name(name) not in own]
    differing += sorted(name for name in unknown if any(part in name for part in parts))
    if differing:
        name = differing[0]
        raise ValueError(
            f"The adapter in {where} has other parameters than {adapter_name!r}: {name} is "
            f"{config.saved_shapes.get(name, 'missing')} there and {own.get(name, 'missing')} here. {remedy}"
        )
    require_embeddings(model.get_base_model(), others)


def _fits(name: str, shape: tuple[int, ...], config: BaftConfig) -> bool:
    """Return whether a saved tensor can be loaded into the model's tensor of this name and shape."""
    block, _, part = name.rpartition(MARK)
    saved = config.kind.saved_tensors(config, block).get(part)
    found = config.saved_shapes.get(name)
    if saved is None or saved.dtype is None or found is None:
        return found == shape
    sizes = zip(saved.shape, found, shape, strict=True)
    return all(size is None or there == here for size, there, here in sizes)


def adopt_settings(model: nn.Module, adapter_name: str, config: BaftConfig) -> None:
    """Apply the settings of a saved config, which `require_fitting` has accepted, to an adapter.

    Args:
        model: the base model.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BaftLayer)]
    for layer in layers:
        own: Any = layer.configs.get(adapter_name)
        if own is None:
            continue
        # In place: the tuners and the base model share the object.
        of_model = {name: getattr(own, name) for name in MODEL_FIELDS}
        vars(own).update(deepcopy(vars(config)) | of_model)
        bases: Any = layer.baft_basis
        gates: Any = layer.baft_gate
        if adapter_name in bases:
            bases[adapter_name].apply_settings(own.pack_ranks)
        if adapter_name in gates:
            gates[adapter_name].apply_settings(own)
    if config.balance_weight:
        attach_balance(model)
