"""Fit a config to a model: which modules are edited, and whether they can be. The model is not changed yet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from peft_baft.adapter.base_identity import identify_base
from peft_baft.adapter.blocks import configured_width, missing_targets
from peft_baft.adapter.coexistence import own_modules, require_not_replaced
from peft_baft.adapter.config import BaftConfig
from peft_baft.adapter.embeddings import COPIES, own_shapes, plain_name, require_embeddings
from peft_baft.adapter.layer import CHILD, BaftLayer
from peft_baft.adapter.parameters import GATE_NORMS
from peft_baft.adapter.supported import require_blocks, require_decoder, require_editable


def prepare_config(
    model: nn.Module, config: BaftConfig, earlier: Iterable[PeftConfig]
) -> BaftConfig:
    """Write the full names of the edited modules into a config, so that the saved config depends on no default.

    Args:
        earlier: the configs of the adapters that `model` already carries.

    Raises:
        TypeError, ValueError: the config does not fit the model, or the model cannot be edited.
    """
    require_decoder(model)
    if config.target_modules is None:
        config.target_modules = config.kind.choose_blocks(model, config)
    absent = missing_targets(model, config)
    if absent:
        raise ValueError(
            f"{type(model).__name__} has no {', '.join(absent)}: the adapter was made for another model "
            f"({config.base_model_name_or_path or 'of unknown name'}), or target_modules is misspelt."
        )
    widths = _target_widths(model, config)
    require_blocks(model, config, list(widths))
    require_not_replaced(model, widths, config, own_modules(model, earlier))
    require_editable(model, list(widths))
    _fit_width(config, widths, model)
    _require_saved_shapes(config, widths, model)
    chosen_by_expression = isinstance(config.target_modules, str) or config.exclude_modules
    if widths and chosen_by_expression:
        config.target_modules, config.exclude_modules = list(widths), None
    identify_base(model, config)
    return config


def is_target(config: BaftConfig, name: str) -> bool:
    """Return whether a config targets this module, by PEFT's matching of names; never a part of a BaFT adapter.

    `layers_to_transform` is hidden from PEFT, where it selects modules inside blocks, and never a block.
    """
    if f".{CHILD}." in f".{name}.":
        return False
    indices, config.layers_to_transform = config.layers_to_transform, None
    pattern, config.layers_pattern = config.layers_pattern, None
    try:
        return bool(BaseTuner._check_target_module_exists(config, name))
    finally:
        config.layers_to_transform, config.layers_pattern = indices, pattern


def require_adapter_name(name: str, block_name: str) -> None:
    """Raise a ValueError if an adapter's name is also the name of a part of the model or of an adapter.

    PEFT distinguishes adapters by searching for their names in those of parameters, and loses tensors if another part
    matches. Torch's `ModuleDict`, which holds them by name, rejects names of its methods, such as `half`.
    """
    taken = {
        *block_name.split("."),
        CHILD,
        *BaftLayer.adapter_layer_names,
        *BaftLayer.other_param_names,
    }
    taken |= {"base_model", "model", "weight", "bias"}
    taken |= {vector for gate_norm in GATE_NORMS.values() for vector in gate_norm.learned_vectors}
    if name in taken or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"The adapter name {name!r} also names a part of the model, which PEFT or torch would confuse; choose another."
        )


def _target_widths(model: nn.Module, config: BaftConfig) -> dict[str, int]:
    """Return the output width of each module that the config targets, by name."""
    names = [name for name, _ in model.named_modules() if name and is_target(config, name)]
    return {name: configured_width(model, model.get_submodule(name)) for name in names}


def _fit_width(config: BaftConfig, widths: Mapping[str, int], model: nn.Module) -> None:
    """Raise a ValueError unless all targets have a suitable width; write the common width into the config."""
    for name, width in widths.items():
        if config.hidden_size not in (None, width):
            raise ValueError(
                f"This adapter edits hidden vectors of width {config.hidden_size}, but {name} of {type(model).__name__} "
                f"has width {width}. Load it on the model that it was made for "
                f"({config.base_model_name_or_path or 'its name was not recorded'})."
            )
        rank = max(config.pack_ranks or [config.r])
        if config.kind.trains and rank > width:
            raise ValueError(
                f"r={rank} exceeds the {width} dimensions of the output of {name}; choose r <= {width}."
            )
    if len(set(widths.values())) == 1:
        config.hidden_size = next(iter(widths.values()))


def _require_saved_shapes(config: BaftConfig, widths: Mapping[str, int], model: nn.Module) -> None:
    """Raise a ValueError unless the saved tensors of a config can be loaded into a model.

    This is checked before the model is changed: PEFT would attach the adapter first.
    """
    saved = tuple(config.modules_to_save or ())
    of_model = own_shapes(model)
    others = {}
    for name, shape in config.saved_shapes.items():
        block, _, part = name.rpartition(f".{CHILD}.baft_")
        if block:
            # The basis represents its block: a file with contradictory shapes has already been refused.
            fits = part != "basis.weight" or shape[1] == widths.get(block)
        elif any(f"{module}." in name for module in saved):
            fits = of_model.get(plain_name(name)) == shape
        else:
            others[name], fits = shape, True
        if not fits:
            raise ValueError(
                f"The adapter's file holds {name} of shape {shape}, which does not fit {type(model).__name__}. Load it on the "
                "model that it was made for; if it was, the file is damaged."
            )
    require_embeddings(model, others)
    if config.saved_shapes and saved:
        _require_whole_modules(config.saved_shapes, saved, model)


def _require_whole_modules(
    shapes: Mapping[str, tuple[int, ...]], saved: tuple[str, ...], model: nn.Module
) -> None:
    """Raise a ValueError if the file lacks tensors of modules that an adapter saves."""
    for module_name, module in model.named_modules():
        if module_name.endswith(saved) and f".{CHILD}." not in f".{module_name}.":
            names = [f"{module_name}.{name}" for name in module.state_dict()]
            # Except the copies of other adapters that save the module, too.
            wanted = {plain_name(name) for name in names if f".{COPIES}." not in name}
            missing = sorted(wanted - shapes.keys())
            if missing:
                raise ValueError(
                    f"The adapter's file lacks {missing[0]}, which {type(model).__name__} has and modules_to_save names. Load it "
                    "on the model that it was made for; if it was, the file is damaged."
                )
