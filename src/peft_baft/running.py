"""How this package calls a model: forwards, decoding with `generate`, and caches that are used more than once."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

Model: TypeAlias = "PeftModel | PreTrainedModel"

CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # in the order of the search


def input_device(model: nn.Module) -> torch.device:
    """Return the device for a model's input, even if accelerate moves its weights there only for the forward."""
    embedding: Any = cast(Any, model).get_input_embeddings()
    device = embedding.weight.device
    return torch.device(embedding._hf_hook.execution_device if device.type == "meta" else device)


def full_logits(model: Callable[..., Any], **inputs: Any) -> Tensor:
    """Compute the logits (rows, tokens, vocabulary) of whole texts, without a cache."""
    return cast(Tensor, model(**inputs, use_cache=False).logits)


def generate_greedily(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor,
    pad_token_id: int,
    max_new_tokens: int,
    **settings: Any,
) -> Tensor:
    """Decode (rows, up to `max_new_tokens`) new tokens greedily, whatever the model's generation config.

    Args:
        input_ids, attention_mask: (rows, tokens), padded on the left. settings: further arguments of `generate`.
    """
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, **settings}
    return _generate(model, input_ids, attention_mask, pad_token_id, max_new_tokens, greedy)


def generate_sampled(
    model: Model, input_ids: Tensor, attention_mask: Tensor, pad_token_id: int, max_new_tokens: int
) -> Tensor:
    """Sample (rows, up to `max_new_tokens`) new tokens from the model's unmodified distribution; arguments as above."""
    sampled = {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    sampled["repetition_penalty"] = 1.0
    return _generate(model, input_ids, attention_mask, pad_token_id, max_new_tokens, sampled)


def _generate(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor,
    pad_token_id: int,
    max_new_tokens: int,
    settings: Mapping[str, Any],
) -> Tensor:
    """Call `generate`, and return the new tokens only."""
    device = input_device(model)
    generate: Any = model.generate
    sequences: Tensor = generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token_id,
        **settings,
    )
    return sequences[:, input_ids.shape[1] :]


def has_attention_layers_only(cache: Cache) -> bool:
    """Return whether every layer of a cache holds keys and values of attention, and no recurrent state.

    The exact types count: layers that also hold a state are subclasses of these.
    """
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def generates_with_cache(model: Model) -> bool:
    """Return whether the model's `generate` uses a cache by default."""
    config: Any = model.generation_config
    return bool(config.use_cache)


def end_tokens(model: Model) -> list[int]:
    """Return the tokens that end what the model generates."""
    config: Any = model.generation_config
    ends = config.eos_token_id
    if isinstance(ends, int):
        return [ends]
    return list(ends or ())


def takes_position_ids(model: nn.Module) -> bool:
    """Return whether the model's forward accepts position ids."""
    return "position_ids" in inspect.signature(model.forward).parameters


def cache_parameter(model: nn.Module) -> str:
    """Return the name of the parameter through which a causal language model takes its cache.

    Raises:
        NotImplementedError: its signature has no such parameter.
    """
    parameters = inspect.signature(model.forward).parameters
    for name in CACHE_NAMES:
        if name in parameters:
            return name
    for name, parameter in parameters.items():
        if re.search(r"\bCache\b", str(parameter.annotation)):
            return name
    raise NotImplementedError(f"{type(model).__name__}.forward has no parameter for a cache.")


def call_with_cache(
    model: nn.Module, base: nn.Module, inputs: Mapping[str, Any], cache: Cache | None = None
) -> tuple[Tensor, Cache]:
    """Call a model with a cache, to which it adds the new tokens.

    Args:
        model: the model to call: a PeftModel, or the base model itself. base: the base model, whose signature is read.
        cache: the cache of the earlier tokens; None for a new one.

    Returns:
        The logits, and the cache with the new tokens.

    Raises:
        NotImplementedError: the model takes no cache, or returns none.
    """
    given = {} if cache is None else {cache_parameter(base): cache}
    outputs = model(**inputs, **given, use_cache=True)
    for value in outputs.values():
        if isinstance(value, Cache):
            return outputs.logits, value
    raise NotImplementedError(
        f"{type(base).__name__} returns no transformers `Cache`, so tokens are not kept between calls."
    )


class _CopiedStates(dict[Any, Any]):
    """The states of a recurrent layer; every read returns a copy.

    A forward writes its new state into the tensor that it has read and computed with, so that backward would see another
    value. Here it writes into a copy.
    """

    def __getitem__(self, number: Any) -> Any:
        state = super().__getitem__(number)
        return state.clone() if isinstance(state, Tensor) else state


def fork(cache: Any) -> Any:
    """Copy a cache for one forward: the original does not change, and a backward through the copy is possible.

    Attention layers replace their tensors, so these are shared. Recurrent layers write into theirs, so the forward reads copies.
    """
    forked = copy.copy(cache)
    forked.layers = [_fork_layer(layer) for layer in cache.layers]
    return forked


def _fork_layer(layer: Any) -> Any:
    forked = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):  # a recurrent layer's states
            setattr(forked, name, _CopiedStates(value))
        elif isinstance(value, list):
            setattr(forked, name, list(value))
    return forked


def select_rows(cache: Any, rows: Tensor) -> Any:
    """Return a copy of a cache with the rows numbered `rows`, (n,).

    Reordering for beams does this for every type of layer, including recurrent ones; `batch_select_indices` does not.
    """
    selected = fork(cache)
    selected.reorder_cache(rows)
    return selected
