"""The PEFT tuner: attaches adapters to the blocks of a model, switches them, and removes them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from math import isfinite
from typing import Any
from weakref import WeakValueDictionary

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, cast_adapter_dtype
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from peft_baft.adapter.balance import attach_balance, detach_balance
from peft_baft.adapter.blocks import configured_width, stack_owner
from peft_baft.adapter.coexistence import (
    bare_model,
    carried_config,
    merged_configs,
    others_unchanged,
    own_modules,
    remove_adapter,
    replace_everywhere,
    require_new_name,
    unwrap_unused,
)
from peft_baft.adapter.combination import combined_config, fill_combined
from peft_baft.adapter.config import BaftConfig
from peft_baft.adapter.context import EditContext
from peft_baft.adapter.embeddings import rename_for_model
from peft_baft.adapter.kinds import SavedTensor
from peft_baft.adapter.layer import CANNOT_MERGE, CHILD, BaftLayer
from peft_baft.adapter.mixed_batch import choose_copies_by_row, require_known_names
from peft_baft.adapter.native import require_complete
from peft_baft.adapter.preparation import is_target, prepare_config, require_adapter_name
from peft_baft.adapter.rollback import UNDO, structure_of, undone_on_failure
from peft_baft.adapter.switching import Switch
from peft_baft.adapter.weights import BASE, check_tensors

logger = logging.getLogger(__name__)
# Tasks for which PEFT adds the head to the caller's `modules_to_save` only while it attaches the adapter: the list is shared.
HEAD_ADDED_LATE = ("TOKEN_CLS", "QUESTION_ANS")
ADAPTER_CONFIGS: WeakValueDictionary[int, Any] = WeakValueDictionary()  # by id
REPLACED = (
    "The model already has a BaFT adapter %r, which is replaced by the one that is being loaded. A PeftModel created for the "
    "first one now uses the new one, too. To keep both, load the second one under another adapter_name."
)
CANNOT_WEIGHT = (
    "BaFT adapters can be combined with combination_type='cat' only: each edits its own subspace through its own gates, and the "
    "mean of two bases is not a basis of either. 'cat' keeps the rows of all, and does what the adapters do when they are "
    "active together: model.base_model.set_adapter([name, other])."
)


class BaftModel(BaseTuner):
    """A base model whose chosen blocks' outputs are edited by BaFT adapters (arXiv 2503.00306).

    Created by `peft.get_peft_model(model, BaftConfig(...))`. No part of the base model is wrapped, renamed or written to:
    each edited block gets a child module and a forward hook, which `unload()` removes.

    The base model may carry adapters of other PEFT methods, such as an unmerged LoRA: this tuner sets, trains, saves, disables,
    deletes and unloads its own adapters only, whatever the names of the others. If the base model is a PeftModel, the model
    inside it is edited.
    """

    prefix: str = "baft_"
    tuner_layer_cls = BaftLayer
    target_module_mapping: dict[str, list[str]] = {}

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        **kwargs: Any,
    ) -> None:
        inner_model = bare_model(model)
        registered: dict[str, PeftConfig] = getattr(inner_model, "peft_config", {})
        # transformers' own loading has no tuner: there, only the names distinguish adapters of different methods.
        if isinstance(peft_config, PeftConfig):
            configs, foreign = {adapter_name: peft_config}, registered
        else:
            configs, foreign = dict(peft_config), {}
        replaced = None
        # Only the loading of a saved adapter may replace one of its name.
        if UNDO.attached is not None:
            UNDO.attached.append(structure_of(inner_model))
            replaced = carried_config(inner_model, adapter_name)
        if replaced is not None:
            remove_adapter(inner_model, adapter_name, replaced)
        require_new_name(inner_model, adapter_name, foreign)
        super().__init__(inner_model, configs, adapter_name, **kwargs)
        if replaced is not None:
            self._become(adapter_name, replaced)
            logger.warning(REPLACED, adapter_name)
        earlier = {
            name: config for name, config in registered.items() if isinstance(config, BaftConfig)
        }
        self.peft_config: dict[str, PeftConfig] = {**earlier, **self.peft_config}
        self._outer_model = [model]  # what `unload` returns; in a list, so as not to become a child
        self._register_on_base(registered)

    def _become(self, adapter_name: str, config: BaftConfig) -> None:
        """Copy a new adapter's config into the one that it replaces, which earlier PeftModels on the base model use."""
        vars(config).clear()
        vars(config).update(vars(self.peft_config[adapter_name]))
        self.peft_config[adapter_name] = config
        for layer in baft_layers(self.model):
            if adapter_name in layer.configs:
                layer.configs[adapter_name] = config

    def __getattr__(self, name: str) -> Any:
        """Look up attributes in the base model, as PEFT does, except for the configs that another tuner left there."""
        if name == "peft_config":
            raise AttributeError("a BaftModel under construction has no peft_config yet")
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            base = self.__dict__.get("_modules", {}).get("model")
            if base is None or hasattr(base, name):  # it exists: the error was raised inside it
                raise
            raise AttributeError(
                f"Neither a BaFT adapter nor its base model {type(base).__name__} has {name!r}. A method of another PEFT "
                "type may have no counterpart here: BaFT has no merging, weighting, rank allocation or prompt."
            ) from error

    def own_modules(self) -> list[BaftLayer | AuxiliaryTrainingWrapper]:
        """Return the modules that hold this tuner's adapters, including those of `modules_to_save`."""
        return own_modules(self.model, self.peft_config.values())

    def _wrappers_of_saved_modules(self) -> list[AuxiliaryTrainingWrapper]:
        return [module for module in self.own_modules() if not isinstance(module, BaftLayer)]

    def _register_on_base(self, registered: Mapping[str, PeftConfig]) -> None:
        """Write the configs of all adapters to the base model's `peft_config`, where transformers looks for them.

        Args:
            registered: the configs of all methods, as registered there so far.
        """
        self._set_configs_on_base(merged_configs(registered, self.peft_config))

    def _set_configs_on_base(self, configs: dict[str, PeftConfig]) -> None:
        if configs:
            self.model.peft_config = configs
        elif hasattr(self.model, "peft_config"):
            del self.model.peft_config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model as a module, with its hooks; older PEFT calls its `forward` and bypasses them."""
        return self.model(*args, **kwargs)

    def _prepare_adapter_config(
        self, peft_config: BaftConfig, model_config: dict[str, Any]
    ) -> BaftConfig:
        earlier = [config for config in self.peft_config.values() if config is not peft_config]
        return prepare_config(self.model, peft_config, earlier)

    @staticmethod
    def _check_target_module_exists(peft_config: BaftConfig, key: str) -> bool:
        return is_target(peft_config, key)

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
        """Add an adapter to the block `target`, and a BaftLayer with the first one."""
        width = configured_width(self.model, target)
        require_adapter_name(adapter_name, current_key)
        layer = target._modules.get(CHILD)
        if layer is None:
            context = find_context(self.model)
            context = context or EditContext(self.model, stack_owner(self.model, current_key))
            layer = BaftLayer(target, current_key, context)
            target.add_module(CHILD, layer)
            layer._active_adapter = list(self.active_adapters)
        layer.attach(adapter_name, peft_config, width)
        if peft_config.balance_weight:
            attach_balance(self.model)
        if adapter_name not in self.active_adapters:
            layer.set_requires_grad(adapter_name, requires_grad=False)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Edit each row of a mixed batch by its adapter in `adapter_names`; `__base__` means none."""
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        names = require_known_names(names, self.peft_config)
        context = find_context(self.model)
        assert context is not None, "a BaftModel has at least one edited block"
        with context.rows(names):
            yield

    # PEFT's versions of the following methods change the adapters of all methods on the model.

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for module in self.own_modules():
            if isinstance(module, BaftLayer):
                module.enable_adapters(enabled)
            else:
                # The wrapper's own method would also make its copies trainable.
                AuxiliaryTrainingWrapper.enable_adapters(module, enabled)
                self._switch_of(module).turn(module, on=enabled)

    def _switch_of(self, wrapper: AuxiliaryTrainingWrapper) -> Switch:
        """Return the `Switch` of a wrapper of `modules_to_save`."""
        switches: dict[nn.Module, Switch] = self.__dict__.setdefault("_switches", {})
        return switches.setdefault(wrapper, Switch())

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        for module in self.own_modules():
            if isinstance(module, BaftLayer):
                module.set_requires_grad(adapter_names, requires_grad)
            else:
                with self._switch_of(module).changing_flags(module):
                    module.set_requires_grad(adapter_names, requires_grad)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        for module in self.own_modules():
            if isinstance(module, BaftLayer):
                module.set_adapter(adapter_name, inference_mode=inference_mode)
            else:
                # A wrapper has at most one active adapter; None if none of the chosen ones saves this module.
                chosen: Any = module.check_set_adapter(adapter_name)
                present = chosen is not None and chosen in module._get_available_adapters()
                with self._switch_of(module).changing_flags(module):
                    module.set_adapter(chosen if present else [], inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        wrappers = self._wrappers_of_saved_modules()  # before the config that names them is deleted
        del self.peft_config[adapter_name]
        self._register_on_base(getattr(self.model, "peft_config", {}))
        for layer in baft_layers(self.model):
            layer.delete_adapter(adapter_name)
        remaining = list(next(layer.active_adapters for layer in baft_layers(self.model)))
        for wrapper in wrappers:
            wrapper.delete_adapter(adapter_name, new_active_adapters=remaining)
            unwrap_unused(self.model, wrapper)
        self.active_adapter = remaining

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for layer in baft_layers(self.model):
            cast_adapter_dtype(
                layer, adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype
            )

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Attach an adapter as PEFT does, but keep the `requires_grad` flags of other methods' adapters.

        The adapter gets a copy of its config, since what is filled in belongs to this model and adapter only. On failure the
        model is restored.
        """
        given: Any = self.peft_config[adapter_name]
        # In `from_pretrained`, PEFT guarantees that the config passed by the caller becomes the adapter's.
        is_unused = ADAPTER_CONFIGS.get(id(given)) is not given
        may_keep = UNDO.attached is not None and is_unused
        self.peft_config[adapter_name] = config = given if may_keep else _copied(given)
        ADAPTER_CONFIGS[id(config)] = config
        if kwargs.get("state_dict"):
            _fit_to_tensors(config, kwargs["state_dict"])
            require_complete(model, config, adapter_name, kwargs["state_dict"])
            # PEFT takes everything before the prefix in a tensor's name for the target: remove our child's name from it.
            kwargs["state_dict"] = {
                name.replace(f".{CHILD}.{self.prefix}", f".{self.prefix}"): tensor
                for name, tensor in kwargs["state_dict"].items()
            }
        others = (config for name, config in self.peft_config.items() if name != adapter_name)
        earlier = own_modules(model, others)
        warn = not self.peft_config[adapter_name].inference_mode
        are_off = any(layer.disable_adapters for layer in baft_layers(model))
        # PEFT restores the flags that it finds, so they must be those of the switched-on state.
        if are_off:
            self._enable_adapter_layers(True)
        try:
            with undone_on_failure(model), others_unchanged(model, earlier, warn=warn):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                context = find_context(model)
                if context is not None:
                    choose_copies_by_row(self._wrappers_of_saved_modules(), context)
                self._register_on_base(getattr(model, "peft_config", {}))
        finally:
            if are_off:
                self._enable_adapter_layers(False)
        if given.target_modules is None and config.target_modules:
            # As in PEFT, callers can read the chosen modules from their config; another model chooses its own.
            given.target_modules = given.chosen_targets = list(config.target_modules)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            raise NotImplementedError(CANNOT_MERGE)  # before anything is removed
        context = find_context(self.model)
        wrappers = self._wrappers_of_saved_modules()
        for layer in baft_layers(self.model):
            layer.detach()
        if context is not None:
            context.detach()
        detach_balance(self.model)
        for wrapper in wrappers:
            replace_everywhere(
                self.model, wrapper, wrapper.unload_and_optionally_merge_module(False, False, None)
            )
        self._set_configs_on_base(merged_configs(getattr(self.model, "peft_config", {}), own={}))
        return self._outer_model[0]

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def unmerge_adapter(self) -> None:
        raise NotImplementedError(CANNOT_MERGE)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "cat",
    ) -> None:
        """Combine adapters into a new one that does, in one pass, what they do when they are active together.

        Args:
            adapters: names of adapters with the same blocks and settings. weights: the factor for each one's update.
            adapter_name: name of the new one, whose rank is the sum of theirs. It does not become active.
            combination_type: `cat`, PEFT's name for this; the other types have no counterpart here.

        Raises:
            NotImplementedError: another combination_type. ValueError: the adapters cannot be combined or do not exist, or the
                new one exists already. Nothing is changed then.
        """
        if combination_type != "cat":
            raise NotImplementedError(CANNOT_WEIGHT)
        unknown = [name for name in adapters if name not in self.peft_config]
        if not adapters or unknown or adapter_name in self.peft_config:
            raise ValueError(
                f"Wanted adapters of the model and a new name, not {list(adapters)} and {adapter_name!r}; the model has "
                f"{list(self.peft_config)}."
            )
        if len(weights) != len(adapters) or not all(map(isfinite, weights)):
            raise ValueError(
                f"Wanted a finite weight for each of {len(adapters)} adapters, not {weights!r:.80}."
            )
        configs: list[Any] = [self.peft_config[name] for name in adapters]
        self.peft_config[adapter_name] = combined_config(configs)
        try:
            with undone_on_failure(self.model):
                self.inject_adapter(self.model, adapter_name)
                for layer in baft_layers(self.model):
                    if adapter_name in layer.configs:
                        fill_combined(layer, adapters, weights, adapter_name)
        except Exception:
            self.peft_config.pop(adapter_name, None)
            raise

    @classmethod
    def _get_adapter_state_dict(
        cls, model: nn.Module, *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Return BaFT's tensors only: PEFT would add those of an unmerged LoRA on the same model."""
        state = super()._get_adapter_state_dict(model, *args, **kwargs)
        return {name: tensor for name, tensor in state.items() if f"{CHILD}.{cls.prefix}" in name}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: BaftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Rename tensors as PEFT does, and check that they are exactly this adapter's."""
        renamed = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        expected = _expected_tensors(model, config, adapter_name)
        check_tensors(expected, renamed, "the adapter's file")
        unexpected = sorted(
            n for n in renamed.keys() - expected.keys() if f".{CHILD}.{cls.prefix}" in n
        )
        if unexpected:  # PEFT would ignore it
            raise ValueError(
                f"The adapter's file holds {unexpected[0]}, but the model's adapter {adapter_name!r} has no such part. Load "
                "it with the config that was saved with it."
            )
        return rename_for_model(renamed, model.state_dict(), BASE)


def baft_layers(model: nn.Module) -> list[BaftLayer]:
    """Return the BaftLayers of a model, in the order of its blocks.

    Raises:
        TypeError: it is not a model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Wanted a model (a torch.nn.Module), not {type(model).__name__}.")
    return [module for module in model.modules() if isinstance(module, BaftLayer)]


def find_context(model: nn.Module) -> EditContext | None:
    """Return the context that the edited blocks of a model share; None if no block is edited."""
    return next((layer.context for layer in baft_layers(model)), None)


@contextmanager
def prompt_lengths(model: nn.Module, lengths: Sequence[int] | Tensor) -> Iterator[None]:
    """State where prompts end, for callers that pass no labels: scoring, label smoothing, lm-evaluation-harness.

    This applies to forwards and `generate` calls of the thread that enters the context. For a call that runs in another
    thread, pass the lengths to the call: `model.generate(..., prompt_lengths=lengths)`.

    Args:
        model: a PeftModel, BaftModel or base model that carries a BaFT adapter.
        lengths: (sequences,) the number of prompt tokens of each row, without padding; answer tokens are those after them. 0
            edits every token of a row; a length that exceeds the row by P or more edits none, as for a shared prefix.

    Raises:
        ValueError: the model carries no BaFT adapter.
        TypeError: the lengths are not integers. ValueError: one is negative.
    """
    context = find_context(model)
    if context is None:
        raise ValueError("prompt_lengths() needs a model with a BaFT adapter; this one has none.")
    with context.stating(lengths):
        yield


def _copied(config: Any) -> Any:
    """Copy a config, so that what is filled in belongs to one model and adapter only."""
    has_late_head = config.task_type in HEAD_ADDED_LATE
    if has_late_head and config.modules_to_save is None:
        config.modules_to_save = []
    copied = deepcopy(config)
    if config.target_modules is config.chosen_targets:
        copied.target_modules = None
    copied.chosen_targets = None
    if has_late_head and not config.modules_to_save:
        copied.modules_to_save = config.modules_to_save
    return copied


def _fit_to_tensors(config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Set the edited blocks of a config that leaves them to the default to those that the tensors belong to."""
    if config.target_modules is None and config.layers_to_transform is None:
        blocks = {name.partition(f".{CHILD}.baft_")[0] for name in tensors if f".{CHILD}." in name}
        config.target_modules = sorted(name.removeprefix(BASE) for name in blocks) or None


def _expected_tensors(
    model: nn.Module, config: BaftConfig, adapter_name: str
) -> dict[str, SavedTensor]:
    """Return the tensors of an attached adapter, by their names in the model."""
    pattern = re.compile(rf"(.+)\.{CHILD}\.baft_([a-z_]+)\.{re.escape(adapter_name)}(\.[a-z_]+)?")
    expected = {}
    for name, tensor in model.state_dict().items():
        if found := pattern.fullmatch(name):
            block, part = found[1].removeprefix(BASE), f"{found[2]}{found[3] or ''}"
            saved = config.kind.saved_tensors(config, block).get(part)
            # Parameters have the model's sizes; the sizes of another kind's buffers come from the file.
            if saved is None or saved.dtype is None:
                saved = SavedTensor(tuple(tensor.shape))
            expected[name] = saved
    return expected
