"""Load a saved adapter into one that a model has: the parameters must be the same, and the settings are taken over."""

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

# Fields of a config that say how an adapter stands on its model, and not what it computes.
OF_THE_MODEL = (
    "inference_mode",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "target_modules",
    "exclude_modules",
)
DO = "Load it under another adapter_name, or call delete_adapter({!r}) first. Nothing was changed."


def require_fitting(model: PeftModel, adapter_name: str, config: Any, where: str) -> None:
    """Raise a ValueError unless what a folder holds can be loaded into an adapter that a model has.

    Args:
        config: of the folder, with the shapes of its tensors. where: the folder's name.
    """
    do = DO.format(adapter_name)
    if not isinstance(config, BaftConfig):
        raise ValueError(
            f"{where} holds an adapter of type {config.peft_type.value}, and {adapter_name!r} is a BaFT adapter. {do}"
        )
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    own = {name.removeprefix(BASE): tuple(tensor.shape) for name, tensor in state.items()}
    differing = sorted(name for name in own if not _fits(name, own[name], config))
    others = {name: shape for name, shape in config.saved_shapes.items() if name not in own}
    parts = (".baft.", *(f"{module}." for module in config.modules_to_save or ()))
    # A saved module also has its tensors under the names in PEFT's wrapper, where the embeddings are saved along.
    extra = {name: plain_name(name) for name in others}
    differing += sorted(
        n for n in extra if extra[n] not in own and any(part in n for part in parts)
    )
    if differing:
        name = differing[0]
        raise ValueError(
            f"The adapter in {where} has other parameters than {adapter_name!r} has: {name} is "
            f"{config.saved_shapes.get(name, 'missing')} there and {own.get(name, 'missing')} here. {do}"
        )
    require_embeddings(model.get_base_model(), others)


def _fits(name: str, shape: tuple[int, ...], config: BaftConfig) -> bool:
    """Return whether the tensor of a name, of some shape in the model, can take the one that a folder holds."""
    block, _, part = name.rpartition(MARK)
    saved = config.kind.saved_tensors(config, block).get(part)
    found = config.saved_shapes.get(name)
    if saved is None or saved.dtype is None or found is None:
        return found == shape
    sizes = zip(saved.shape, found, shape, strict=True)
    return all(size is None or there == here for size, there, here in sizes)


def take_settings(model: nn.Module, adapter_name: str, config: BaftConfig) -> None:
    """Let an adapter compute with the settings of another config, which `require_fitting` has accepted.

    Args:
        model: the base model.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BaftLayer)]
    for layer in layers:
        own: Any = layer.configs.get(adapter_name)
        if own is None:
            continue
        # In place: the tuners and the base model hold the same object.
        kept = {name: getattr(own, name) for name in OF_THE_MODEL}
        vars(own).update(deepcopy(vars(config)) | kept)
        if adapter_name in layer.baft_basis:
            layer.baft_basis[adapter_name].take_settings(own.pack_ranks)
        if adapter_name in layer.baft_gate:
            layer.baft_gate[adapter_name].take_settings(own)
    if config.balance_weight:
        attach_balance(model)
