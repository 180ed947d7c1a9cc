"""Remember, restore, freeze and switch off the adapters of a PeftModel, whatever its PEFT method.

All of these leave adapters of other methods on the same base model, such as an unmerged LoRA, as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

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
    """Return whether a model is a PeftModel of BaFT adapters, and not one of another method around such a model."""
    return isinstance(model, PeftModel) and isinstance(model.base_model, BaftModel)


def method_modules(model: nn.Module) -> list[nn.Module]:
    """List the modules that hold the adapters of a PeftModel's own method, and of no other method."""
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
    """List everything that an edit may change, each tensor once.

    These are the parameters and buffers of the model's own adapters, and whatever else is trainable.
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
    """Give an adapter's tensors under the names that `save_pretrained` writes."""
    return get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)


def load_adapter_state_dict(
    model: PeftModel, adapter_name: str, tensors: Mapping[str, Tensor]
) -> None:
    """Bring an adapter to a state that `adapter_state_dict` gave.

    Raises:
        ValueError: the tensors are not this adapter's, by their names. PEFT would load those that it knows, without a word.
    """
    wrong = adapter_state_dict(model, adapter_name).keys() ^ tensors.keys()
    if wrong:
        raise ValueError(
            f"This is not a state of the adapter {adapter_name!r}, but of another one, or of another version: "
            f"{', '.join(sorted(wrong)[:3])} stands in one of them alone."
        )
    set_peft_model_state_dict(model, dict(tensors), adapter_name=adapter_name)


def snapshot(model: nn.Module) -> Callable[[], None]:
    """Remember the adapters as they are; calling the result puts them back, bit for bit.

    Statistics are included, the form in which facts were taught, which stands in the adapters' configs, and where their editors
    are in texts that they take in turn: the same edit then gives the same adapter again.

    Raises:
        TypeError: it is not a model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"Wanted a model with adapters, as get_peft_model makes it, not {type(model).__name__}."
        )
    # Tensors of other kinds are never written into, but replaced.
    parts = [part for layer in baft_layers(model) for part in layer.parts()]
    restore_parts = [part.snapshot() for part in parts]
    of_parts = {id(tensor) for part in parts for tensor in part.tensors().values()}
    remembered = [
        (tensor, tensor.detach().clone())
        for tensor in adapter_tensors(model)
        if id(tensor) not in of_parts
    ]
    restore_forms = remembered_forms(getattr(model, "peft_config", {}).values())
    context = find_context(model)
    restore_cursors = None if context is None else context.cursors.snapshot()

    def restore() -> None:
        with torch.no_grad():
            for tensor, value in remembered:
                tensor.copy_(value)
        for restore_part in restore_parts:
            restore_part()
        restore_forms()
        if restore_cursors is not None:
            restore_cursors()

    return restore


@contextmanager
def rolled_back(model: nn.Module) -> Iterator[None]:
    """Put the adapters back, bit for bit, and their editors to where they were, after the code inside: this is single editing."""
    restore = snapshot(model)
    try:
        yield
    finally:
        restore()


@contextmanager
def trainable(model: PeftModel) -> Iterator[list[nn.Parameter]]:
    """Make the active adapter's parameters need gradients inside, and give them; no other parameter needs any.

    A reloaded adapter is frozen; this lets it go on learning without a flag to remember. Flags and gradients are put back
    afterwards as they were.
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
    """Put a model into evaluation mode inside, without dropout; every module's mode is put back as it was.

    Edits are trained so as well: a fact is learned for the model that will be used.
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
    """Switch the model's adapters off inside. PEFT leaves them trainable afterwards; here they stay as they were."""
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let gradients be computed inside, with the model in evaluation mode and none of its parameters trainable.

    Modes and flags are put back as they were.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        with torch.inference_mode(False), torch.enable_grad(), evaluating(model):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
