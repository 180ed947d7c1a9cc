"""Check the arguments of transformers' own `load_adapter` for a BaFT adapter before it changes the model.

On its own it would attach the adapter first, and then only log which tensors are missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from functools import wraps
from inspect import signature
from typing import Any, cast

from peft import PeftConfig
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.integrations.peft import PeftAdapterMixin

from peft_baft.adapter.config import BaftConfig
from peft_baft.adapter.kinds import SavedTensor
from peft_baft.adapter.preparation import is_target, prepare_config
from peft_baft.adapter.weights import BASE, check_tensors, promised_tensors

MARK = "_peft_baft_checks"
OPTIONS = ("subfolder", "revision", "token", "cache_dir", "local_files_only")


def install() -> None:
    """Wrap `load_adapter` of transformers' models, once; calls for other PEFT methods are passed through."""
    original = PeftAdapterMixin.load_adapter
    if hasattr(original, MARK):
        return
    parameters = signature(original)

    @wraps(original)
    def load_adapter(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(self, *args, **kwargs)
        given.apply_defaults()
        config = _checked_config(self, {**given.arguments, **given.arguments.get("kwargs", {})})
        if config is not None:
            given.arguments["peft_config"] = config
        try:
            return original(*given.args, **given.kwargs)
        finally:
            for one in (config, *(getattr(self, "peft_config", None) or {}).values()):
                if isinstance(one, BaftConfig):
                    one.shapes_to_load = {}  # a later adapter with this config starts empty

    setattr(load_adapter, MARK, True)
    PeftAdapterMixin.load_adapter = load_adapter  # type: ignore[method-assign]


def _checked_config(model: Any, arguments: Mapping[str, Any]) -> BaftConfig | None:
    """Return the config of the BaFT adapter to be loaded; None for an adapter of another method.

    Args:
        arguments: those of `load_adapter`.

    Raises:
        ValueError: the adapter is damaged or incomplete, or would be hot-swapped.
    """
    config: PeftConfig | None = arguments["peft_config"]
    tensors = arguments["adapter_state_dict"]
    folder, options = arguments["peft_model_id"], _options_of_files(arguments)
    if config is None and folder is not None:
        config = _config_in(folder, options)
    if not isinstance(config, BaftConfig):
        return None
    name = arguments["adapter_name"] or "default"
    if _is_hotswap(model, arguments.get("hotswap"), name):
        raise ValueError(
            f"A BaFT adapter cannot be hot-swapped for the adapter {name!r}: that works between LoRA adapters only. Load it "
            "under another adapter_name, with hotswap=False."
        )
    # With a mapping of weights, the tensors' names in the model are not known in advance.
    mapping = arguments.get("weight_mapping") or getattr(
        arguments.get("load_config"), "weight_mapping", None
    )
    if tensors is not None and not mapping:
        config.shapes_to_load = require_complete(model, config, name, tensors)
    elif tensors is None and arguments["peft_config"] is None:
        loaded: BaftConfig = BaftConfig.from_pretrained(str(folder), **options)
        loaded.shapes_to_load = loaded.saved_shapes
        return loaded
    return config


def _options_of_files(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `load_adapter` that select files of a repository."""
    everything = {
        **(getattr(arguments.get("load_config"), "download_kwargs", None) or {}),
        **(arguments.get("adapter_kwargs") or {}),
        **arguments,
    }
    return {name: everything[name] for name in OPTIONS if everything.get(name)}


def _config_in(folder: Any, options: Mapping[str, Any]) -> PeftConfig | None:
    """Read an adapter's config; None if that is impossible, which transformers then reports."""
    try:
        return cast(PeftConfig, PeftConfig.from_pretrained(str(folder), **options))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_hotswap(model: Any, hotswap: bool | str | None, name: str) -> bool:
    """Return whether `load_adapter` would swap the weights of an existing adapter."""
    is_wanted = hotswap is True or (hotswap == "auto" and getattr(model, "_hotswap_enabled", False))
    return is_wanted and name in (getattr(model, "peft_config", None) or {})


def require_complete(
    model: nn.Module, config: BaftConfig, adapter_name: str, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """Raise a ValueError unless the tensors are all that an adapter of this config needs, in the right shapes.

    Args:
        tensors: by their full names in the model; or without the adapter's name, as in a saved file, and then with more or
            fewer names before that of the block. transformers accepts the same names.

    Returns:
        The shapes, by the tensors' names in the base model.
    """
    prepared = prepare_config(model, deepcopy(config), getattr(model, "peft_config", {}).values())
    blocks = {name for name, _ in model.named_modules() if name and is_target(prepared, name)}
    as_saved = {_without_adapter(name, adapter_name): tensor for name, tensor in tensors.items()}
    wanted = promised_tensors(blocks, prepared) | _saved_modules(model, prepared)
    found = {_saved_name(name, wanted): tensor for name, tensor in as_saved.items()}
    check_tensors(wanted, found, "the state dict")
    return {name.removeprefix(BASE): tuple(tensor.shape) for name, tensor in found.items()}


def _saved_modules(model: nn.Module, config: BaftConfig) -> dict[str, SavedTensor]:
    """Return the tensors of the modules that `modules_to_save` names, as PEFT matches them."""
    ends = tuple(config.modules_to_save or ())
    saved: dict[str, SavedTensor] = {}
    for name, module in model.named_modules():
        if not ends or not name.endswith(ends):
            continue
        is_wrapped = isinstance(module, AuxiliaryTrainingWrapper)
        original: Any = module.original_module if is_wrapped else module
        for part, tensor in original.state_dict().items():
            saved[f"{BASE}{name}.{part}"] = SavedTensor(tuple(tensor.shape))
    return saved


def _without_adapter(name: str, adapter_name: str) -> str:
    """Convert a tensor's full name in the model to that in a saved file; return any other name unchanged."""
    block, mark, part = name.rpartition(".baft_")
    if not mark or name.startswith(BASE):
        return name
    return block + mark + f"{part}.".replace(f".{adapter_name}.", ".").removesuffix(".")


def _saved_name(name: str, wanted: Mapping[str, Any]) -> str:
    """Return the name in `wanted` that a tensor's name refers to, or the name itself if there is none."""
    bare = f".{name}".removeprefix(f".{BASE.rstrip('.')}")
    for one in wanted:
        full = f".{one.removeprefix(BASE)}"
        if full.endswith(bare) or bare.endswith(full):
            return one
    return name
