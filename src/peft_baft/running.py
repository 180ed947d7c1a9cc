"""How this package calls a model: forwards, decoding with `generate`, and caches that are read more than once."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

# In the order in which a signature is searched.
CACHE_NAMES = (
    "cache",
    "past_key_values",
    "cache_params",
)


def input_device(model: Any) -> torch.device:
    """Find where a model takes its tokens, also if its weights are brought there only when they are needed."""
    embedding = model.get_input_embeddings()
    device = embedding.weight.device
    return torch.device(embedding._hf_hook.execution_device) if device.type == "meta" else device


def full_logits(model: Any, **inputs: Any) -> Tensor:
    """Compute the logits (rows, tokens, vocabulary) of whole texts, with no cache."""
    return model(**inputs, use_cache=False).logits


def generate_greedily(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    pad_token_id: int,
    max_new_tokens: int,
    **settings: Any,
) -> Tensor:
    """Decode (rows, up to `max_new_tokens`) new tokens greedily, whatever the model's own generation config says.

    Args:
        input_ids, attention_mask: (rows, tokens), padded on the left. settings: further arguments of `generate`.
    """
    greedy = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, **settings}
    return _generate(model, input_ids, attention_mask, pad_token_id, max_new_tokens, greedy)


def generate_sampled(
    model: Any, input_ids: Tensor, attention_mask: Tensor, pad_token_id: int, max_new_tokens: int
) -> Tensor:
    """Draw (rows, up to `max_new_tokens`) new tokens from the model's own distribution; arguments as above."""
    sampled = {"do_sample": True, "num_beams": 1, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    sampled["repetition_penalty"] = 1.0
    return _generate(model, input_ids, attention_mask, pad_token_id, max_new_tokens, sampled)


def _generate(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    pad_token_id: int,
    max_new_tokens: int,
    settings: Mapping[str, Any],
) -> Tensor:
    """Call `generate`, and return the new tokens alone."""
    device = input_device(model)
    sequences = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token_id,
        **settings,
    )
    return sequences[:, input_ids.shape[1] :]


def holds_keys_alone(cache: Cache) -> bool:
    """Tell whether a cache holds keys and values of attention in every layer, and no state of a recurrent one.

    Layers are told by their exact types: those that hold a state as well are subclasses of these.
    """
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def generates_with_cache(model: Any) -> bool:
    """Tell whether `generate` keeps tokens from one forward to the next."""
    return bool(model.generation_config.use_cache)


def end_tokens(model: Any) -> list[int]:
    """List the tokens with which the model ends what it generates."""
    ends = model.generation_config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def takes_position_ids(model: nn.Module) -> bool:
    """Tell whether the model can be told each token's position."""
    return "position_ids" in inspect.signature(model.forward).parameters


def cache_parameter(model: nn.Module) -> str:
    """Find the name under which a causal language model takes its cache.

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
    raise NotImplementedError(
        f"{type(model).__name__}.forward has no parameter that takes a cache."
    )


def call_with_cache(
    model: Any, base: nn.Module, inputs: Mapping[str, Any], cache: Any = None
) -> tuple[Tensor, Any]:
    """Call a model so that it reads its cache, or makes one, and adds the new tokens to it.

    Args:
        model: what is called: a PeftModel, or the base model itself. base: the base model, whose signature counts.
        cache: the cache to read and to add to, or None for a new one.

    Returns:
        The logits, and the cache with the new tokens.

    Raises:
        NotImplementedError: the model takes no cache, or gives none back.
    """
    given = {} if cache is None else {cache_parameter(base): cache}
    outputs = model(**inputs, **given, use_cache=True)
    for value in outputs.values():
        if isinstance(value, Cache):
            return outputs.logits, value
    raise NotImplementedError(
        f"{type(base).__name__} gives no transformers `Cache` back, so tokens are not kept between calls."
    )


class _KeptStates(dict):
    """The states of a recurrent layer, of which each reading gives a copy.

    A forward reads a state, computes with it, and writes its new state into the same tensor; backward would then find another
    value than the forward had. Here it writes into a copy that nobody reads.
    """

    def __getitem__(self, number: Any) -> Any:
        state = super().__getitem__(number)
        return state.clone() if isinstance(state, Tensor) else state


def fork(cache: Any) -> Any:
    """Make a cache with the same content, for one forward; what that adds is not in the other, and backward can follow.

    Attention layers put new tensors in the place of old ones, so the tensors themselves are shared. Recurrent layers write
    into theirs, so a forward gets copies.
    """
    forked = copy.copy(cache)
    forked.layers = [_fork_layer(layer) for layer in cache.layers]
    return forked


def _fork_layer(layer: Any) -> Any:
    forked = copy.copy(layer)
    for name, value in vars(layer).items():
        if isinstance(value, dict):  # of a recurrent layer: one entry a state
            setattr(forked, name, _KeptStates(value))
        elif isinstance(value, list):
            setattr(forked, name, list(value))
    return forked


def select_rows(cache: Any, rows: Tensor) -> Any:
    """Make a cache of some rows of another one. rows: (n,) their numbers.

    Reordering for beams does this for every kind of layer, recurrent ones included; `batch_select_indices` does not.
    """
    selected = fork(cache)
    selected.reorder_cache(rows)
    return selected
