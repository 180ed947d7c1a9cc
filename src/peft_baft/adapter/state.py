"""Snapshot, restore, freeze and disable the adapters of a PeftModel of any PEFT method.

Adapters of other methods on the same base model, such as an unmerged LoRA, are never affected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_baft.adapter.coexistence import adapter_contents, other_adapters
from peft_baft.adapter.layer import BaftLayer
from peft_baft.adapter.model import BaftModel, baft_layers, find_context
from peft_baft.adapter.taught_form import remembered_forms


def is_baft_peft_model(model: object) -> bool:
    """Return whether a model is a PeftModel of BaFT adapters, and not of another method around such a model."""
    return isinstance(model, PeftModel) and isinstance(model.base_model, BaftModel)


def method_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that hold the adapters of a PeftModel's own method only."""
    tuner = getattr(model, "base_model", None)
    if isinstance(tuner, BaftModel):
        return list(tuner.own_modules())
    return [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        and not isinstance(module, BaftLayer)
    ]


def adapter_tensors(model: nn.Module) -> list[Tensor]:
    """Return everything that an edit may change, each tensor once.

    These are the parameters and buffers of the model's own adapters, and all other trainable parameters.
    """
    modules = method_modules(model)
    others = {id(tensor) for tensor in other_adapters(model, modules)}
    tensors: list[Tensor] = [
        p for p in model.parameters() if p.requires_grad and id(p) not in others
    ]
    for module in modules:
        tensors += adapter_contents(module)
    return list({id(tensor): tensor for tensor in tensors}.values())


def adapter_state_dict(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """Return an adapter's tensors under the names that `save_pretrained` writes."""
    return cast(
        dict[str, Tensor],
        get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False),
    )


def load_adapter_state_dict(
    model: PeftModel, adapter_name: str, tensors: Mapping[str, Tensor]
) -> None:
    """Load a state that `adapter_state_dict` returned.

    Raises:
        ValueError: the names of the tensors are not this adapter's. PEFT would silently load those that it knows.
    """
    wrong = adapter_state_dict(model, adapter_name).keys() ^ tensors.keys()
    if wrong:
        raise ValueError(
            f"This is not a state of the adapter {adapter_name!r}, but of another one, or of another version: "
            f"only one of the two has {', '.join(sorted(wrong)[:3])}."
        )
    set_peft_model_state_dict(model, dict(tensors), adapter_name=adapter_name)


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Return a function that restores the adapters, bit for bit.

    This includes statistics, the prompt format stored in the adapters' configs, and the position of their editors in texts
    that they take in turn, so that repeating an edit yields the same adapter.

    Raises:
        TypeError: it is not a model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"Wanted a model with adapters, as get_peft_model returns it, not {type(model).__name__}."
        )
    # Tensors of other kinds are replaced, never written into.
    parts = [part for layer in baft_layers(model) for part in layer.parts()]
    restore_parts = [part.snapshot() for part in parts]
    part_tensors = {id(tensor) for part in parts for tensor in part.tensors().values()}
    others = [tensor for tensor in adapter_tensors(model) if id(tensor) not in part_tensors]
    values = [tensor.detach().clone() for tensor in others]
    restore_forms = remembered_forms(getattr(model, "peft_config", {}).values())
    context = find_context(model)
    restore_cursors = None if context is None else context.cursors.snapshot()

    def restore() -> None:
        with torch.no_grad():
            for tensor, value in zip(others, values, strict=True):
                tensor.copy_(value)
        for restore_part in restore_parts:
            restore_part()
        restore_forms()
        if restore_cursors is not None:
            restore_cursors()

    return restore


@contextmanager
def rolled_back(model: nn.Module) -> Iterator[None]:
    """Restore the adapters and their editors, bit for bit, when the context ends: for single editing."""
    restore = snapshot(model)
    try:
        yield
    finally:
        restore()


@contextmanager
def trainable(model: PeftModel) -> Iterator[list[nn.Parameter]]:
    """Make the active adapter's parameters, and no others, trainable in the context, and yield them.

    A reloaded adapter is frozen; with this it can be trained without further flags. All flags and gradients are restored
    afterwards.
    """
    before = [
        (parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()
    ]
    for parameter, _, _ in before:
        parameter.grad = None
    try:
        model.base_model.set_requires_grad(model.active_adapters, True)
        for tensor in other_adapters(model, method_modules(model)):
            tensor.requires_grad_(False)
        yield [parameter for parameter in model.parameters() if parameter.requires_grad]
    finally:
        for parameter, needed, gradient in before:
            parameter.requires_grad_(needed)
            parameter.grad = gradient


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode in the context, without dropout; the mode of every module is restored afterwards.

    Edits are trained in this mode, too: a fact is learned for the model as it will be used.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def without_adapters(model: PeftModel) -> Iterator[None]:
    """Disable the model's adapters in the context. Unlike PEFT, restore their `requires_grad` flags afterwards."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Enable gradients in the context, with the model in evaluation mode and all its parameters frozen.

    Modes and flags are restored afterwards.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
