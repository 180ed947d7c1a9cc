"""Which parts of a base model are BaFT's, where adapters of other PEFT methods (say an unmerged LoRA) stand on it too.

PEFT's own tuner methods walk over every tuner layer that they find, whosever it is. BaFT's walk over what is listed here.
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
    "trainable parameters would change it, and saving the BaFT adapter does not save it. A BaftEditor leaves it alone. To "
    "train the BaFT adapter only, freeze the other one before: its set_requires_grad(adapter_name, False)."
)


def bare_model(model: nn.Module) -> nn.Module:
    """Return the model below the PeftModels and tuners around it, so that a BaFT adapter's names do not depend on them.

    Raises:
        ValueError: one of them acts in its own forward, which an adapter on the model below would pass by.
    """
    while isinstance(model, PeftModel | PeftMixedModel | BaseTuner):
        tuner: Any = model if isinstance(model, BaseTuner) else model.base_model
        # AdaLoRA's forward only adds the regulariser of its own training to the loss.
        passable = (BaseTuner.forward, AdaLoraModel.forward)
        is_baft = any(isinstance(config, BaftConfig) for config in model.peft_config.values())
        if not is_baft and not (isinstance(tuner, BaseTuner) and type(tuner).forward in passable):
            names = ", ".join(
                sorted(
                    {
                        str(getattr(config.peft_type, "value", ""))
                        for config in model.peft_config.values()
                    }
                )
            )
            raise ValueError(
                f"A BaFT adapter cannot stand beside an adapter of type {names}, which acts in its own forward and not in "
                "the model's layers. Merge it into the model, or unload it, and call get_peft_model on the result."
            )
        model = tuner.model
    return model


def require_new_name(
    model: nn.Module, adapter_name: str, registered: Mapping[str, PeftConfig]
) -> None:
    """Raise a ValueError if a model that is to be wrapped carries an adapter of this name already.

    Args:
        registered: the configs of other methods' adapters that may not have the name either.
    """
    if carried_config(model, adapter_name) is not None:
        raise ValueError(
            f"The model carries a BaFT adapter {adapter_name!r} already, and a new one of that name would replace its edits by "
            "none. Use the PeftModel that was made first (its load_adapter(folder, name) loads other weights into that "
            "adapter), choose another adapter_name, or remove the first one with unload() or delete_adapter()."
        )
    namesake = registered.get(adapter_name)
    if namesake is not None and not isinstance(namesake, BaftConfig):
        raise ValueError(
            f"The model has an adapter {adapter_name!r} of type {namesake.peft_type} already; choose another adapter_name."
        )


def carried_config(model: nn.Module, adapter_name: str) -> BaftConfig | None:
    """Return the config of the BaFT adapter of this name that a model carries; None where it carries none."""
    layers = [module for module in model.modules() if isinstance(module, BaftLayer)]
    configs = (layer.configs.get(adapter_name) for layer in layers)
    return next((config for config in configs if config is not None), None)


def remove_adapter(model: nn.Module, adapter_name: str, config: BaftConfig) -> None:
    """Take an adapter off a model, for another one of its name: from every block, and its copies of saved modules."""
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
    """Put a saved module back in the place of its wrapper if no adapter saves it any more.

    No config would name the wrapper: it could not be distinguished from those of other methods.
    """
    if not wrapper._get_available_adapters():
        replace_everywhere(model, wrapper, wrapper.original_module)


def replace_everywhere(model: nn.Module, module: nn.Module, by: nn.Module) -> None:
    """Put another module in the place of one, or in all its places where it is shared (as tied embeddings are)."""
    places = [name for name, one in model.named_modules(remove_duplicate=False) if one is module]
    for parent, _, child in (name.rpartition(".") for name in places):
        setattr(model.get_submodule(parent), child, by)


def own_modules(
    model: nn.Module, configs: Iterable[PeftConfig]
) -> list[BaftLayer | AuxiliaryTrainingWrapper]:
    """Return the BaftLayers of a model, and the wrappers of the modules that BaFT's configs name in `modules_to_save`."""
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
    """Yield parameters and buffers of all adapters in one tuner layer or wrapper, not those of the module that it adapts."""
    for name in (*module.adapter_layer_names, *module.other_param_names):
        container = getattr(module, name, None)
        if isinstance(container, nn.Module):
            yield from container.parameters()
            yield from container.buffers()


def other_adapters(model: nn.Module, own: Iterable[nn.Module]) -> list[Tensor]:
    """Return the parameters and buffers of the adapters on `model` that are not in the modules `own`."""
    left_out = set(own)
    others = [
        module
        for module in model.modules()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and module not in left_out
    ]
    return [tensor for module in others for tensor in adapter_contents(module)]


@contextmanager
def others_stay(model: nn.Module, own: Iterable[nn.Module], *, warn: bool) -> Iterator[None]:
    """Put the `requires_grad` flags of other methods' adapters back after what is inside.

    Args:
        own: the modules of BaFT's own adapters.
        warn: whether to warn if one of the others is trainable.
    """
    flags = [(tensor, tensor.requires_grad) for tensor in other_adapters(model, own)]
    try:
        yield
    finally:
        for tensor, needed in flags:
            tensor.requires_grad_(needed)
    if warn and any(needed for _, needed in flags):
        logger.warning(STILL_TRAINABLE)


def require_free(
    model: nn.Module, targets: Iterable[str], config: BaftConfig, own: Iterable[nn.Module]
) -> None:
    """Raise a ValueError if the config names modules that another PEFT method has replaced."""
    of_baft = set(own)
    saved = tuple(config.modules_to_save or ())
    targets = set(targets)
    for name, module in model.named_modules():
        named = name in targets or (bool(saved) and name.endswith(saved))
        replaced = (
            isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) and module not in of_baft
        )
        if named and replaced:
            raise ValueError(
                f"{name} belongs to an adapter of another PEFT method ({type(module).__name__}), so a BaFT adapter can "
                "neither edit its output nor save it. Name the decoder block around it, or merge that adapter first."
            )


def merged_configs(
    registered: Mapping[str, PeftConfig], of_baft: Mapping[str, PeftConfig]
) -> dict[str, PeftConfig]:
    """Return the configs to register on a base model, which PEFT and transformers read as its `peft_config`.

    A new dictionary: other tuners and PeftModels hold the one that was there, and would take BaFT's adapters for theirs.

    Args:
        registered: what is registered so far, by all methods.
        of_baft: BaFT's adapters. Where another method's adapter has the same name, that one stays registered.
    """
    others = {
        name: config for name, config in registered.items() if not isinstance(config, BaftConfig)
    }
    return {**of_baft, **others}
