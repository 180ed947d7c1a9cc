"""Results of tests and computations on a base model that all its edits share."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

from peft import PeftModel
from torch import nn

from peft_baft.adapter import EditContext, baft_layers, find_context


@dataclass
class EditCache:
    """What edits of one base model share.

    By default there is one per base model. It outlives the model's adapters, and is freed with the model or by `release`. Code
    that creates several adapters on one base model in turn, such as a benchmark, can also pass one to each editor.

    Attributes:
        verified_length: the length in tokens up to which a cache gave the plain result; 0 if this was never tested.
        failed_length: the length in tokens from which it did not; None if it always did.
        takes_left_padding: whether a row has the same hidden vectors in a left-padded batch as by itself; None if never tested.
        packed: packed copies of frozen weights, by layer. They are compared with the weights at each use.
        computed: other results computed with the unedited model, such as generated texts. The key is everything a result
            depends on. In the default cache of a model they are dropped when the model gets a new edit context.
    """

    verified_length: int = 0
    failed_length: int | None = None
    takes_left_padding: bool | None = None
    packed: dict[nn.Module, Any] = field(default_factory=dict)
    computed: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PeftModel) -> EditCache:
        """Return the default cache of the base model of a PeftModel with a BaFT adapter."""
        base, context = model.get_base_model(), find_context(model)
        assert context is not None, "a model with a BaFT adapter has a context"
        with _lock:
            entry = _entries.get(base)
            structure = _structure(base)
            if entry is None or entry.structure != structure:
                entry = _entries[base] = _Entry(cls(), structure, weakref.ref(context))
            if entry.context() is not context:
                entry.edit_cache.computed.clear()
                _entries[base] = replace(entry, context=weakref.ref(context))
            return entry.edit_cache


@dataclass(frozen=True)
class _Entry:
    """The cache of a base model, the model's structure at that time, and the edit context of what was computed."""

    edit_cache: EditCache
    structure: tuple[Any, ...]
    context: weakref.ref[EditContext]


# Stored outside the models, so that the caches are not copied or saved with a model; the keys do not keep models alive.
_entries: weakref.WeakKeyDictionary[nn.Module, _Entry] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def release(base: nn.Module) -> None:
    """Free the default cache of a base model: for float32 models of up to 500 M weights on a CPU, 8 bytes per weight."""
    with _lock:
        _entries.pop(base, None)


def _structure(base: nn.Module) -> tuple[Any, ...]:
    """Return what a base model's computation depends on, except weights and BaFT adapters: classes, dtypes, attention."""
    in_adapters = {id(module) for layer in baft_layers(base) for module in layer.modules()}
    modules = [module for module in base.modules() if id(module) not in in_adapters]
    classes = tuple(type(module) for module in modules)
    weights: list[tuple[Any, ...]] = []
    for module in modules:
        weights += [(p.dtype, p.device) for p in module.parameters(recurse=False)]
    return classes, tuple(weights), getattr(base.config, "_attn_implementation", None)
