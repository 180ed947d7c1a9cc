"""What the blocks are told about a forward: where each token stands relative to its prompt, and which adapter edits it.

The position of a token relative to the end of its prompt is -1 for the last prompt token, and 0 for the first answer token
(`peft_baft.span`). This file reads each call of the model, computes these positions, and hands them to the edited blocks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_baft.adapter import model_call
from peft_baft.adapter.model_call import StackCall, StackSignature, UnknownPositionError
from peft_baft.adapter.routing import Routes, Routing
from peft_baft.span import (
    GenerationSpan,
    integer_lengths,
    relative_positions_of_input,
)

if TYPE_CHECKING:
    from peft_baft.adapter.config import BaftConfig

logger = logging.getLogger(__name__)
WITHOUT_PROMPT_LENGTHS = (
    "A BaFT adapter was trained on a forward without labels and without prompt lengths, as with label smoothing, a loss "
    "function of your own, or DPO and GRPO of older TRL (1.12). The whole input then counts as prompt, and only its last "
    "prompt_positions tokens are edited. State where prompts end, with model(..., prompt_lengths=...) or "
    "`with peft_baft.prompt_lengths(model, lengths):`."
)
SCORED_WITHOUT_PROMPT_LENGTHS = (
    "A model with BaFT edits was called on whole texts, without labels and without prompt lengths. Each input then counts as "
    "prompt, and only its last prompt_positions tokens are edited: the last token's logits are right, those before it are the "
    "unedited model's. To score an answer with them, state where its prompt ends: model(..., prompt_lengths=[...]), labels, or "
    "`with peft_baft.prompt_lengths(model, [...])`; for lm-evaluation-harness, `--model baft-hf`. For the next token alone, "
    "pass logits_to_keep=1. This is said once; docs/positions.md says more."
)
# Methods of the base model that the context stands in for.
GENERATION = (
    "generate",
    "init_continuous_batching",
)


@dataclass(frozen=True)
class RecordedGates:
    """The gates of one block in one forward.

    Attributes:
        w: (rows, tokens, k) with gradient. mask: (rows, tokens) bool, the tokens that are edited.
    """

    w: Tensor
    mask: Tensor


@dataclass
class Generation:
    """One running `generate`.

    Attributes:
        span: where its prompt lies. seen: how many columns its forwards have passed so far.
        asked_span: the same for memories of edits, to which a prompt that goes on with a chat is a new question.
        prompt: (rows, columns) ids, or their embeddings. real: (rows, columns) bool, False for padding.
        routes: by the name of a memory, which edit each row's prompt asks for, once it has been found.
    """

    span: GenerationSpan
    seen: int
    asked_span: GenerationSpan
    prompt: Tensor
    real: Tensor
    routes: dict[str, list[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class CurrentForward:
    """What the blocks need to know of the forward that they are part of.

    Attributes:
        relative_positions: (batch, tokens); None edits every token, where the model does not take token sequences.
        row_adapters: the adapter of each row of a mixed batch (PEFT's `adapter_names`); None where all rows are edited by
            the active adapters.
        recorded: where the blocks put their gates; None where nobody asked for them.
        asked_positions: as relative_positions, for memories of edits. routes: by the name of a memory, which edit each token
            belongs to; found when its key block has run.
    """

    relative_positions: Tensor | None
    row_adapters: list[str] | None
    recorded: dict[Any, RecordedGates] | None
    asked_positions: Tensor | None = None
    routes: dict[str, Routes] = field(default_factory=dict)


class _ThreadLocalAttribute:
    """An attribute of `EditContext` with a value for each thread, None until it is set: several threads may serve one model.

    The values lie in a plain `threading.local`. torch.compile traces that, but neither a subclass of it nor a `ContextVar`.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, context: Any, owner: type) -> Any:
        return getattr(context._thread, self._name, None)

    def __set__(self, context: Any, value: Any) -> None:
        setattr(context._thread, self._name, value)


class EditContext:
    """Watch every forward and `generate` of one base model, and tell its edited blocks which tokens to edit.

    It hangs on the base model and not on the tuner, because transformers' own adapter loading throws the tuner away and
    calls the base model directly. What it knows of a call belongs to the thread of that call.

    Args:
        model: the base model: callers' keyword arguments (labels, prompt_lengths) and `generate` arrive here.
        stack: the module that owns the list of blocks: mask, cache and positions arrive here, also from callers that
            pass by the model's head.
    """

    # The fields of `CurrentForward`, of the last forward of the thread.
    relative_positions = _ThreadLocalAttribute()
    row_adapters = _ThreadLocalAttribute()
    recorded = _ThreadLocalAttribute()
    stated_lengths = _ThreadLocalAttribute()  # (sequences,) set by `prompt_lengths()`
    generation = _ThreadLocalAttribute()  # the `Generation` of `generate`, while it runs
    asked_positions = _ThreadLocalAttribute()
    routes = _ThreadLocalAttribute()
    stack_call = _ThreadLocalAttribute()  # the `StackCall` of the forward
    past = _ThreadLocalAttribute()  # how many columns precede its tokens
    of_editor = _ThreadLocalAttribute()  # whether it is a forward of an editor, not of a caller
    # What the base model was called with, and does not pass on to its stack of blocks.
    _labels = _ThreadLocalAttribute()
    _passed_lengths = _ThreadLocalAttribute()
    _wants_last_logits = _ThreadLocalAttribute()
    _has_run = _ThreadLocalAttribute()  # True once a forward has run in this thread

    def __init__(self, model: nn.Module, stack: nn.Module) -> None:
        model_call.warn_if_untested()
        self._thread = threading.local()
        self._last_training_forward: CurrentForward | None = None
        self._training_threads: set[int] = set()
        self.manager: Any = (
            None  # of transformers' continuous batching, which runs in a thread of its own
        )
        self.routing = Routing(self)
        self.prepared: Any = None  # what edits of this model share, such as packed weights; editing/ knows what it is
        self._warned = False
        self._warned_of_scoring = False
        self._model: Any = model
        self._model_arguments = tuple(signature(model.forward).parameters)
        self._stack = StackSignature.of(stack)
        self._stack_module = [stack]
        self._handles = [
            model.register_forward_pre_hook(self._read_model_call, with_kwargs=True),
            stack.register_forward_pre_hook(self._place_tokens, with_kwargs=True),
        ]
        for method in GENERATION:
            if hasattr(model, method):
                # An attribute of the instance is found before the class's method, by PEFT and by transformers alike.
                setattr(model, method, getattr(self, method))

    def detach(self) -> None:
        """Leave the base model as it was before the first adapter came."""
        for handle in self._handles:
            handle.remove()
        for method in GENERATION:
            self._model.__dict__.pop(method, None)
        self.prepared = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to running calls, threads and queues, which can be neither pickled nor copied."""
        state = {name: value for name, value in self.__dict__.items() if name != "_thread"}
        return {
            **state,
            "manager": None,
            "prepared": None,
            "_last_training_forward": None,
            "_training_threads": set(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._thread = threading.local()

    def current_forward(self) -> CurrentForward:
        """Tell the blocks about the forward that they are part of, which is the last one of this thread.

        A thread that has run none is one of autograd's own, in which gradient checkpointing runs blocks again on a GPU. It
        gets the last forward that needed gradients.

        Raises:
            ValueError: no forward of the model has run, but one of its blocks.
            RuntimeError: several threads train the model, so that it cannot be known whose forward is run again.
        """
        if self._has_run:
            return self._forward()
        if self._last_training_forward is None:
            raise ValueError(
                f"A block with a BaFT adapter was called, but not its model, {type(self._model).__name__}, which alone is told "
                "where prompts end. Call the model."
            )
        if len(self._training_threads) > 1:
            raise RuntimeError(
                "Several threads train one BaFT model with gradient checkpointing; train it in one thread."
            )
        return self._last_training_forward

    def _forward(self) -> CurrentForward:
        return CurrentForward(
            self.relative_positions,
            self.row_adapters,
            self.recorded,
            self.asked_positions,
            self.routes,
        )

    def mask(
        self, relative_positions: Tensor | None, hidden: Tensor, config: BaftConfig
    ) -> Tensor | None:
        """Return which vectors of `hidden` (batch, tokens, d) an adapter edits: (batch, tokens) bool, or None for all.

        Raises:
            ValueError: `hidden` does not hold one vector for each token that the model was called with.
        """
        if relative_positions is None:
            return None
        if hidden.shape[:-1] != relative_positions.shape:
            raise ValueError(
                f"A block gave hidden vectors of shape {tuple(hidden.shape)}, but the model was called with (rows, tokens) = "
                f"{tuple(relative_positions.shape)}, and a BaFT adapter edits one vector of each token. Call the model, not a "
                "block of it, with one row per sequence. If it was called so, its blocks give something else: name modules "
                "that give (rows, tokens, d) with target_modules."
            )
        return config.edits(relative_positions).to(hidden.device)

    @contextmanager
    def recording(self) -> Iterator[dict[Any, RecordedGates]]:
        """Collect each block's gates in the forwards inside; the last forward counts.

        Their key is the block's name where one adapter is active; (block's name, adapter's name) where several are, or for
        that adapter's rows of a mixed batch.
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
    def stating(self, lengths: Sequence[int] | Tensor) -> Iterator[None]:
        """Take `lengths` (sequences,) as the prompt lengths of this thread's forwards and `generate` calls inside."""
        outer, self.stated_lengths = self.stated_lengths, integer_lengths(lengths)
        try:
            yield
        finally:
            self.stated_lengths = outer

    @contextmanager
    def another_call(self) -> Iterator[None]:
        """Let the forwards inside be calls of their own; what this thread knows of a running one is put back afterwards."""
        outer = dict(self._thread.__dict__)
        self._thread.__dict__.clear()
        try:
            yield
        finally:
            self._thread.__dict__.clear()
            self._thread.__dict__.update(outer)

    def call_model(self, ids: Tensor, real: Tensor) -> None:
        """Call the base model on tokens (rows, tokens), without a cache. real: bool, False for padding."""
        model_call.full_logits(self._model, input_ids=ids, attention_mask=real.long())

    @property
    def model(self) -> nn.Module:
        """The base model."""
        return self._model  # type: ignore[no-any-return]

    def after_stack(self, hook: Any) -> None:
        """Let a function be called after the stack of blocks, as its forward hook; once, however often it is given."""
        if len(self._handles) == 2:
            self._handles.append(self._stack_module[0].register_forward_hook(hook))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model's `generate`, and note where the prompt lies until it returns."""
        lengths = kwargs.pop("prompt_lengths", None)
        outer, self.generation = self.generation, self._begin_generation(args, kwargs, lengths)
        try:
            return type(self._model).generate(self._model, *args, **kwargs)
        finally:
            self.generation = outer

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model's own (for `generate_batch`, `transformers serve`), and note where its requests' prompts lie.

        Raises:
            NotImplementedError: this version of transformers does not tell which token belongs to which request.
        """
        manager = type(self._model).init_continuous_batching(self._model, *args, **kwargs)
        if self.stated_lengths is not None:
            raise NotImplementedError(model_call.CONTINUOUS_BATCHING)
        model_call.prepare_manager(manager, self.manager)
        self.manager = manager
        return manager

    def _begin_generation(
        self, args: tuple, kwargs: dict[str, Any], lengths: Any
    ) -> Generation | None:
        """Note where the prompt of a call of `generate` lies; None where it gets no tokens."""
        call = model_call.read_generate_call(args, kwargs)
        if call.prompt is None:
            return None
        if call.guided:
            raise NotImplementedError(model_call.GUIDANCE)
        cached = model_call.cached_columns(call.memory)
        if cached is None:
            raise UnknownPositionError(
                self._model,
                f"generate() was given a {type(call.memory).__name__} that does not tell how many tokens it holds",
                "Pass the whole chat as the prompt, without it.",
            )
        real = call.attention_mask
        if real is None:
            real = torch.ones(call.prompt.shape[:2], device=call.prompt.device)
        real, stated = real.bool(), self._passed_or_stated(lengths)
        return Generation(
            GenerationSpan.of_prompt(real, int(cached), stated),
            int(cached),
            GenerationSpan.of_prompt(real, 0, stated),
            call.prompt,
            real,
        )

    def _passed_or_stated(self, passed: Any) -> Tensor | None:
        return self.stated_lengths if passed is None else integer_lengths(passed)

    def _read_model_call(
        self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        """Before the base model's forward: take what its stack of blocks will not be told, labels and prompt lengths."""
        self._labels = model_call.read_labels(self._model_arguments, args, kwargs)
        self._passed_lengths = kwargs.get("prompt_lengths")
        self._wants_last_logits = model_call.wants_last_logits(self._model_arguments, args, kwargs)
        return args, {k: v for k, v in kwargs.items() if k != "prompt_lengths"}

    def _place_tokens(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before the stack of blocks runs: find the relative position of every token."""
        labels, self._labels = self._labels, None
        lengths, self._passed_lengths = self._passed_or_stated(self._passed_lengths), None
        wants_last_logits, self._wants_last_logits = self._wants_last_logits, None
        call = model_call.read_stack_call(self._stack, args, kwargs)
        self.routes, self.stack_call, self.past = {}, call, 0
        self.asked_positions = None
        if call is None:
            self.relative_positions = None
        elif call.is_continuous_batch:
            self.relative_positions = self._positions_of_requests(call)
        elif self.generation is not None:
            self.relative_positions = self._positions_in_generate(call, self.generation)
        else:
            if labels is None and lengths is None and self.of_editor in (None, False):
                if module.training and torch.is_grad_enabled():
                    self._warn_that_lengths_are_missing()
                elif not module.training and not wants_last_logits:
                    self._warn_of_scoring(call)
            self.relative_positions = self._positions_of_forward(call, labels, lengths)
        if self.asked_positions is None:
            self.asked_positions = self.relative_positions
        self._has_run = True
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._training_threads.add(threading.get_ident())
            self._last_training_forward = self._forward()

    def _positions_of_requests(self, call: StackCall) -> Tensor:
        """Return the relative positions of one continuous batch, (1, tokens)."""
        positions = call.position_ids
        if positions is None:
            raise NotImplementedError(model_call.CONTINUOUS_BATCHING)
        lengths = model_call.prompt_lengths_of_requests(
            self.manager, positions.shape[1], positions.device
        )
        return positions - lengths

    def _positions_in_generate(self, call: StackCall, generation: Generation) -> Tensor:
        """Return the relative positions, (rows, tokens), of a forward inside `generate`."""
        rows, width = call.tokens.shape[:2]
        past = model_call.columns_before_in_generate(self._model, call, generation.seen)
        if isinstance(past, int):
            generation.seen = past + width
        self.past = past
        self.asked_positions = generation.asked_span.relative_positions(past, rows, width)
        return generation.span.relative_positions(past, rows, width)

    def _positions_of_forward(
        self, call: StackCall, labels: Tensor | None, lengths: Tensor | None
    ) -> Tensor:
        """Return the relative positions, (rows, tokens), of a forward outside `generate`."""
        rows, width = call.tokens.shape[:2]
        prompt_ends_are_known = labels is not None or lengths is not None
        past = model_call.columns_before(self._model, call, position_matters=prompt_ends_are_known)
        self.past = past
        real, past = _real_tokens(call.attention_mask, rows, width, past, call.tokens.device)
        positions = call.position_ids
        # Position ids may begin several sequences in one row, but only where no cache precedes them.
        cache_is_empty = isinstance(past, int) and past == 0
        may_be_packed = (
            positions is not None and positions.shape == (rows, width) and cache_is_empty
        )
        one_label_a_token = labels is not None and labels.shape == (rows, width)
        return relative_positions_of_input(
            real,
            past,
            positions=positions if may_be_packed else None,
            labels=labels if one_label_a_token else None,
            prompt_lengths=lengths,
        )

    def _warn_that_lengths_are_missing(self) -> None:
        if not self._warned and not torch.compiler.is_compiling():
            self._warned = True
            logger.warning(WITHOUT_PROMPT_LENGTHS)

    def _warn_of_scoring(self, call: StackCall) -> None:
        """Warn once of a call whose logits before the last token may be read, and are not those of an edited answer."""
        if self._warned_of_scoring or torch.compiler.is_compiling():
            return
        goes_on = model_call.cached_columns(call.memory) != 0
        if goes_on or call.tokens.shape[1] == 1 or not self._is_edited():
            return
        self._warned_of_scoring = True
        logger.warning(SCORED_WITHOUT_PROMPT_LENGTHS)

    def _is_edited(self) -> bool:
        """Tell whether a block is edited now: it has an adapter that is not switched off."""
        layers = [m for m in self._model.modules() if getattr(m, "context", None) is self]
        return any(layer.active_adapters and not layer.disable_adapters for layer in layers)


def _real_tokens(
    mask: Tensor | None, rows: int, width: int, past: int | Tensor, device: torch.device
) -> tuple[Tensor, int | Tensor]:
    """Find the real ones of the new tokens, (rows, width) bool, and count the real tokens that precede them.

    `mask` is the caller's attention mask: over the new tokens, or over the cached ones as well. Without one that can be read,
    all tokens count as real.
    """
    if mask is None or mask.shape[1] < width:
        return torch.ones(rows, width, dtype=torch.bool, device=device), past
    if mask.shape[1] == width:
        return mask.bool(), past
    columns = past + torch.arange(width, device=device)
    mask = mask.bool()
    before = mask & (torch.arange(mask.shape[1], device=device) < past)
    return mask[:, columns], before.sum(1, keepdim=True)
