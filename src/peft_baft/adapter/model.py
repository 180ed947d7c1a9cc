"""The PEFT tuner: finds the blocks of a model, attaches adapters to them, and takes them off again."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, cast_adapter_dtype
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_baft.adapter.balance import attach_balance, detach_balance
from peft_baft.adapter.blocks import block_names, configured_width, missing_targets, stack_owner
from peft_baft.adapter.coexistence import bare_model, others_stay, own_modules, registered_with, require_free
from peft_baft.adapter.config import BaftConfig
from peft_baft.adapter.context import EditContext
from peft_baft.adapter.layer import CANNOT_MERGE, CHILD, BaftLayer
from peft_baft.adapter.parameters import GATE_NORMS
from peft_baft.adapter.supported import require_decoder, require_editable
from peft_baft.adapter.weights import check_tensors


class BaftModel(BaseTuner):
    """A base model whose chosen blocks' outputs are edited by BaFT adapters (arXiv 2503.00306).

    EditRecord by `peft.get_peft_model(model, BaftConfig(...))`. Nothing of the base model is wrapped, renamed or written to:
    each edited block gets a child module and a forward hook, and `unload()` takes both away.

    Adapters of other PEFT methods may stand on the same base model, such as an unmerged LoRA: what this tuner sets, trains,
    saves, disables, deletes and unloads is its own adapters alone, whatever the names of the others. Of a PeftModel that is
    given as base model, the model inside is edited.
    """

    prefix: str = "baft_"
    tuner_layer_cls = BaftLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(
        self, model: nn.Module, peft_config: PeftConfig | dict[str, PeftConfig], adapter_name: str, **kwargs: Any
    ) -> None:
        inner = bare_model(model)
        registered: dict[str, PeftConfig] = getattr(inner, "peft_config", {})
        other = registered.get(adapter_name)
        if isinstance(peft_config, PeftConfig) and other is not None and not isinstance(other, BaftConfig):
            raise ValueError(  # without a tuner that is kept, adapters are told apart by their names alone
                f"The model has an adapter {adapter_name!r} of type {other.peft_type} already; choose another adapter_name."
            )
        super().__init__(inner, peft_config, adapter_name, **kwargs)
        earlier = {name: config for name, config in registered.items() if isinstance(config, BaftConfig)}
        self.peft_config: dict[str, PeftConfig] = {**earlier, **self.peft_config}
        self._given = [model]  # in a list, so as not to become a child
        self._register(registered)

    def __getattr__(self, name: str) -> Any:
        """PEFT's passing on of what the base model has, except for the configs that another tuner left on it."""
        if name == "peft_config":
            raise AttributeError("a BaftModel that is being made has no peft_config yet")
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            base = self.__dict__.get("_modules", {}).get("model")
            if base is None or hasattr(base, name):  # an error inside of what was asked for
                raise
            raise AttributeError(
                f"Neither a BaFT adapter nor its base model {type(base).__name__} has {name!r}. A method of another PEFT "
                "type may have no counterpart here: BaFT has no merging, weighting, rank allocation or prompt."
            ) from error

    def own_modules(self) -> list[BaftLayer | AuxiliaryTrainingWrapper]:
        """The modules that hold this tuner's adapters, those of `modules_to_save` included."""
        return own_modules(self.model, self.peft_config.values())

    def _register(self, noted: Mapping[str, PeftConfig]) -> None:
        """Note on the base model which adapters it carries, where `noted` were those of all methods so far."""
        self._note(registered_with(noted, self.peft_config))

    def _note(self, configs: dict[str, PeftConfig]) -> None:
        if configs:
            self.model.peft_config = configs
        elif hasattr(self.model, "peft_config"):
            del self.model.peft_config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward; called as a module, since older PEFT would pass by the hooks on it."""
        return self.model(*args, **kwargs)

    def _prepare_adapter_config(self, peft_config: BaftConfig, model_config: dict) -> BaftConfig:
        """Spell out which modules are edited, so that the saved config does not depend on a default."""
        require_decoder(self.model)
        if peft_config.target_modules is None:
            peft_config.target_modules = block_names(
                self.model, peft_config.layers_to_transform, peft_config.layers_pattern
            )
        absent = missing_targets(self.model, peft_config)
        if absent:
            raise ValueError(
                f"{type(self.model).__name__} has no {', '.join(absent)}: the adapter was made for another model "
                f"({peft_config.base_model_name_or_path or 'of unknown name'}), or target_modules is misspelt."
            )
        widths = self._widths(peft_config)
        earlier = own_modules(self.model, (c for c in self.peft_config.values() if c is not peft_config))
        require_free(self.model, widths, peft_config, earlier)
        require_editable(self.model, list(widths))
        _check_width(peft_config, widths, self.model)
        _check_saved(peft_config.saved_shapes, widths, self.model)
        if widths and (isinstance(peft_config.target_modules, str) or peft_config.exclude_modules):
            peft_config.target_modules, peft_config.exclude_modules = list(widths), None
        return peft_config

    def _widths(self, config: BaftConfig) -> dict[str, int]:
        """Width of the output of each module that the config targets, by name."""
        names = [
            name for name, _ in self.model.named_modules() if name and self._check_target_module_exists(config, name)
        ]
        return {name: configured_width(self.model, self.model.get_submodule(name)) for name in names}

    @staticmethod
    def _check_target_module_exists(peft_config: BaftConfig, key: str) -> Any:
        return not f".{key}.".count(f".{CHILD}.") and _matches(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: BaftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Give the block `target` one more adapter, and its BaftLayer with the first one."""
        width = configured_width(self.model, target)
        _check_adapter_name(adapter_name, current_key)
        layer = target._modules.get(CHILD)
        if layer is None:
            layer = BaftLayer(target, current_key, self._context(current_key))
            target.add_module(CHILD, layer)
            layer._active_adapter = list(self.active_adapters)
        layer.attach(adapter_name, peft_config, width)
        if peft_config.balance_weight:
            attach_balance(self.model)
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, requires_grad=False)

    def _context(self, block_name: str) -> EditContext:
        return find_context(self.model) or EditContext(self.model, stack_owner(self.model, block_name))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Honour `adapter_names`: one adapter, or `__base__`, per row of a mixed batch."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = sorted({n for n in names if n != "__base__"} - set(self.peft_config))
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        beams = kwargs.get("num_beams") or getattr(kwargs.get("generation_config"), "num_beams", None) or 1
        context = find_context(self.model)
        assert context is not None, "a BaftModel has at least one edited block"
        with context.rows([name for name in names for _ in range(beams)]):
            yield

    # PEFT's versions of the following methods change the adapters of every method on the model.

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for module in self.own_modules():
            module.enable_adapters(enabled)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for module in self.own_modules():
            module.set_requires_grad(adapter_names, requires_grad)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        for module in self.own_modules():
            if isinstance(module, BaftLayer):
                module.set_adapter(adapter_name, inference_mode=inference_mode)
            else:
                chosen: Any = module.check_set_adapter(adapter_name)  # None where no chosen adapter saves this module
                present = chosen is not None and chosen in module._get_available_adapters()
                module.set_adapter(chosen if present else [], inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        own = self.own_modules()
        wrappers = [module for module in own if not isinstance(module, BaftLayer)]
        del self.peft_config[adapter_name]
        self._register(getattr(self.model, "peft_config", {}))
        for layer in baft_layers(self.model):
            layer.delete_adapter(adapter_name)
        remaining = list(next(layer.active_adapters for layer in baft_layers(self.model)))
        for wrapper in wrappers:
            wrapper.delete_adapter(adapter_name, new_active_adapters=remaining)
            if (
                not wrapper._get_available_adapters()
            ):  # no config names it any more, so it could not be told from others'
                self._replace(wrapper, wrapper.original_module)
        self.active_adapter = remaining

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for layer in baft_layers(self.model):
            cast_adapter_dtype(layer, adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's injection; adapters of other methods keep their `requires_grad` flags."""
        if kwargs.get("state_dict"):  # PEFT takes what stands before the prefix for the target: that is our child
            kwargs["state_dict"] = {
                k.replace(f".{CHILD}.{self.prefix}", f".{self.prefix}"): v for k, v in kwargs["state_dict"].items()
            }
        earlier = own_modules(model, (c for name, c in self.peft_config.items() if name != adapter_name))
        with others_stay(model, earlier, warn=not self.peft_config[adapter_name].inference_mode):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._register(getattr(model, "peft_config", {}))

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            raise NotImplementedError(CANNOT_MERGE)  # before anything is taken off
        context = find_context(self.model)
        wrappers = [module for module in self.own_modules() if not isinstance(module, BaftLayer)]
        for layer in baft_layers(self.model):
            layer.detach()
        if context is not None:
            context.detach()
        detach_balance(self.model)
        for wrapper in wrappers:
            self._replace(wrapper, wrapper.unload_and_optionally_merge_module(False, False, None))
        self._note(registered_with(getattr(self.model, "peft_config", {}), {}))
        return self._given[0]

    def _replace(self, module: nn.Module, by: nn.Module) -> None:
        """Put another module in the place of one, or in all its places where it is shared."""
        places = [name for name, one in self.model.named_modules(remove_duplicate=False) if one is module]
        for parent, _, child in (name.rpartition(".") for name in places):
            setattr(self.model.get_submodule(parent), child, by)

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def unmerge_adapter(self) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def add_weighted_adapter(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError(CANNOT_WEIGHT)

    @classmethod
    def _get_adapter_state_dict(cls, model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Our own tensors alone: PEFT would add those of an unmerged LoRA below us."""
        state = super()._get_adapter_state_dict(model, *args, **kwargs)
        return {k: v for k, v in state.items() if f"{CHILD}.{cls.prefix}" in k}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: BaftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's renaming, after a check that the file holds this adapter whole."""
        renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_tensors(_expected_shapes(model, adapter_name), renamed, "the adapter's file")
        return renamed


CANNOT_WEIGHT = (
    "BaFT adapters cannot be combined into one by weights: each edits in a subspace of its own, through gates of its own, and "
    "the mean of two bases is a basis of neither. To use several together, make them active at once: "
    "model.base_model.set_adapter([name, other]) adds their updates up."
)


def baft_layers(model: nn.Module) -> list[BaftLayer]:
    """The BaftLayers of a model, in the order of its blocks."""
    return [module for module in model.modules() if isinstance(module, BaftLayer)]


def find_context(model: nn.Module) -> EditContext | None:
    """The context shared by the edited blocks of a model; None where there are none."""
    return next((layer.context for layer in baft_layers(model)), None)


@contextmanager
def prompt_lengths(model: nn.Module, lengths: Sequence[int] | Tensor) -> Iterator[None]:
    """State where prompts end, for callers that pass no labels: scoring, label smoothing, lm-evaluation-harness.

    This holds for forwards and `generate` calls of the thread that enters it. To state the lengths of a call that runs in
    another thread, pass them to that call: `model.generate(..., prompt_lengths=lengths)`.

    Args:
        model: a PeftModel, BaftModel or base model that carries a BaFT adapter.
        lengths: (sequences,) prompt tokens of each row, padding not counted. Answer tokens are those after them. 0 edits
            every token of a row; a length beyond the row's end by P or more edits none, as for a shared prefix.

    Raises:
        ValueError: the model carries no BaFT adapter.
        TypeError: the lengths are not integers. ValueError: one is negative.
    """
    context = find_context(model)
    if context is None:
        raise ValueError("prompt_lengths() needs a model with a BaFT adapter; this one has none.")
    with context.stating(lengths):
        yield


def _matches(config: BaftConfig, key: str) -> Any:
    """PEFT's matching of names, without its `layers_to_transform`, which never matches a block itself."""
    indices, config.layers_to_transform = config.layers_to_transform, None
    pattern, config.layers_pattern = config.layers_pattern, None
    try:
        return BaseTuner._check_target_module_exists(config, key)
    finally:
        config.layers_to_transform, config.layers_pattern = indices, pattern


def _check_width(config: BaftConfig, widths: dict[str, int], model: nn.Module) -> None:
    """Raise a ValueError unless every target can be edited; note their common width in the config."""
    for name, width in widths.items():
        if config.hidden_size not in (None, width):
            raise ValueError(
                f"This adapter edits hidden vectors of width {config.hidden_size}, but {name} of {type(model).__name__} "
                f"gives width {width}. Load it on the model that it was made for "
                f"({config.base_model_name_or_path or 'its name was not recorded'})."
            )
        if config.r > width:
            raise ValueError(
                f"r={config.r} is more than the {width} dimensions of the output of {name}; choose r <= {width}."
            )
    if len(set(widths.values())) == 1:
        config.hidden_size = next(iter(widths.values()))


def _check_saved(shapes: Mapping[str, tuple[int, ...]], widths: Mapping[str, int], model: nn.Module) -> None:
    """Raise a ValueError unless a model can take tensors of these names and shapes. Before it is touched: PEFT would first
    attach the adapter."""
    tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    own = {name.replace(".original_module.", "."): tuple(tensor.shape) for name, tensor in tensors}
    for name, shape in shapes.items():
        block, _, part = name.rpartition(f".{CHILD}.baft_")
        fits = part != "basis.weight" or shape[1] == widths.get(block) if block else own.get(name) == shape
        if not fits:
            raise ValueError(
                f"The adapter's file holds {name} of shape {shape}, which does not fit {type(model).__name__}. Load it on the "
                "model that it was made for; if it was, the file is damaged."
            )


def _check_adapter_name(name: str, block_name: str) -> None:
    """PEFT tells adapters apart by searching their names in parameter names, and loses tensors where one matches."""
    taken = {*block_name.split("."), CHILD, *BaftLayer.adapter_layer_names, *BaftLayer.other_param_names}
    taken |= {"base_model", "model", "weight", "bias"}
    taken |= {vector for gate_norm in GATE_NORMS.values() for vector in gate_norm.learned_vectors}
    if name in taken:
        raise ValueError(
            f"The adapter name {name!r} also names a part of the model, which PEFT mixes up; choose another."
        )


def _expected_shapes(model: nn.Module, adapter_name: str) -> dict[str, torch.Size]:
    mine = re.compile(rf"\.{CHILD}\.baft_[a-z_]+\.{re.escape(adapter_name)}(\.[a-z]+)?$")
    return {name: tensor.shape for name, tensor in model.state_dict().items() if mine.search(name)}
