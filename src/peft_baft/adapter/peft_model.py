"""Make `PeftModel` load and save BaFT adapters completely or not at all.

PEFT does not involve the tuner when an adapter is loaded under an existing name (it reads the weights and not the config), when
loading fails half-way, or before it writes a folder. This file therefore wraps three public methods of `PeftModel`; for models
without a BaFT adapter, the wrappers change nothing.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import wraps
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor

from peft_baft.adapter.config import BaftConfig
from peft_baft.adapter.model import BaftModel
from peft_baft.adapter.reloading import adopt_settings, require_fitting
from peft_baft.adapter.rollback import UNDO, undone_on_failure
from peft_baft.adapter.weights import check_adapter

MARK = "_peft_baft_wrapped_adapter"
PICKLE = (
    "A BaFT adapter is read from safetensors only, and safe_serialization=False would write a pickle that cannot be loaded. "
    "Leave it out."
)


def install() -> None:
    """Wrap the methods, once."""
    for name, wrapper in (("load_adapter", _with_settings), ("save_pretrained", _with_check)):
        original = getattr(PeftModel, name)
        if not hasattr(original, MARK):
            setattr(PeftModel, name, _marked(original, wrapper(original)))
    original = vars(PeftModel)["from_pretrained"].__func__
    if not hasattr(original, MARK):
        wrapped = _marked(original, _with_rollback(original))
        setattr(PeftModel, "from_pretrained", classmethod(wrapped))  # noqa: B010


def _marked(original: Callable[..., Any], wrapper: Callable[..., Any]) -> Callable[..., Any]:
    wrapped = wraps(original)(wrapper)
    setattr(wrapped, MARK, True)
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
