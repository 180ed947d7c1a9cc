"""Make `PeftModel` load and save BaFT adapters completely or not at all.

PEFT does not involve the tuner when an adapter is loaded under an existing name (it reads the weights and not the config), when
loading fails half-way, or before it writes a folder. This file therefore wraps three public methods of `PeftModel`; for models
without a BaFT adapter, the wrappers change nothing.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from copy import deepcopy
from functools import wraps
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from peft_baft.adapter.balance import attach_balance
from peft_baft.adapter.config import BaftConfig
from peft_baft.adapter.embeddings import plain_name, require_embeddings
from peft_baft.adapter.layer import BaftLayer
from peft_baft.adapter.model import BaftModel
from peft_baft.adapter.rollback import UNDO, undone_on_failure
from peft_baft.adapter.weights import BASE, MARK, check_adapter

WRAPPED = "_peft_baft_wrapped_adapter"
PICKLE = (
    "A BaFT adapter is read from safetensors only, and safe_serialization=False would write a pickle that cannot be loaded. "
    "Leave it out."
)
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


def install() -> None:
    """Wrap the methods, once."""
    for name, wrapper in (("load_adapter", _with_settings), ("save_pretrained", _with_check)):
        original = getattr(PeftModel, name)
        if not hasattr(original, WRAPPED):
            setattr(PeftModel, name, _marked(original, wrapper(original)))
    original = vars(PeftModel)["from_pretrained"].__func__
    if not hasattr(original, WRAPPED):
        wrapped = _marked(original, _with_rollback(original))
        setattr(PeftModel, "from_pretrained", classmethod(wrapped))  # noqa: B010


def _marked(original: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    wrapped = wraps(original)(wrapper)
    setattr(wrapped, WRAPPED, True)
    return wrapped


def _with_rollback(original: Callable[..., Any]) -> Callable[..., Any]:
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        outer, UNDO.attached = UNDO.attached, []
        try:
            return original(cls, *args, **kwargs)
        except BaseException:
            for put_back in reversed(UNDO.attached):
                put_back()
            raise
        finally:
            UNDO.attached = outer

    return from_pretrained


def _with_settings(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_adapter(
        self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any
    ) -> Any:
        tuner: Any = self.base_model
        is_first_load = UNDO.attached is not None
        if not isinstance(tuner, BaftModel) or is_first_load:
            return original(self, model_id, adapter_name, *args, **kwargs)
        if adapter_name not in self.peft_config:
            try:
                with undone_on_failure(tuner.model):
                    return original(self, model_id, adapter_name, *args, **kwargs)
            except BaseException:
                self.peft_config.pop(adapter_name, None)
                raise
        config = BaftConfig.from_pretrained(model_id, **self._split_kwargs(kwargs)[0])
        require_fitting(self, adapter_name, config, str(model_id))
        result = original(self, model_id, adapter_name, *args, **kwargs)
        adopt_settings(tuner.model, adapter_name, config)
        return result

    return load_adapter


def _with_check(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def save_pretrained(self: PeftModel, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        if isinstance(self.base_model, BaftModel) and call.arguments["is_main_process"]:
            _check_writable(self, **call.arguments, **call.arguments["kwargs"])
        return original(self, *args, **kwargs)

    return save_pretrained


def _check_writable(
    model: PeftModel,
    save_directory: Any,
    safe_serialization: bool,
    selected_adapters: list[str] | None,
    state_dict: dict[str, Tensor] | None = None,
    **_: Any,
) -> None:
    """Raise a ValueError if one of the adapters could not be loaded again after saving."""
    if not safe_serialization:
        raise ValueError(PICKLE)
    for name, config in model.peft_config.items():
        if selected_adapters is not None and name not in selected_adapters:
            continue
        try:
            tensors = get_peft_model_state_dict(
                model, state_dict=state_dict, adapter_name=name, save_embedding_layers=False
            )
            check_adapter(tensors, _as_read(config), "the model")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"The adapter {name!r} could not be loaded again, so it was not saved, and {save_directory} is unchanged: {error}"
            ) from error


def _as_read(config: PeftConfig) -> Any:
    """Return a config as it is after writing and reading it."""
    fields = {
        name: list(value) if isinstance(value, set) else value
        for name, value in config.to_dict().items()
    }
    return type(config)(**json.loads(json.dumps(fields)))


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
