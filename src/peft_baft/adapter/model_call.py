"""How transformers calls a decoder. Only this file and `running.py` name arguments and attributes of transformers.

These names change: transformers 5.24 renamed the argument `past_key_values` to `cache`, and a hook that looks for the old name
finds nothing. A call is therefore read by meaning (the cache is the argument that *is* a cache), and whatever cannot be read
raises `UnknownPositionError`. A wrong guess here would silently train and apply edits at wrong tokens.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache

from peft_baft.adapter.packing import Packing
from peft_baft.span import IGNORED_LABEL, tokens_before_slice

logger = logging.getLogger(__name__)
TESTED_TRANSFORMERS = (
    "5.24.0"  # the newest version that the tests pass with (requirements/tested.txt)
)
# As in `past_buckets_states` and `cache_params`.
CACHE_ARGUMENT = re.compile(r"(^|_)(past|cache|mems|state)(_|$)")
# How collators for packed rows pass the boundaries of sequences, and the number of each token's sequence.
BOUNDARIES = ("cu_seq_lens_q", "cu_seqlens_q", "cu_seqlens")
SEQUENCE_NUMBERS = "seq_idx"
PAGED = "PagedAttentionCache"  # the cache of continuous batching, which is not a `Cache`
CONTINUOUS_BATCHING = (
    "Continuous batching with a BaFT adapter needs transformers 5.23 or later, a manager that was created after the "
    "adapter was added, and no stated `prompt_lengths`. Use generate() instead."
)
GUIDANCE = (
    "generate(guidance_scale=...) runs a second, unconditional prompt, and a BaFT adapter cannot know where that one ends. "
    "Leave it out, or generate inside `with model.disable_adapter():`."
)
UNTESTED = (
    "peft_baft is tested with transformers up to %s, and this is %s. `baft check --model ...`, or "
    "peft_baft.check(model, tokenizer), shows in about a minute whether edits still reach the right tokens."
)


def newer_than_tested(version: str) -> bool:
    """Return whether a version of transformers is newer, in its first two numbers, than the newest tested one."""

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", text)[:2])

    return numbers(version) > numbers(TESTED_TRANSFORMERS)


@functools.cache
def warn_if_untested(version: str = transformers.__version__) -> None:
    """Warn, once per process, if transformers is newer than the newest tested version."""
    if newer_than_tested(version):
        logger.warning(UNTESTED, TESTED_TRANSFORMERS, version)


class UnknownPositionError(RuntimeError):
    """Raised if the positions of tokens relative to their prompts are unknown, instead of guessing what to edit."""

    def __init__(self, model: nn.Module, what: str, instead: str) -> None:
        super().__init__(
            f"{type(model).__name__} (transformers {transformers.__version__}) was called in a way that does not determine which "
            f"tokens a BaFT adapter edits: {what}. {instead} `baft check --model ...` shows what works with this model."
        )


@dataclass(frozen=True)
class StackSignature:
    """The parameters of the stack of decoder blocks.

    Attributes:
        names: all of them, in order. caches: those that may hold earlier tokens, judging by their names.
        has_embedding: whether integers can be token ids; to a model without an embedding they are plain numbers.
    """

    names: tuple[str, ...]
    caches: frozenset[str]
    has_embedding: bool = True

    @classmethod
    def of(cls, module: nn.Module) -> StackSignature:
        """Read the signature of the module's forward."""
        names = tuple(inspect.signature(module.forward).parameters)
        has_embedding = any(isinstance(part, nn.Embedding) for part in module.modules())
        return cls(names, cache_arguments(names), has_embedding)


def cache_arguments(names: Iterable[str]) -> frozenset[str]:
    """Return the parameters of a forward that may hold earlier tokens, judging by their names."""
    return frozenset(name for name in names if CACHE_ARGUMENT.search(name))


@dataclass(frozen=True)
class StackCall:
    """One call of the stack of decoder blocks.

    Attributes:
        tokens: (rows, width) ids, or (rows, width, d) embeddings.
        attention_mask: (rows, columns) over the new tokens, or also over the cached ones; None if there is none, or one in
            another form (4-D, or one per layer type), from which padding cannot be read.
        position_ids: (rows, width), or None. packing: what else states how sequences are packed into rows.
        cache: what holds the earlier tokens: a `Cache` or a recurrent state; None if there is none.
        caches: the number of different ones that were passed.
    """

    tokens: Tensor
    attention_mask: Tensor | None
    position_ids: Tensor | None
    cache: Any
    caches: int
    packing: Packing = field(default_factory=Packing)

    @property
    def is_continuous_batch(self) -> bool:
        """Whether this is continuous batching: pieces of several requests in one row."""
        return _is_paged(self.cache)


@dataclass(frozen=True)
class GenerateCall:
    """One call of `generate`.

    Attributes:
        prompt: (rows, width) ids or (rows, width, d) embeddings. attention_mask: (rows, columns).
        guided: whether it uses a second, unconditional prompt (classifier-free guidance).
    """

    prompt: Tensor | None
    attention_mask: Tensor | None
    cache: Any
    uses_cache: bool
    guided: bool


def read_stack_call(
    signature: StackSignature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> StackCall | None:
    """Read a call of the stack of decoder blocks; None if it has no sequence of tokens.

    The tokens are `input_ids` or `inputs_embeds`, otherwise the first argument if it holds integers. The cache is the argument
    that is a cache, whatever its name, or one whose name suggests it.
    """
    given = bind(signature.names, args, kwargs)
    tokens = given.get("input_ids")
    if tokens is None:
        tokens = given.get("inputs_embeds")
    if tokens is None and signature.names and signature.has_embedding:
        first = given.get(signature.names[0])
        tokens = first if isinstance(first, Tensor) and not first.is_floating_point() else None
    if not isinstance(tokens, Tensor) or tokens.ndim < 2:
        return None
    caches = _caches_passed(signature.caches, given)
    return StackCall(
        tokens=tokens,
        attention_mask=_two_dimensional(given, "attention_mask", "mask"),
        position_ids=_text_positions(given),
        cache=caches[0] if caches else None,
        caches=len(caches),
        packing=packing_arguments(given),
    )


def packing_arguments(given: Mapping[str, Any]) -> Packing:
    """Read how a call states packed sequences other than by position ids, under the names of collators and kernels."""
    boundaries = [given.get(name) for name in BOUNDARIES]
    mask = given.get("attention_mask")
    masks = list(mask.values()) if isinstance(mask, Mapping) else [mask]
    return Packing(
        next((x for x in boundaries if isinstance(x, Tensor) and x.ndim == 1), None),
        numbers if isinstance(numbers := given.get(SEQUENCE_NUMBERS), Tensor) else None,
        next((x for x in masks if isinstance(x, Tensor) and x.ndim == 4), None),
    )


def _text_positions(given: Mapping[str, Any]) -> Tensor | None:
    """Return the position ids, (rows, width); those of the text for models that also number positions in images."""
    positions = given.get("position_ids")
    if isinstance(positions, Tensor) and positions.ndim == 3 and len(positions) == 4:
        return positions[0]
    return _two_dimensional(given, "position_ids", "position")


def caches_in(output: Any) -> list[Cache]:
    """Return the caches in the output of a model or its stack of blocks."""
    values = output.values() if hasattr(output, "values") else output
    return [] if values is None else [value for value in values if isinstance(value, Cache)]


def require_beginning(model: nn.Module, real: Tensor, positions: Tensor) -> None:
    """Refuse position ids of slices of sequences, as in sequence parallelism: where their prompts end is unknown.

    Args:
        real: (rows, width) bool, False for padding. positions: (rows, width) position ids.

    Raises:
        UnknownPositionError: a sequence begins above position 0.
    """
    continues = real[:, 1:] & real[:, :-1] & (positions[:, 1:] < positions[:, :-1])
    begins_late = (
        tokens_before_slice(real, positions).any() | (continues & (positions[:, 1:] > 0)).any()
    )
    if torch.compiler.is_compiling():
        torch._assert_async(~begins_late, f"{SLICE} {STATE_THE_WHOLE}")
    elif begins_late:
        raise UnknownPositionError(model, SLICE, STATE_THE_WHOLE)


def answer_labels(given: Mapping[str, Any]) -> Tensor | None:
    """Return the labels of a causal language model, (rows, tokens): each token's label is the token itself, or -100."""
    labels: Any = given.get("shift_labels")
    if _is_one_per_token(labels):  # already shifted to the tokens from which they are predicted
        ignored = labels.new_full((len(labels), 1), IGNORED_LABEL)
        return torch.cat([ignored, labels[:, :-1]], dim=1)
    labels = given.get("labels")
    return labels if _is_one_per_token(labels) else None


def _is_one_per_token(labels: Any) -> bool:
    """Return whether labels are integers, (rows, tokens)."""
    return isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point()


def labels_are_tokens(model: Any) -> bool:
    """Return whether a model's labels are next tokens, as for a causal language model, and not classes of tokens.

    For a model that is not from transformers, the task type of its adapters decides.
    """
    if hasattr(model, "can_generate"):
        return bool(model.can_generate())
    return any(
        getattr(config, "task_type", None) == "CAUSAL_LM"
        for module in model.modules()
        for config in getattr(module, "configs", {}).values()
    )


@dataclass(frozen=True)
class ModelArguments:
    """What one call of the base model states about its prompts.

    Attributes:
        labels: (rows, tokens) long, -100 before each answer; None if there are none, or if they do not show where prompts end.
        prompt_lengths: as passed. wants_last_logits: whether the caller wants the logits of the last token only.
        packing: how sequences are packed into rows, apart from position ids.
        input_ids: (rows, tokens), since the stack of blocks may receive embeddings only; None if there are none.
    """

    labels: Tensor | None = None
    prompt_lengths: Any = None
    wants_last_logits: bool = False
    packing: Packing = field(default_factory=Packing)
    input_ids: Tensor | None = None


def read_model_call(
    model: nn.Module, names: Iterable[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> ModelArguments:
    """Read a call of the causal language model, whose parameters are `names`."""
    given = bind(names, args, kwargs)
    labels, ids, keep = answer_labels(given), given.get("input_ids"), given.get("logits_to_keep")
    if labels is not None and not labels_are_tokens(model):
        labels = None
    return ModelArguments(
        labels=labels,
        prompt_lengths=given.get("prompt_lengths"),
        wants_last_logits=isinstance(keep, int) and keep == 1,
        packing=packing_arguments(given),
        input_ids=ids if isinstance(ids, Tensor) else None,
    )


@dataclass(frozen=True)
class TrainingCall:
    """What determines the loss in a call of the causal language model.

    Attributes:
        labels: as passed; without labels (None) there is no loss.
        predicted: () the number of tokens that this forward predicts; None without labels.
        predicted_in_step: the number that all forwards of the optimiser step predict, as passed by transformers' Trainer; None
            if the loss is the mean over this forward's tokens.
        loss_unused: whether the caller computes its own loss from log-probabilities, as TRL does.
    """

    labels: Tensor | None
    predicted: Tensor | None
    predicted_in_step: Any
    loss_unused: bool


def read_training_call(
    names: Iterable[str], args: tuple[Any, ...], kwargs: Mapping[str, Any], *, shifts: bool
) -> TrainingCall:
    """Read what determines the loss in a call of a model whose parameters are `names`.

    Args:
        shifts: whether the model predicts a token's label at the token before it, as causal language models do.
    """
    given = bind(names, args, kwargs)
    labels, shifted = given.get("labels"), given.get("shift_labels")
    predicted = None
    if labels is not None:
        predicted_labels = labels[..., 1:] if shifts and shifted is None else labels
        predicted = ((predicted_labels if shifted is None else shifted) != IGNORED_LABEL).sum()
    return TrainingCall(
        labels, predicted, given.get("num_items_in_batch"), bool(given.get("fused_lm_head"))
    )


def loss_of(output: Any) -> Tensor | None:
    """Return the loss, () with a gradient, in a model's output: a dictionary, an object with fields, or a tuple."""
    if isinstance(output, dict):
        loss = output.get("loss")
    elif isinstance(output, tuple):
        loss = output[0] if output else None
    else:
        loss = getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad else None


def with_loss(output: Any, loss: Tensor) -> Any:
    """Replace the loss in a model's output."""
    if isinstance(output, tuple):
        return (loss, *output[1:])
    if isinstance(output, dict):
        output["loss"] = loss
    else:
        output.loss = loss
    return output


def read_generate_call(
    model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> GenerateCall:
    """Read a call of the model's `generate`."""
    prompt = None
    for name in ("inputs_embeds", "input_ids", "inputs"):
        if prompt is None:
            prompt = kwargs.get(name)
    if prompt is None and args:
        prompt = args[0]
    settings = kwargs.get("generation_config")
    scale = kwargs.get("guidance_scale", getattr(settings, "guidance_scale", None))
    caches = _caches_passed(
        frozenset(name for name in kwargs if CACHE_ARGUMENT.search(name)), kwargs
    )
    mask = _two_dimensional(kwargs, "attention_mask", "mask")
    if mask is None and kwargs.get("attention_mask") is None and isinstance(prompt, Tensor):
        mask = _inferred_mask(model, prompt, kwargs)
    return GenerateCall(
        prompt=prompt if isinstance(prompt, Tensor) else None,
        attention_mask=mask,
        cache=caches[0] if caches else None,
        uses_cache=_generation_setting(model, kwargs, "use_cache") is not False,
        guided=scale not in (None, 1, 1.0),
    )


def _inferred_mask(model: Any, prompt: Tensor, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Infer the mask as `generate` does if it is given none: pad tokens are padding, unless they also end texts."""
    padding = _generation_setting(model, kwargs, "pad_token_id")
    ends = _generation_setting(model, kwargs, "eos_token_id")
    ends = [] if ends is None else torch.as_tensor(ends).reshape(-1).tolist()
    if prompt.ndim != 2 or prompt.is_floating_point() or padding is None or int(padding) in ends:
        return None
    return prompt != int(padding)


def _generation_setting(model: Any, kwargs: Mapping[str, Any], name: str) -> Any:
    """Look up a setting where `generate` does: in its arguments, in the config passed, then in the model's own."""
    if kwargs.get(name) is not None:
        return kwargs[name]
    configs = (kwargs.get("generation_config"), getattr(model, "generation_config", None))
    values = [getattr(config, name, None) for config in configs]
    return next((value for value in values if value is not None), None)


def bind(names: Iterable[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Map positional arguments to their names; cheaper than `inspect` at every call, and torch.compile can trace it."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _caches_passed(named: frozenset[str], given: Mapping[str, Any]) -> list[Any]:
    """Return the different arguments that hold earlier tokens."""
    found: list[Any] = []
    for name, value in given.items():
        if value is None or isinstance(value, (Tensor, bool, int, float, str)):
            continue
        is_cache = isinstance(value, Cache) or _is_paged(value) or name in named
        if is_cache and not any(value is other for other in found):
            found.append(value)
    return found


def _is_paged(value: Any) -> bool:
    return any(cls.__name__ == PAGED for cls in type(value).__mro__)


def _two_dimensional(given: Mapping[str, Any], name: str, part: str) -> Tensor | None:
    """Return the (rows, columns) tensor called `name`, or, if that is missing, the only one with `part` in its name."""
    if name in given:
        value = given[name]
        return value if isinstance(value, Tensor) and value.ndim == 2 else None
    candidates = [value for other, value in given.items() if part in other]
    others = [value for value in candidates if _is_one_per_token(value)]
    return others[0] if len(others) == 1 else None


# ---------------------------------------------------------------------------------------------- how much is cached


def cached_columns(cache: Any) -> int | Tensor | None:
    """Return the number of columns of tokens that a cache holds.

    Returns:
        An integer; a 0-d tensor for a static cache; None for a filled cache that does not count them, as recurrent states.
    """
    if cache is None:
        return 0
    if not hasattr(cache, "get_seq_length"):
        return None
    try:
        columns: int | Tensor = cache.get_seq_length()
    except (ValueError, NotImplementedError):  # a `Cache` of recurrent layers only
        columns = 0
    if isinstance(columns, int) and columns == 0:
        return _columns_of_layers(cache)
    return columns


def row_marks(cache: Any) -> Tensor | None:
    """Return a fingerprint of each row of a cache, (rows, columns, 2), which differs where the rows' tokens do.

    It consists of keys of the first layer, which depend on a token and its position only. None if there is a single row, or if
    that layer has no keys.
    """
    keys = getattr(next(iter(getattr(cache, "layers", ())), None), "keys", None)
    if not isinstance(keys, Tensor) or keys.ndim != 4 or len(keys) == 1:
        return None
    return keys[:, 0, :, :2].clone()


def _columns_of_layers(cache: Any) -> int | None:
    """Return the number of columns of a cache whose first layer is empty; 0 for a new cache.

    Some models never fill the first layer, such as MiniMax, whose first block has linear attention.
    """
    recurrent = False
    for layer in getattr(cache, "layers", ()):
        columns = layer.get_seq_length() if hasattr(layer, "get_seq_length") else 0
        if isinstance(columns, int) and columns > 0:
            return columns
        recurrent = recurrent or _is_filled(getattr(layer, "has_previous_state", False))
    return None if recurrent else 0


def _is_filled(state: Any) -> bool:
    """Return whether a recurrent layer has read tokens; newer versions have one flag per state."""
    return any(state.values()) if isinstance(state, dict) else state is True


def columns_before(model: nn.Module, call: StackCall, *, position_matters: bool) -> int | Tensor:
    """Return the number of columns before the new tokens of a forward outside `generate`.

    Args:
        position_matters: whether prompt lengths or labels are known. Without them every new token after a filled cache is
            edited, whatever the number of cached tokens.

    Raises:
        UnknownPositionError: the cache does not report its length, or the mask covers tokens that no cache holds.
    """
    _require_single_cache(model, call)
    counted, masked = cached_columns(call.cache), _masked_columns(call)
    if call.cache is None:
        if masked:
            raise UnknownPositionError(model, _hidden(call, masked), STATE_THE_CACHE)
        return 0
    if counted is None:
        if masked or not position_matters:
            return masked or 1
        raise UnknownPositionError(
            model, f"its {type(call.cache).__name__} does not report its length", USE_GENERATE
        )
    if isinstance(counted, int) and masked and masked != counted and not _is_static(call.cache):
        raise UnknownPositionError(model, _contradiction(call, counted, masked), STATE_THE_CACHE)
    return counted


def columns_before_in_generate(model: nn.Module, call: StackCall, seen: int) -> int | Tensor:
    """Return the number of columns before the new tokens of a forward inside `generate`.

    Args:
        seen: the number of columns that the earlier forwards of this `generate` have processed.

    Raises:
        UnknownPositionError: the cache, the mask and the forwards so far contradict each other.
    """
    _require_single_cache(model, call)
    counted, masked, width = cached_columns(call.cache), _masked_columns(call), call.tokens.shape[1]
    if call.cache is None:
        if masked:
            raise UnknownPositionError(model, _hidden(call, masked), STATE_THE_CACHE)
        if seen and width <= seen:
            what = f"inside generate() it got {width} new tokens after {seen} others, and no cache that holds those"
            raise UnknownPositionError(model, what, DISABLE_CACHE)
        return 0
    # Of a static cache: comparing it would wait for the device, and break a compiled graph.
    if isinstance(counted, Tensor):
        return counted
    if counted is not None and masked in (None, counted):
        return counted
    if counted is not None and _is_static(call.cache):
        return counted
    # The cache does not report its length, or contradicts the mask: the columns processed so far decide.
    if masked in (None, seen):
        return seen
    raise UnknownPositionError(model, _contradiction(call, counted, masked), DISABLE_CACHE)


def _require_single_cache(model: nn.Module, call: StackCall) -> None:
    if call.caches > 1:
        raise UnknownPositionError(
            model, f"{call.caches} caches were passed at once", "Pass one of them."
        )
    if (
        isinstance(call.cache, (tuple, list))
        and call.cache
        and isinstance(call.cache[0], (tuple, list))
    ):
        raise UnknownPositionError(
            model,
            "the cache is a tuple of tensors, a form that transformers has dropped",
            "Pass a transformers `DynamicCache`.",
        )


def _masked_columns(call: StackCall) -> int | None:
    """Return the number of columns before the new tokens according to the mask; None without a mask."""
    if call.attention_mask is None:
        return None
    return max(call.attention_mask.shape[1] - call.tokens.shape[1], 0)


def _is_static(cache: Any) -> bool:
    """Return whether a cache is preallocated, so that a mask may be as wide as its capacity."""
    return bool(getattr(cache, "is_compileable", False))


SLICE = (
    "without a cache, its position ids begin above 0, like those of a slice of a longer sequence"
)
STATE_THE_WHOLE = (
    "Pass prompt_lengths, those of the whole sequences, or call it on whole sequences."
)
DISABLE_CACHE = "Pass use_cache=False, which computes every token at each step."
STATE_THE_CACHE = "Pass the cache that holds the earlier tokens as an argument, and a mask over them and the new ones."
USE_GENERATE = "Use generate(), or pass a 2-D attention_mask that also covers the earlier tokens, or use_cache=False."


def _hidden(call: StackCall, masked: int) -> str:
    width = call.tokens.shape[1]
    return f"its mask covers {masked} tokens before the {width} new ones, but no cache that holds them was found"


def _contradiction(call: StackCall, counted: int | None, masked: int | None) -> str:
    found = "holds an unknown number of tokens" if counted is None else f"holds {counted} tokens"
    return f"its {type(call.cache).__name__} {found}, but its mask covers {masked} before the {call.tokens.shape[1]} new ones"


def takes_tokens(module: nn.Module) -> bool:
    """Return whether a module takes token ids or their embeddings."""
    return not {"input_ids", "inputs_embeds"}.isdisjoint(
        inspect.signature(module.forward).parameters
    )


# --------------------------------------------------------------------------------------------- continuous batching


def prepare_manager(manager: Any, prepared: Any) -> None:
    """Disable sharing between requests in continuous batching, before it starts.

    The hidden vectors of a prompt depend on where the prompt ends, so requests cannot share cache blocks of a common
    prefix; and CUDA graphs or compiled graphs would replay the positions of the batch that they were recorded with.

    Args:
        manager: the result of `init_continuous_batching`. prepared: a manager that was prepared before, or None.

    Raises:
        NotImplementedError: this version of transformers has no such settings, or the manager is older than the adapter.
    """
    settings = getattr(manager, "continuous_batching_config", None)
    fresh = getattr(manager, "batch_processor", "unknown") is None or manager is prepared
    if settings is None or not fresh:
        raise NotImplementedError(CONTINUOUS_BATCHING)
    settings.use_cuda_graph = settings.use_async_batching = settings.allow_block_sharing = False
    settings.varlen_compile_config = settings.decode_compile_config = None


@dataclass(frozen=True)
class Request:
    """One request in a continuous batch.

    Attributes:
        name: the request's id. length: the number of its tokens in the batch. prompt, reply: ids of all its tokens so far.
    """

    name: Any
    length: int
    prompt: tuple[int, ...]
    reply: tuple[int, ...]


def requests_of_batch(manager: Any, width: int) -> list[Request]:
    """Return the requests of a continuous batch: one row of prompts or single new tokens, one after another.

    Raises:
        NotImplementedError: the manager does not report which token belongs to which request.
    """
    processor = getattr(manager, "batch_processor", None)
    requests: Sequence[Any] = getattr(
        getattr(processor, "inputs_and_outputs", None), "requests_in_batch", ()
    )
    found: list[Request] = []
    for request in requests:
        # A request that was evicted from the cache counts its reply as part of its prompt.
        state = request.state
        initial = tuple(state.initial_tokens)
        length = state._true_initial_tokens or len(initial)
        reply = (*initial[length:], *state.generated_tokens)
        found.append(Request(state.request_id, request.query_length, initial[:length], reply))
    if sum(request.length for request in found) != width:
        raise NotImplementedError(CONTINUOUS_BATCHING)
    return found


def prompt_lengths_of_requests(requests: Sequence[Request], device: torch.device) -> Tensor:
    """Return the prompt length of each token's request in one continuous batch: (width,) long."""
    lengths = torch.tensor([r.length for r in requests], dtype=torch.long, device=device)
    prompts = torch.tensor([len(r.prompt) for r in requests], dtype=torch.long, device=device)
    return prompts.repeat_interleave(lengths)
