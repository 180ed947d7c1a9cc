"""What the edited blocks of one model share during a forward: where each token stands relative to its prompt."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peft_baft.span import GenerationSpan, edited, steps_of_input

logger = logging.getLogger(__name__)
WITHOUT_PROMPT_LENGTHS = (
    "A BaFT adapter was trained on a forward without labels and without prompt lengths, as by DPO, GRPO or label "
    "smoothing. The whole input then counts as prompt, and only its last prompt_positions tokens are edited. State "
    "where prompts end, with model(..., prompt_lengths=...) or `with peft_baft.prompt_lengths(model, lengths):`."
)
CONTINUOUS_BATCHING = (
    "Continuous batching with a BaFT adapter needs transformers 5.23 or later, a manager that was made after the "
    "adapter was added, and no stated `prompt_lengths`. Use generate() instead."
)
GENERATION = ("generate", "init_continuous_batching")  # methods of the base model that the context stands in for


@dataclass(frozen=True)
class RecordedGates:
    """The gates of one block in one forward. w: (rows, tokens, k) with gradient; mask: (rows, tokens) edited."""

    w: Tensor
    mask: Tensor


class EditContext:
    """Watches every forward and `generate` of one base model and tells its edited blocks which tokens to edit.

    It hangs on the base model and not on the tuner, because transformers' own adapter loading throws the tuner away and
    calls the base model directly. It stays as it was after a forward, since gradient checkpointing comes back for it.

    Args:
        model: the base model: callers' keyword arguments (labels, prompt_lengths) and `generate` arrive here.
        stack: the module that owns the list of blocks: mask, cache and positions arrive here, also from callers that
            pass by the model's head.
    """

    def __init__(self, model: nn.Module, stack: nn.Module) -> None:
        self.steps: Tensor | None = None  # (batch, tokens); None edits every token: not a model of token sequences
        self.row_adapters: list[str] | None = None  # `adapter_names` of a mixed batch
        self.recorded: dict[Any, RecordedGates] | None = None
        self.stated_lengths: Tensor | None = None  # set by `prompt_lengths()`
        self._span: GenerationSpan | None = None
        self._labels: Tensor | None = None
        self._passed_lengths: Tensor | None = None
        self._manager: Any = None  # of transformers' continuous batching: knows which request each token belongs to
        self._warned = False
        self._model: Any = model
        self._model_arguments = tuple(inspect.signature(model.forward).parameters)
        self._stack_arguments = tuple(inspect.signature(stack.forward).parameters)
        self._handles = [
            model.register_forward_pre_hook(self._remember, with_kwargs=True),
            stack.register_forward_pre_hook(self._locate, with_kwargs=True),
        ]
        for method in GENERATION:
            if hasattr(model, method):  # found before the class's method, by PEFT and by transformers alike
                setattr(model, method, getattr(self, method))

    def detach(self) -> None:
        """Leave the base model as it was before the first adapter came."""
        for handle in self._handles:
            handle.remove()
        for method in GENERATION:
            self._model.__dict__.pop(method, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_manager": None}  # threads and queues: neither pickled nor copied

    def mask(self, hidden: Tensor, prompt_positions: int) -> Tensor | None:
        """Which vectors of `hidden` (batch, tokens, d) an adapter edits: (batch, tokens) bool, or None for all."""
        if self.steps is None:
            return None
        if hidden.shape[:-1] != self.steps.shape:
            raise ValueError(
                f"A block gave hidden vectors of shape {tuple(hidden.shape)}, but the model was called with "
                f"(rows, tokens) = {tuple(self.steps.shape)}. Call the model, not a block of it, and keep one row per "
                "sequence."
            )
        return edited(self.steps, prompt_positions).to(hidden.device)

    @contextmanager
    def recording(self) -> Iterator[dict[Any, RecordedGates]]:
        """Collect each block's gates in the forwards inside; the last forward counts.

        They stand under the block's name, or, in a mixed batch, under (block's name, adapter's name) for the adapter's rows.
        """
        outer, self.recorded = self.recorded, {}
        try:
            yield self.recorded
        finally:
            self.recorded = outer

    @contextmanager
    def rows(self, names: list[str] | None) -> Iterator[None]:
        """Let row i of the batches inside be edited by adapter `names[i]` alone."""
        outer, self.row_adapters = self.row_adapters, names
        try:
            yield
        finally:
            self.row_adapters = outer

    @contextmanager
    def stating(self, lengths: Tensor) -> Iterator[None]:
        """Take `lengths` (sequences,) as the prompt lengths of the forwards and `generate` calls inside."""
        outer, self.stated_lengths = self.stated_lengths, lengths
        try:
            yield
        finally:
            self.stated_lengths = outer

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`generate` of the base model, with the prompt's place kept in mind until it returns."""
        lengths = kwargs.pop("prompt_lengths", None)
        outer, self._span = self._span, self._span_of(args, kwargs, lengths)
        try:
            return type(self._model).generate(self._model, *args, **kwargs)
        finally:
            self._span = outer

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """That of the base model (`generate_batch`, `transformers serve`), with the requests' prompts kept in mind.

        What a prompt's tokens become depends on where the prompt ends, so requests cannot share the blocks of a common
        prefix; and CUDA graphs or compiled graphs would replay the positions of the batch that they were made from.

        Raises:
            NotImplementedError: this version of transformers does not tell which token belongs to which request.
        """
        manager = type(self._model).init_continuous_batching(self._model, *args, **kwargs)
        settings = getattr(manager, "continuous_batching_config", None)
        fresh = getattr(manager, "batch_processor", "unknown") is None or manager is self._manager
        if settings is None or not fresh or self.stated_lengths is not None:
            raise NotImplementedError(CONTINUOUS_BATCHING)
        settings.use_cuda_graph = settings.use_async_batching = settings.allow_block_sharing = False
        settings.varlen_compile_config = settings.decode_compile_config = None
        self._manager = manager
        return manager

    def _span_of(self, args: tuple, kwargs: Mapping[str, Any], lengths: Any) -> GenerationSpan | None:
        prompt = next((kwargs[k] for k in ("inputs_embeds", "input_ids", "inputs") if kwargs.get(k) is not None), None)
        prompt = args[0] if prompt is None and args else prompt
        if not isinstance(prompt, Tensor):
            return None
        mask = kwargs.get("attention_mask")
        readable = isinstance(mask, Tensor) and mask.ndim == 2
        real: Any = mask if readable else torch.ones(prompt.shape[:2], device=prompt.device)
        cached = _cached_tokens(kwargs.get("past_key_values"))
        return GenerationSpan.of_prompt(real.bool(), int(cached), self._lengths(lengths))

    def _lengths(self, passed: Any) -> Tensor | None:
        lengths = self.stated_lengths if passed is None else passed
        return None if lengths is None else torch.as_tensor(lengths).reshape(-1)

    def _remember(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Before the base model's forward: keep what its inner modules will not be told."""
        self._labels = _bound(self._model_arguments, args, kwargs).get("labels")
        self._passed_lengths = kwargs.get("prompt_lengths")
        return args, {k: v for k, v in kwargs.items() if k != "prompt_lengths"}

    def _locate(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the stack of blocks runs: find the step of every token."""
        labels, self._labels = self._labels, None
        lengths, self._passed_lengths = self._lengths(self._passed_lengths), None
        inputs = _bound(self._stack_arguments, args, kwargs)
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor) or tokens.ndim < 2:
            self.steps = None
            return
        if "cu_seq_lens_q" in kwargs and "cache" in kwargs:
            self.steps = _steps_of_requests(self._manager, inputs["position_ids"])
            return
        rows, width = tokens.shape[:2]
        past = _cached_tokens(inputs.get("past_key_values"))
        if self._span is not None:
            self.steps = self._span.steps(past, rows, width)
            return
        if labels is None and lengths is None and module.training and torch.is_grad_enabled():
            self._warn()
        real, past = _real_tokens(inputs.get("attention_mask"), rows, width, past, tokens.device)
        positions = inputs.get("position_ids")
        fits = positions is not None and positions.shape == (rows, width) and isinstance(past, int) and past == 0
        self.steps = steps_of_input(
            real,
            past,
            positions=positions if fits else None,
            labels=labels if labels is not None and labels.shape == (rows, width) else None,
            prompt_lengths=lengths,
        )

    def _warn(self) -> None:
        if not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            logger.warning(WITHOUT_PROMPT_LENGTHS)


def _steps_of_requests(manager: Any, positions: Tensor) -> Tensor:
    """Steps of one continuous batch, (1, tokens): pieces of several requests in a row, prompts or single new tokens."""
    processor = getattr(manager, "batch_processor", None)
    requests: Sequence[Any] = getattr(getattr(processor, "inputs_and_outputs", None), "requests_in_batch", ())
    pieces = torch.tensor([request.query_length for request in requests], device=positions.device)
    if pieces.sum() != positions.shape[1]:
        raise NotImplementedError(CONTINUOUS_BATCHING)
    states = [request.state for request in requests]  # one put out of the cache takes its answer for more of its prompt
    prompts = torch.tensor([s._true_initial_tokens or len(s.initial_tokens) for s in states], device=positions.device)
    return positions - prompts.repeat_interleave(pieces)


def _bound(names: Iterable[str], args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name; cheaper than `inspect` at every call, and traceable."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _cached_tokens(cache: Any) -> int | Tensor:
    """Columns that a key-value cache holds: an integer, or a 0-d tensor for a static cache."""
    return cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0


def _real_tokens(
    mask: Any, rows: int, width: int, past: int | Tensor, device: torch.device
) -> tuple[Tensor, int | Tensor]:
    """The real ones of the new tokens, (rows, width) bool, and how many real tokens precede them.

    `mask` is the caller's attention mask: over the new tokens, or over the cached ones as well. Masks of other forms
    (4-D, per layer type) say nothing about padding that can be read here; all tokens then count as real.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] < width:
        return torch.ones(rows, width, dtype=torch.bool, device=device), past
    if mask.shape[1] == width:
        return mask.bool(), past
    columns = past + torch.arange(width, device=device)
    mask = mask.bool()
    before = mask & (torch.arange(mask.shape[1], device=device) < past)
    return mask[:, columns], before.sum(1, keepdim=True)
