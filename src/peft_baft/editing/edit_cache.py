"""What is found out about one base model once and used by all later edits of it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from peft_baft.adapter import EditContext, baft_layers, find_context


@dataclass
class EditCache:
    """What edits of one base model share.

    It is kept with the base model, also while that has no adapter, and freed with it or by `release`. Whoever makes several
    adapters on one base model in turn, as a benchmark does, can make one and hand it to each editor.

    Attributes:
        verified_length: up to how many tokens going on from a cache gave what a full forward gives; 0 if it was never tried.
        failed_length: from how many tokens on it did not; None if it always did.
        takes_left_padding: whether a row of a left-padded batch has the hidden vectors of the row alone; None if never tried.
        packed: packed copies of frozen weights, by layer. Each use compares them with the weights.
        computed: what else methods computed with the unedited model, such as texts that it wrote, by all that it depends on.
            Of a model's own it is dropped with the model's last BaFT adapter.
    """

    verified_length: int = 0
    failed_length: int | None = None
    takes_left_padding: bool | None = None
    packed: dict[nn.Module, Any] = field(default_factory=dict)
    computed: dict[Hashable, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any) -> EditCache:
        """Get the one that is kept with the base model of a PeftModel with a BaFT adapter."""
        base, context = model.get_base_model(), find_context(model)
        assert context is not None, "a model with a BaFT adapter has a context"
        with _lock:
            known = _of_models.get(base)
            structure = _structure(base)
            if known is None or known.structure != structure:
                known = _of_models[base] = _Known(cls(), structure, weakref.ref(context))
            if known.context() is not context:
                known.prepared.computed.clear()
                _of_models[base] = replace(known, context=weakref.ref(context))
            return known.prepared


@dataclass(frozen=True)
class _Known:
    """What is kept of a base model, what the model was made of then, and the context for which things were computed."""

    prepared: EditCache
    structure: tuple[Any, ...]
    context: weakref.ref[EditContext]


# Kept outside the models, so that nobody copies or saves it with a model; the keys do not keep models alive.
_of_models: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


_lock = threading.Lock()


def release(base: nn.Module) -> None:
    """Free what is kept with a base model: of models up to 500 M weights in float32 on a CPU, 8 bytes a weight."""
    with _lock:
        _of_models.pop(base, None)


def _structure(base: nn.Module) -> tuple[Any, ...]:
    """Tell what a base model computes with, apart from its weights' values and BaFT adapters: classes, dtypes, attention."""
    of_adapters = {id(module) for layer in baft_layers(base) for module in layer.modules()}
    modules = [module for module in base.modules() if id(module) not in of_adapters]
    classes = tuple(type(module) for module in modules)
    weights = tuple(
        (parameter.dtype, parameter.device)
        for module in modules
        for parameter in module.parameters(recurse=False)
    )
    return classes, weights, getattr(base.config, "_attn_implementation", None)
