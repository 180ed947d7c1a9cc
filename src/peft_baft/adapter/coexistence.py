"""Which parts of a base model belong to BaFT, if it also carries adapters of other PEFT methods (say an unmerged LoRA).

PEFT's tuner methods apply to every tuner layer in the model, whatever its method; BaFT's apply to what is listed here.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import AdaLoraModel, PeftConfig, PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_baft.adapter.config import BaftConfig
from peft_baft.adapter.layer import BaftLayer

logger = logging.getLogger(__name__)
STILL_TRAINABLE = (
    "The base model carries a trainable adapter of another PEFT method. It stays trainable: Trainer or an optimiser over all "
    "trainable parameters would change it, and saving the BaFT adapter does not save it. A BaftEditor does not train it. To "
    "train the BaFT adapter only, freeze the other one first: its set_requires_grad(adapter_name, False)."
)


def bare_model(model: nn.Module) -> nn.Module:
    """Return the model inside all PeftModels and tuners, so that a BaFT adapter's names do not depend on them.

    Raises:
        ValueError: one of them acts in its own forward, which a call of the inner model would bypass.
    """
    while isinstance(model, PeftModel | PeftMixedModel | BaseTuner):
        tuner: Any = model if isinstance(model, BaseTuner) else model.base_model
        # AdaLoRA's forward only adds the regulariser of its own training to the loss.
        passable = (BaseTuner.forward, AdaLoraModel.forward)
        is_baft = any(isinstance(config, BaftConfig) for config in model.peft_config.values())
        if not is_baft and not (isinstance(tuner, BaseTuner) and type(tuner).forward in passable):
            types = {
                getattr(config.peft_type, "value", "") for config in model.peft_config.values()
            }
            raise ValueError(
                f"A BaFT adapter cannot be combined with an adapter of type {', '.join(sorted(types))}, which acts in its own "
                "forward and not in the model's layers. Merge it into the model, or unload it, and call get_peft_model on the "
                "result."
            )
        model = tuner.model
    return model


def require_new_name(
    model: nn.Module, adapter_name: str, registered: Mapping[str, PeftConfig]
) -> None:
    """Raise a ValueError if a model already carries an adapter of this name.

    Args:
        registered: the configs of other methods' adapters, whose names are checked, too.
    """
    if carried_config(model, adapter_name) is not None:
        raise ValueError(
            f"The model carries a BaFT adapter {adapter_name!r} already, and a new one of that name would discard its edits. Use "
            "the PeftModel that was created first (its load_adapter(folder, name) loads other weights into that adapter), "
            "choose another adapter_name, or remove the first one with unload() or delete_adapter()."
        )
    namesake = registered.get(adapter_name)
    if namesake is not None and not isinstance(namesake, BaftConfig):
        raise ValueError(
            f"The model has an adapter {adapter_name!r} of type {namesake.peft_type} already; choose another adapter_name."
        )


def carried_config(model: nn.Module, adapter_name: str) -> BaftConfig | None:
    """Return the config of a model's BaFT adapter of this name; None if there is none."""
    layers = [module for module in model.modules() if isinstance(module, BaftLayer)]
    configs = (layer.configs.get(adapter_name) for layer in layers)
    return next((config for config in configs if config is not None), None)


def remove_adapter(model: nn.Module, adapter_name: str, config: BaftConfig) -> None:
    """Remove an adapter from every block of a model, and its copies of saved modules, so that another can have its name."""
    for module in own_modules(model, [config]):
        if isinstance(module, BaftLayer):
            for part in (*module.adapter_layer_names, *module.other_param_names):
                container = getattr(module, part)
                if adapter_name in container:
                    container.pop(adapter_name)
        else:
            module.delete_adapter(adapter_name, new_active_adapters=None)
            unwrap_unused(model, module)


def unwrap_unused(model: nn.Module, wrapper: AuxiliaryTrainingWrapper) -> None:
    """Replace the wrapper of a saved module by the module if no adapter saves it any more.

    No config would name the wrapper, so it could not be distinguished from those of other methods.
    """
    if not wrapper._get_available_adapters():
        replace_everywhere(model, wrapper, wrapper.original_module)


def replace_everywhere(model: nn.Module, module: nn.Module, by: nn.Module) -> None:
    """Replace a module wherever it occurs in a model; it may be shared, like tied embeddings."""
    places = [name for name, one in model.named_modules(remove_duplicate=False) if one is module]
    for parent, _, child in (name.rpartition(".") for name in places):
        setattr(model.get_submodule(parent), child, by)


def own_modules(
    model: nn.Module, configs: Iterable[PeftConfig]
) -> list[BaftLayer | AuxiliaryTrainingWrapper]:
    """Return the BaftLayers of a model, and the wrappers of the modules in the `modules_to_save` of BaFT's configs."""
    names: list[str] = []
    for config in configs:
        if isinstance(config, BaftConfig):
            names += config.modules_to_save or ()
    saved = tuple(names)  # as `str.endswith` takes them
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, BaftLayer)
        or (isinstance(module, AuxiliaryTrainingWrapper) and bool(saved) and name.endswith(saved))
    ]


def adapter_contents(module: Any) -> Iterator[Tensor]:
    """Yield parameters and buffers of all adapters in a tuner layer or wrapper, but not of the module that it adapts."""
    for name in (*module.adapter_layer_names, *module.other_param_names):
        container = getattr(module, name, None)
        if isinstance(container, nn.Module):
            yield from container.parameters()
            yield from container.buffers()


def other_adapters(model: nn.Module, own: Iterable[nn.Module]) -> list[Tensor]:
    """Return the parameters and buffers of the adapters on `model` that are not in the modules `own`."""
    excluded = set(own)
    tensors: list[Tensor] = []
    for module in model.modules():
        if (
            isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
            and module not in excluded
        ):
            tensors += adapter_contents(module)
    return tensors


@contextmanager
def others_unchanged(model: nn.Module, own: Iterable[nn.Module], *, warn: bool) -> Iterator[None]:
    """Restore the `requires_grad` flags of other methods' adapters when the context ends.

    Args:
        own: the modules of BaFT's own adapters. warn: whether to warn if one of the others is trainable.
    """
    flags = [(tensor, tensor.requires_grad) for tensor in other_adapters(model, own)]
    try:
        yield
    finally:
        for tensor, needed in flags:
            tensor.requires_grad_(needed)
    if warn and any(needed for _, needed in flags):
        logger.warning(STILL_TRAINABLE)


def require_not_replaced(
    model: nn.Module, targets: Iterable[str], config: BaftConfig, own: Iterable[nn.Module]
) -> None:
    """Raise a ValueError if the config names modules that another PEFT method has replaced."""
    excluded = set(own)
    saved = tuple(config.modules_to_save or ())
    targets = set(targets)
    for name, module in model.named_modules():
        is_named = name in targets or (bool(saved) and name.endswith(saved))
        is_adapted = isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        if is_named and is_adapted and module not in excluded:
            raise ValueError(
                f"{name} belongs to an adapter of another PEFT method ({type(module).__name__}), so a BaFT adapter can "
                "neither edit its output nor save it. Name the decoder block around it, or merge that adapter first."
            )


def merged_configs(
    registered: Mapping[str, PeftConfig], own: Mapping[str, PeftConfig]
) -> dict[str, PeftConfig]:
    """Return the configs to register on a base model, which PEFT and transformers read as its `peft_config`.

    The result is a new dictionary: other tuners and PeftModels share the present one, and would treat BaFT's adapters as
    theirs.

    Args:
        registered: the present ones, of all methods.
        own: those of BaFT's adapters. If another method's adapter has the same name, that one stays registered.
    """
    others = {
        name: config for name, config in registered.items() if not isinstance(config, BaftConfig)
    }
    return {**own, **others}
