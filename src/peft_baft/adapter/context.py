"""What the blocks must know about a forward: each token's position relative to its prompt, and which adapters edit it.

A token's position relative to the end of its prompt is -1 for the last prompt token and 0 for the first answer token
(`peft_baft.span`). This file reads each call of the model, computes these positions, and passes them to the edited blocks.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from peft_baft.adapter import model_call
from peft_baft.adapter.call import NOT_FOUND, Call, CallsByInput, RecordedGates, in_backward
from peft_baft.adapter.generation import Generation
from peft_baft.adapter.mixed_batch import repeated_names
from peft_baft.adapter.model_call import (
    ModelArguments,
    StackCall,
    StackSignature,
    UnknownPositionError,
)
from peft_baft.adapter.rollback import Cursors
from peft_baft.adapter.texts import (
    Texts,
    texts_after_cache,
    texts_of_input,
    texts_of_requests,
    texts_of_step,
)
from peft_baft.running import full_logits
from peft_baft.span import GenerationSpan, integer_lengths, relative_positions_of_input

if TYPE_CHECKING:
    from peft_baft.adapter.config import BaftConfig

F = TypeVar("F", bound=Callable[..., Any])
logger = logging.getLogger(__name__)
WITHOUT_PROMPT_LENGTHS = (
    "A BaFT adapter was trained on a forward without labels and without prompt lengths, as with label smoothing, a custom "
    "loss function, or DPO and GRPO of older TRL (1.12). The whole input then counts as prompt, and only its last "
    "prompt_positions tokens are edited. State where prompts end, with model(..., prompt_lengths=...) or "
    "`with peft_baft.prompt_lengths(model, lengths):`."
)
SCORED_WITHOUT_PROMPT_LENGTHS = (
    "A model with BaFT edits was called on whole texts, without labels and without prompt lengths. Each input then counts as "
    "prompt, and only its last prompt_positions tokens are edited: the last token's logits are right, earlier ones are those of "
    "the unedited model. To score an answer with them, state where its prompt ends: model(..., prompt_lengths=[...]), labels, or "
    "`with peft_baft.prompt_lengths(model, [...])`; for lm-evaluation-harness, `--model baft-hf`. If you only need the next "
    "token, pass logits_to_keep=1. This warning is shown once; see docs/positions.md."
)
# Methods of the base model that the context replaces; the last one only if a kind of adapter reads texts.
GENERATION = ("generate", "init_continuous_batching")
PREPARATION = "prepare_inputs_for_generation"


def _not_compiled(method: F) -> F:
    disabled: Any = torch.compiler.disable  # which has no types
    return cast(F, disabled(method))


class _PreparationWatch:
    """Replaces the base model's `prepare_inputs_for_generation`, to record all tokens that a running `generate` has so far.

    A step with a cache gets the last token only. `generate` inspects the signature of the method, so this has the model's.
    """

    def __init__(self, context: EditContext) -> None:
        self.__self__ = context

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.__self__.method_of_model(PREPARATION))

    def __call__(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.__self__.generation is not None:
            self.__self__.generation.ids_so_far = input_ids
        return self.__self__.method_of_model(PREPARATION)(input_ids, *args, **kwargs)


class _ThreadLocalAttribute:
    """An attribute of `EditContext` with one value per thread, None until it is set: several threads may serve one model.

    The values are in a plain `threading.local`. torch.compile traces that, but neither a subclass of it nor a `ContextVar`.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, context: Any, owner: type) -> Any:
        return getattr(context._thread, self._name, None)

    def __set__(self, context: Any, value: Any) -> None:
        setattr(context._thread, self._name, value)


@dataclass(frozen=True)
class _Forward:
    """A running forward.

    Attributes:
        call: what its blocks need to know; None until that is determined. step_of: the `generate` that it is a step of, if any.
    """

    call: Call | None = None
    step_of: Generation | None = None


class EditContext:
    """Reads every forward and `generate` call of one base model, and determines which tokens its blocks edit.

    It is attached to the base model and not to the tuner, because transformers' own adapter loading discards the tuner and
    calls the base model directly. What it knows about a call belongs to the thread of that call.

    Args:
        model: the base model, which receives callers' keyword arguments (labels, prompt_lengths) and `generate` calls.
        stack: the module that owns the list of blocks. It receives mask, cache and positions, even from callers that
            bypass the model's head.
    """

    # The adapter of each row of a mixed batch: as passed by the caller, and repeated for beams.
    row_names = _ThreadLocalAttribute()
    row_adapters = _ThreadLocalAttribute()
    # Where blocks record their gates (None unless requested), and how many forwards were running when recording began.
    recorded = _ThreadLocalAttribute()
    _recording_depth = _ThreadLocalAttribute()
    stated_lengths = _ThreadLocalAttribute()  # (sequences,) set by `prompt_lengths()`
    generation = _ThreadLocalAttribute()  # the `Generation` of a running `generate`
    _is_own_forward = _ThreadLocalAttribute()  # whether this package makes the forward
    last_call = _ThreadLocalAttribute()  # the `Call` of the last forward
    _running = _ThreadLocalAttribute()  # a `_Forward` for each running forward, the innermost last
    _model_call = _ThreadLocalAttribute()  # what the base model was called with

    def __init__(self, model: nn.Module, stack: nn.Module) -> None:
        model_call.warn_if_untested()
        self._thread = threading.local()
        self._calls = CallsByInput()
        # Transformers' manager of continuous batching, and what readers of texts noted about each of its requests.
        self.manager: Any = None
        self._notes_of_requests: dict[Any, dict[Any, Any]] = {}
        self.cursors = Cursors()  # of the adapters' editors
        self._warned_of_training = self._warned_of_scoring = False
        self._model: Any = model
        self._stack, self._model_signature = StackSignature.of(stack), StackSignature.of(model)
        self._reads_texts = self._detached = False
        self._handles = [
            model.register_forward_pre_hook(self._read_model_call, with_kwargs=True),
            model.register_forward_hook(self._forget_model_call, always_call=True),
            stack.register_forward_pre_hook(self._begin, with_kwargs=True),
            stack.register_forward_hook(self._end, always_call=True),
        ]
        # Methods that callers had already set on the model itself, by name.
        self._replaced: dict[str, Any] = {}
        for name in GENERATION:
            self._replace_method(name, getattr(self, name))

    def _replace_method(self, name: str, method: Any) -> None:
        """Replace a method of the base model, if it has one of this name."""
        if name in vars(self._model):
            self._replaced[name] = vars(self._model)[name]
        if hasattr(self._model, name):
            # An instance attribute takes precedence over the class's method, for PEFT and transformers too.
            setattr(self._model, name, method)

    def detach(self) -> None:
        """Restore the base model to its state before the first adapter.

        A method that someone else has replaced since stays: it may call ours, which then only forwards the call.
        """
        for handle in self._handles:
            handle.remove()
        self._detached = True
        for name in (*GENERATION, PREPARATION):
            if getattr(vars(self._model).get(name), "__self__", None) is self:
                delattr(self._model, name)
                if name in self._replaced:
                    setattr(self._model, name, self._replaced[name])

    def __getstate__(self) -> dict[str, Any]:
        """Omit what belongs to running calls, threads and queues, which can be neither pickled nor copied."""
        left_out = {"_thread", "_calls"}
        state = {name: value for name, value in self.__dict__.items() if name not in left_out}
        return {**state, "manager": None, "_notes_of_requests": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._thread, self._calls = threading.local(), CallsByInput()

    @property
    def relative_positions(self) -> Tensor | None:
        """Relative positions of this thread's last forward, (rows, tokens) long; None if it took no tokens."""
        return None if self.last_call is None else self.last_call.relative_positions

    @property
    def running_call(self) -> Call | None:
        """The call of this thread's running forward; None if there is none."""
        return self._running[-1].call if self._running else None

    def call_of_block(self, layer: nn.Module, hidden: Tensor | None) -> Call | None:
        """Return the call that a block is part of, even if autograd runs the block again; None outside of any call.

        Args:
            layer: the block's BaftLayer. hidden: the block's input.

        Raises:
            RuntimeError: the block runs again, for an unknown forward.
        """
        call = self.running_call
        if in_backward():
            found = None if hidden is None else self._calls.find(layer, hidden)
            if found is None and call is None:
                raise RuntimeError(NOT_FOUND)
            return found or call
        if call is not None and hidden is not None and call.may_be_repeated:
            self._calls.remember(layer, hidden, call)
        return call

    def gates_of(self, call: Call) -> dict[Any, RecordedGates] | None:
        """Return where the blocks record the gates of a forward; None if they do not, or if autograd runs a block again."""
        if self.recorded is None or call is not self.running_call:
            return None
        return self.recorded if len(self._running) == self._recording_depth + 1 else None

    def mask(
        self, relative_positions: Tensor | None, hidden: Tensor, config: BaftConfig
    ) -> Tensor | None:
        """Return which vectors of `hidden` (batch, tokens, d) an adapter edits: (batch, tokens) bool, or None for all.

        Raises:
            ValueError: `hidden` does not have one vector for each token that the model was called with.
        """
        if relative_positions is None:
            return None
        if hidden.shape[:-1] != relative_positions.shape:
            raise ValueError(
                f"A block returned hidden vectors of shape {tuple(hidden.shape)}, but the model was called with (rows, tokens) = "
                f"{tuple(relative_positions.shape)}, and a BaFT adapter edits one vector per token. Call the model, not a "
                "block of it, with one row per sequence. If you did, its blocks return something else: use target_modules to "
                "name modules that return (rows, tokens, d)."
            )
        return config.edits(relative_positions).to(hidden.device)

    @contextmanager
    def recording(self) -> Iterator[dict[Any, RecordedGates]]:
        """Record the gates of the forwards in the context, but not of nested forwards; a later forward overwrites.

        The key is the block's name if one adapter is active; (block's name, adapter's name) if several are, or for that
        adapter's rows of a mixed batch.
        """
        with self._values(recorded={}, _recording_depth=len(self._running or ())):
            yield self.recorded

    def rows(self, names: list[str] | None) -> AbstractContextManager[None]:
        """Edit row i of the batches in the context by adapter `names[i]` only."""
        return self._values(row_names=names, row_adapters=names)

    def stating(self, lengths: Sequence[int] | Tensor) -> AbstractContextManager[None]:
        """Use `lengths` (sequences,) as the prompt lengths of this thread's forwards and `generate` calls in the context."""
        return self._values(stated_lengths=integer_lengths(lengths))

    @contextmanager
    def _values(self, **values: Any) -> Iterator[None]:
        """Set attributes of this thread in the context, and restore them afterwards."""
        outer = {name: getattr(self, name) for name in values}
        for name, value in values.items():
            setattr(self, name, value)
        try:
            yield
        finally:
            for name, value in outer.items():
                setattr(self, name, value)

    @contextmanager
    def another_call(self) -> Iterator[None]:
        """Treat the forwards in the context as separate calls; the state of this thread's running call is restored after."""
        outer = dict(self._thread.__dict__)
        self._thread.__dict__.clear()
        try:
            yield
        finally:
            self._thread.__dict__.clear()
            self._thread.__dict__.update(outer)

    @property
    def model(self) -> nn.Module:
        """The base model."""
        return cast(nn.Module, self._model)

    def read_texts(self) -> None:
        """From now on, provide the texts of each forward to kinds of adapters (`Call.texts`)."""
        if not self._reads_texts:
            self._reads_texts = True
            self._replace_method(PREPARATION, _PreparationWatch(self))

    @torch.no_grad()
    def run_base(self, ids: Tensor, real: Tensor, adapter_name: str) -> Tensor:
        """Run the base model on other texts, even during a running forward, and return its logits.

        No adapter of this type acts in it except `adapter_name`; kinds that read texts get none.

        Args:
            ids: (rows, tokens), padded on the right. real: bool, False for padding.
        """
        with self.another_call(), self.rows([adapter_name] * len(ids)):
            self._is_own_forward = True
            return full_logits(self._model, input_ids=ids, attention_mask=real.long())

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model's `generate`, and keep track of its prompt until it returns."""
        method = self.method_of_model("generate")
        if self._detached:
            return method(*args, **kwargs)
        lengths = kwargs.pop("prompt_lengths", None)
        generation = self._begin_generation(args, kwargs, lengths)
        # Stated lengths belong to this prompt, not to other texts that a logits processor may call the model on.
        with self._values(generation=generation, stated_lengths=None):
            return method(*args, **kwargs)

    def method_of_model(self, name: str) -> Any:
        """Return the method that ours replaced: one that a caller had set on the model, or that of the model's class."""
        if name in self._replaced:
            return self._replaced[name]
        return partial(getattr(type(self._model), name), self._model)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base model's method (for `generate_batch`, `transformers serve`), and keep track of its requests.

        Raises:
            NotImplementedError: this version of transformers does not report which token belongs to which request.
        """
        manager = self.method_of_model("init_continuous_batching")(*args, **kwargs)
        if self._detached:
            return manager
        if self.stated_lengths is not None:
            raise NotImplementedError(model_call.CONTINUOUS_BATCHING)
        model_call.prepare_manager(manager, self.manager)
        if manager is not self.manager:
            self.manager, self._notes_of_requests = manager, {}
        return manager

    def _begin_generation(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], lengths: Any
    ) -> Generation | None:
        """Read where the prompt of a `generate` call ends; None if the call has no tokens."""
        call = model_call.read_generate_call(self._model, args, kwargs)
        if call.prompt is None:
            return None
        if call.guided:
            raise NotImplementedError(model_call.GUIDANCE)
        cached = model_call.cached_columns(call.cache)
        if cached is None:
            raise UnknownPositionError(
                self._model,
                f"generate() was given a {type(call.cache).__name__} that does not report how many tokens it holds",
                "Pass the whole chat as the prompt, without it.",
            )
        real = call.attention_mask
        if real is None:
            real = torch.ones(call.prompt.shape[:2], device=call.prompt.device)
        real, stated = real.bool(), self._passed_or_stated(lengths)
        return Generation(
            GenerationSpan.from_prompt(real, int(cached), stated),
            int(cached),
            GenerationSpan.from_prompt(real, 0, stated),
            call.prompt,
            real,
            cached=int(cached),
            cache=call.cache,
            uses_cache=call.uses_cache,
        )

    def _passed_or_stated(self, passed: Any) -> Tensor | None:
        return self.stated_lengths if passed is None else integer_lengths(passed)

    def _read_model_call(
        self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before the base model's forward: read labels and prompt lengths, which its stack of blocks does not receive."""
        self._model_call = model_call.read_model_call(
            self._model, self._model_signature.names, args, kwargs
        )
        if self.row_names is not None and self.generation is not None:
            read = model_call.read_stack_call(self._model_signature, args, kwargs)
            if read is not None:
                self.row_adapters = repeated_names(self.row_names, len(read.tokens))
        return args, {k: v for k, v in kwargs.items() if k != "prompt_lengths"}

    def _forget_model_call(self, *_: Any) -> None:
        """After the base model's forward, even if it failed before its stack ran."""
        self._model_call = None

    def _begin(
        self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before the stack of blocks runs: determine the relative position of every token."""
        running = self._running or ()
        self._running = (*running, _Forward())  # `_end` removes it, whether this succeeds or not
        given, self._model_call = self._model_call or ModelArguments(), None
        read = model_call.read_stack_call(self._stack, args, kwargs)
        repeated = self._repeated(stack, read, given)
        forward = _Forward(repeated) if repeated else self._new_forward(stack, read, given)
        call = forward.call
        assert call is not None, "a forward that has begun has its call"
        self._running, self.last_call = (*running, forward), call
        # Reentrant checkpointing of the whole stack first runs it without gradients. In inference nothing runs again.
        may_run_again = stack.training or torch.is_grad_enabled()
        if read is None or not may_run_again or torch.compiler.is_compiling():
            return None
        if call is not None:
            self._calls.remember(stack, read.tokens, call)
        if not read.tokens.is_floating_point():
            return None
        # The first block may receive the caller's own embeddings. An alias of them belongs to this forward only.
        alias = read.tokens.view_as(read.tokens)
        swapped = {id(read.tokens): alias}
        return (
            tuple(swapped.get(id(x), x) for x in args),
            {k: swapped.get(id(x), x) for k, x in kwargs.items()},
        )

    def _end(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        """After the stack of blocks has run or failed."""
        running = self._running or (_Forward(),)
        self._running = running[:-1]
        call, step_of = running[-1].call, running[-1].step_of
        if call is None or output is None or torch.compiler.is_compiling():
            return
        if step_of is not None and step_of.cache is None:
            step_of.note_output(model_call.caches_in(output))
        if call.texts is not None and step_of is None:
            rows = 0 if call.relative_positions is None else len(call.relative_positions)
            call.texts.leave_notes(model_call.caches_in(output), rows)

    def _repeated(
        self, stack: nn.Module, read: StackCall | None, given: ModelArguments
    ) -> Call | None:
        """Find the forward that autograd runs again, if a part of the model around its blocks is checkpointed.

        Raises:
            RuntimeError: it is unknown, and this call does not state where its prompts end.
        """
        if read is None or not in_backward():
            return None
        ends_known = given.labels is not None or given.prompt_lengths is not None
        try:
            found = self._calls.find(stack, read.tokens)
        except RuntimeError:
            if ends_known:
                return None
            raise
        if found is None and not ends_known:
            raise RuntimeError(NOT_FOUND)
        return found

    def _new_forward(
        self, stack: nn.Module, read: StackCall | None, given: ModelArguments
    ) -> _Forward:
        """Determine the relative positions of a forward, and the texts that its tokens belong to."""
        lengths = self._passed_or_stated(given.prompt_lengths)
        ends_known = given.labels is not None or lengths is not None
        generation = None if ends_known or read is None else self.generation
        if generation is not None and not generation.has_step(read):
            generation = None
        reads_texts = self._reads_texts and not self._is_own_forward
        positions: Tensor | None = None
        texts: Texts | None = None
        if read is None:
            pass  # no sequences of tokens: every vector is edited
        elif read.is_continuous_batch:
            positions, requests = self._positions_of_requests(read)
            if reads_texts:
                texts = self._texts_of_requests(requests, positions)
        elif generation is not None:
            positions, past = self._positions_in_generate(read, generation)
            generation.note_step(read)
            if reads_texts:
                texts = self._texts_in_generate(read, generation, positions, int(past))
        else:
            if not ends_known and not self._is_own_forward:
                self._warn_of_missing_lengths(stack, read, given)
            positions, past = self._positions_of_forward(read, given, lengths)
            if reads_texts:
                texts = self._texts_of_forward(read, given, positions, past, ends_known)
        call = Call(
            positions,
            self.row_adapters,
            texts=texts,
            may_be_repeated=torch.is_grad_enabled() and not torch.compiler.is_compiling(),
        )
        return _Forward(call, generation)

    @_not_compiled
    def _texts_of_requests(
        self, requests: Sequence[model_call.Request], positions: Tensor
    ) -> Texts:
        """Read the texts of one continuous batch."""
        texts = texts_of_requests(requests, positions, self._notes_of_requests)
        # Notes on requests that have ended are dropped; one that was only evicted from the cache is read again.
        names = {request.name for request in requests}
        self._notes_of_requests = {
            name: notes for name, notes in self._notes_of_requests.items() if name in names
        }
        return texts

    @_not_compiled
    def _texts_in_generate(
        self, read: StackCall, generation: Generation, positions: Tensor, past: int
    ) -> Texts:
        """Read the texts of a step of `generate`."""
        relative = generation.text_span.relative_positions(past, *positions.shape)
        return texts_of_step(generation, read.tokens, past, relative)

    @_not_compiled
    def _texts_of_forward(
        self,
        read: StackCall,
        given: ModelArguments,
        positions: Tensor,
        past: int | Tensor,
        ends_known: bool,
    ) -> Texts:
        """Read the texts of a forward that is not a step of `generate`."""
        ids: Tensor | None = read.tokens if read.tokens.ndim == 2 else given.input_ids
        if ids is not None and ids.shape != positions.shape:
            ids = None
        if isinstance(past, Tensor) or past:
            return texts_after_cache(ids, positions, read.cache, ends_known=ends_known)
        return texts_of_input(ids, positions)

    def _positions_of_requests(self, call: StackCall) -> tuple[Tensor, list[model_call.Request]]:
        """Return the relative positions of one continuous batch, (1, tokens), and its requests."""
        positions = call.position_ids
        if positions is None:
            raise NotImplementedError(model_call.CONTINUOUS_BATCHING)
        requests = model_call.requests_of_batch(self.manager, positions.shape[1])
        lengths = model_call.prompt_lengths_of_requests(requests, positions.device)
        return positions - lengths, requests

    def _positions_in_generate(
        self, call: StackCall, generation: Generation
    ) -> tuple[Tensor, int | Tensor]:
        """Return the relative positions of a step of `generate`, (rows, tokens), and the number of columns before them."""
        rows, width = call.tokens.shape[:2]
        past = model_call.columns_before_in_generate(self._model, call, generation.seen)
        if isinstance(past, int):
            generation.seen = past + width
        return generation.span.relative_positions(past, rows, width), past

    def _positions_of_forward(
        self, call: StackCall, given: ModelArguments, lengths: Tensor | None
    ) -> tuple[Tensor, int | Tensor]:
        """Return the relative positions of any other forward, (rows, tokens), and the number of columns before them."""
        rows, width = call.tokens.shape[:2]
        labels = given.labels
        if labels is not None and labels.shape != (rows, width):
            labels = None
        ends_known = labels is not None or lengths is not None
        columns = model_call.columns_before(self._model, call, position_matters=ends_known)
        real, past = _real_tokens(call.attention_mask, rows, width, columns, call.tokens.device)
        positions = None
        if isinstance(past, int) and past == 0:  # with a cache, each row is one sequence
            positions = call.position_ids
            if positions is None or positions.shape != (rows, width):
                positions = call.packing.or_else(given.packing).positions(rows, width)
            elif lengths is None:
                model_call.require_beginning(self._model, real, positions)
        relative = relative_positions_of_input(
            real, past, positions=positions, labels=labels, prompt_lengths=lengths
        )
        return relative, columns

    def _warn_of_missing_lengths(
        self, stack: nn.Module, call: StackCall, given: ModelArguments
    ) -> None:
        """Warn once about a call that may train on or score answers, but does not state where they begin."""
        if torch.compiler.is_compiling() or not self._may_score_answers:
            return
        if stack.training:
            if torch.is_grad_enabled() and not self._warned_of_training:
                self._warned_of_training = True
                logger.warning(WITHOUT_PROMPT_LENGTHS)
            return
        continues = model_call.cached_columns(call.cache) != 0
        if given.wants_last_logits or continues or call.tokens.shape[1] == 1:
            return
        if self._warned_of_scoring or not self._is_edited():
            return
        self._warned_of_scoring = True
        logger.warning(SCORED_WITHOUT_PROMPT_LENGTHS)

    @property
    def _may_score_answers(self) -> bool:
        """Whether the model may predict next tokens: a classifier has no answers."""
        return not hasattr(self._model, "can_generate") or model_call.labels_are_tokens(self._model)

    def _is_edited(self) -> bool:
        """Return whether an adapter is active in any block."""
        layers = [m for m in self._model.modules() if getattr(m, "context", None) is self]
        return any(layer.active_adapters and not layer.disable_adapters for layer in layers)


def _real_tokens(
    mask: Tensor | None, rows: int, width: int, past: int | Tensor, device: torch.device
) -> tuple[Tensor, int | Tensor]:
    """Return which of the new tokens are not padding, (rows, width) bool, and the number of such tokens before them.

    Args:
        mask: the caller's attention mask over the new tokens, or also over the cached ones; without one, no token is padding.
        past: the number of columns before the new tokens.
    """
    if mask is None or mask.shape[1] < width:
        return torch.ones(rows, width, dtype=torch.bool, device=device), past
    if mask.shape[1] == width:
        return mask.bool(), past
    columns = past + torch.arange(width, device=device)
    mask = mask.bool()
    before = mask & (torch.arange(mask.shape[1], device=device) < past)
    return mask[:, columns], before.sum(1, keepdim=True)
