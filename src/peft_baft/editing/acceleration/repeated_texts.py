"""Compute once what an edit cannot change: the tokens before the last P prompt tokens, which are never edited.

`open_forward` is the one way in: it tries the fast way against the plain one, and falls back to the plain one with a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_baft.adapter import EditContext, find_context
from peft_baft.adapter.blocks import attention_window
from peft_baft.data.batching import Tokens, collate, padding_id
from peft_baft.editing.acceleration.module_patches import (
    FixedBlocks,
    at_least_four,
    blocks_up_to_first_edited,
    constant_forward,
    forwards_without_padding,
    logits_only_at,
    no_logits,
    remembering_outputs,
    replaced_forwards,
    with_hidden,
)
from peft_baft.editing.acceleration.packed_linear import packed_forwards
from peft_baft.editing.answers import AnswerForward, AnswerTargets, FullForward, stated_lengths
from peft_baft.editing.edit_cache import EditCache
from peft_baft.losses import answer_losses
from peft_baft.running import (
    call_with_cache,
    fork,
    full_logits,
    input_device,
    select_rows,
    takes_position_ids,
)

logger = logging.getLogger(__name__)
TOLERANCE = 1e-3  # of the first loss and of its gradient, relative: cached and plain ones differ by rounding
ROUNDINGS = (
    8  # or so many times the spacing of the model's numbers, where that is coarser: bfloat16
)
SLOWER = (
    "%s is edited without a cache, which is slower but right: going on from a cache fails with it (%s: %s). "
    "`baft check --model ...` shows what works with this model."
)


@dataclass(frozen=True)
class CachedPrefix:
    """The fast way: a forward computes the last P prompt tokens and the answers, and goes on from a cache of the rest.

    Besides, it computes logits only where an answer token is predicted, and runs the blocks up to the first edited one only
    once: their outputs do not depend on the adapter.

    Attributes:
        context: of the model's BaFT adapters. targets: what is learned. inputs: what the model is called with at each step.
        cache: keys and values of the tokens before. prefix_width: its columns.
        places: where logits are computed; at least those of the targets.
        forwards: what replaces forwards of the model's linear layers: packed weights, and padding left out.
        known_outputs: outputs of the blocks up to the first edited one, from the first forward on.
    """

    model: Any
    context: EditContext | None
    targets: AnswerTargets
    inputs: Mapping[str, Tensor]
    cache: Any
    prefix_width: int
    places: tuple[Tensor, ...]
    packed: Mapping[nn.Module, Callable[..., Any]]
    forwards: Mapping[nn.Module, Callable[..., Any]]
    fixed_blocks: Sequence[nn.Module]
    known_outputs: dict[nn.Module, Any] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        model: Any,
        rows: Sequence[Tokens],
        learned: Sequence[int],
        padding: int,
        device: torch.device,
        prompt_positions: int,
        prepared: EditCache | None = None,
    ) -> CachedPrefix:
        """Run the tokens before the edited ones, and keep what later tokens need of them.

        Args:
            prompt_positions: P, how many of the last prompt tokens are edited. At least one prompt must be longer.
            prepared: of the base model; by default the one that is kept with it.

        Raises:
            NotImplementedError: the model keeps no cache.
        """
        base, context = model.get_base_model(), find_context(model)
        cuts = [max(0, row.prompt_length - prompt_positions) for row in rows]
        prefix_inputs, inputs = split_batch(base, rows, cuts, padding, device)
        prefix_width, width = (part["input_ids"].shape[1] for part in (prefix_inputs, inputs))
        targets = AnswerTargets.of(rows, learned, cuts, width, device)
        packed = packed_forwards(base.modules(), (prepared or EditCache.of(model)).packed)
        real_prefix = inputs["attention_mask"][:, :prefix_width].bool()
        real_end = inputs["attention_mask"][:, prefix_width:].bool()
        nowhere = (targets.places[0][:0], targets.places[1][:0])  # nobody reads a prefix's logits
        with (
            torch.no_grad(),
            stated_lengths(context, targets),
            logits_only_at(base.get_output_embeddings(), nowhere),
            replaced_forwards(forwards_without_padding(base, real_prefix, packed)),
        ):
            _, cache = call_with_cache(model, base, prefix_inputs)
        return cls(
            model=model,
            context=context,
            targets=targets,
            inputs=inputs,
            cache=cache,
            prefix_width=prefix_width,
            places=at_least_four(targets.places),
            packed=packed,
            forwards=forwards_without_padding(base, real_end, packed),
            fixed_blocks=blocks_up_to_first_edited(model),
        )

    def losses(self) -> Tensor:
        """Compute the cross entropy of each answer token that is learned, (n,)."""
        base = self.model.get_base_model()
        # A forward adds its tokens to this one, not to the one that is kept.
        cache = fork(self.cache)
        not_known_yet = () if self.known_outputs else self.fixed_blocks
        known = {block: constant_forward(output) for block, output in self.known_outputs.items()}
        with (
            stated_lengths(self.context, self.targets),
            logits_only_at(base.get_output_embeddings(), self.places),
            remembering_outputs(not_known_yet, self.known_outputs),
            replaced_forwards({**self.forwards, **known}),
        ):
            logits, _ = call_with_cache(self.model, base, self.inputs, cache)
        if len(logits) != len(self.targets.tokens):
            logits = logits[: len(self.targets.tokens)]  # the others repeat the first place
        return answer_losses(logits, self.targets.tokens.to(logits.device))

    def select_rows(self, chosen: Sequence[int]) -> CachedPrefix:
        """Make the same for some of the rows, without running the tokens before them again."""
        index = torch.tensor(chosen, device=self.targets.tokens.device)
        targets = self.targets.select_rows(chosen, self.targets.width)
        inputs = {name: tensor[index] for name, tensor in self.inputs.items()}
        real = inputs["attention_mask"][:, self.prefix_width :].bool()
        base = self.model.get_base_model()
        outputs = {
            block: with_hidden(out, lambda hidden: hidden[index])
            for block, out in self.known_outputs.items()
        }
        return replace(
            self,
            targets=targets,
            inputs=inputs,
            cache=select_rows(self.cache, index),
            places=at_least_four(targets.places),
            forwards=forwards_without_padding(base, real, self.packed),
            known_outputs=outputs,
        )


def split_batch(
    model: nn.Module,
    rows: Sequence[Tokens],
    cuts: Sequence[int],
    padding: int,
    device: torch.device,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Collate the first `cuts[i]` tokens of each row, and its other tokens, as two calls of a model.

    Prefixes are padded on the left, so that what follows them in a cache follows their last token. The second call's
    attention mask covers both. The model is told positions if it takes any.
    """
    prefixes = [Tokens(row.ids[:cut], cut) for row, cut in zip(rows, cuts, strict=True)]
    ends = []
    for row, cut in zip(rows, cuts, strict=True):
        ends.append(Tokens(row.ids[cut:], row.prompt_length - cut))
    before, after = collate(prefixes, padding, "left"), collate(ends, padding)
    prefix_mask = before["attention_mask"].to(device)
    mask = torch.cat([prefix_mask, after["attention_mask"].to(device)], 1)
    first = {"input_ids": before["input_ids"].to(device), "attention_mask": prefix_mask}
    second = {"input_ids": after["input_ids"].to(device), "attention_mask": mask}
    if takes_position_ids(model):
        # The model would count the padding at the left of the prefixes as positions.
        position = (mask.cumsum(1) - 1).clamp(min=0)
        width = prefix_mask.shape[1]
        first["position_ids"], second["position_ids"] = position[:, :width], position[:, width:]
    return first, second


def open_forward(
    model: Any,
    rows: Sequence[Tokens],
    learned: Sequence[int],
    padding: int,
    prompt_positions: int | None,
    prepared: EditCache | None = None,
) -> AnswerForward:
    """Take the fast way where it gives what the plain one gives, else the plain one, with a warning.

    That is tried when a model is first edited, loss and gradient, and the loss again for texts that are much longer or reach
    over the model's attention window.

    Args:
        model: a PeftModel. rows: the texts. learned: numbers of the rows whose answers are learned.
        padding: a token id to pad with.
        prompt_positions: P of the adapter; None where tokens before the last P may change as well.
        prepared: what earlier edits of the base model found out; by default the one that is kept with it.
    """
    device = input_device(model)
    full = FullForward(model, rows, learned, padding, device)
    if prompt_positions is None or max(row.prompt_length for row in rows) <= prompt_positions:
        return full
    prepared = prepared or EditCache.of(model)
    longest = max(len(row.ids) for row in rows)
    if prepared.failed_length is not None and longest >= prepared.failed_length:
        return full
    first_time = prepared.verified_length == 0
    # A model that was never edited before may fail in any way when it goes on from a cache: its error is told, not raised.
    unknown_errors = (Exception,) if first_time else ()
    base = type(model.get_base_model()).__name__
    try:
        cached = CachedPrefix.build(
            model, rows, learned, padding, device, prompt_positions, prepared
        )
        if longest > prepared.verified_length:
            longest_row = max(range(len(rows)), key=lambda i: len(rows[i].ids))
            tried = sorted({learned[0], longest_row})
            _require_equal(
                model, full.select_rows(tried), cached.select_rows(tried), gradient=first_time
            )
            prepared.verified_length = verified_length(model, longest)
        return cached
    except NotImplementedError as error:  # a model that keeps no cache: nothing is wrong with it
        prepared.failed_length = 0
        logger.info("%s is edited without a cache: %s", base, error)
    except (CacheDiffers, *unknown_errors) as error:
        prepared.failed_length = 0 if first_time else prepared.verified_length + 1
        logger.warning(SLOWER, base, type(error).__name__, error)
    return full


def verified_length(model: Any, length: int) -> int:
    """Up to how many tokens a model may be taken to do what it did with `length`: the next power of two, or its window."""
    window = attention_window(model.get_base_model())
    verified = 1 << (length - 1).bit_length()
    return min(verified, window) if window and window >= length else verified


class CacheDiffers(ArithmeticError):
    """Say that an edit with a cache is not the edit without it."""


def _require_equal(model: Any, full: AnswerForward, cached: AnswerForward, gradient: bool) -> None:
    """Raise CacheDiffers unless two forwards of the same rows give the same loss, and the same gradient if asked.

    The cached one runs twice: what its first run leaves behind must not reach the second one.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not (gradient and parameters and torch.is_grad_enabled()):
        with torch.no_grad():
            expected, loss = (forward.losses().mean().item() for forward in (full, cached))
        _require_small("loss", abs(loss - expected), 1 + abs(expected), model)
        return
    expected, expected_gradient = _loss_and_gradient(full, parameters)
    size = torch.linalg.vector_norm(expected_gradient).item()
    for _ in range(2):
        loss, cached_gradient = _loss_and_gradient(cached, parameters)
        _require_small("loss", abs(loss - expected), 1 + abs(expected), model)
        difference = torch.linalg.vector_norm(cached_gradient - expected_gradient).item()
        _require_small("gradient", difference, size, model)


def _loss_and_gradient(
    forward: AnswerForward, parameters: Sequence[nn.Parameter]
) -> tuple[float, Tensor]:
    """Give the mean loss and its gradient as one vector; gradients that the parameters have stay as they are."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    loss = forward.losses().mean()
    loss.backward()
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient
    return loss.item(), torch.cat([part.detach().flatten().float().cpu() for part in parts])


def _require_small(what: str, difference: float, size: float, model: Any) -> None:
    """Raise CacheDiffers if a difference is more than rounding explains in something of that size."""
    dtype = next(
        (p.dtype for p in model.get_base_model().parameters() if p.is_floating_point()),
        torch.float32,
    )
    tolerance = max(TOLERANCE, ROUNDINGS * torch.finfo(dtype).eps)
    if not difference <= tolerance * size:
        raise CacheDiffers(
            f"the {what} of its first step is off by {difference:.2g}, where the {what}'s size is {size:.2g}"
        )


logger = logging.getLogger(__name__)


SLOWER = "%s is edited without a cache, which is slower but right: going on from a cache fails with it (%s)."


TOLERANCE = 1e-3  # of logits, relative to the largest: cached and plain ones differ by rounding


Places = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class CachedTexts:
    """Texts, or what follows their first tokens.

    Attributes:
        inputs: what the model is called with. cuts: how many tokens of each row are in the cache instead.
        read: (n,) rows, ascending, and (n,) columns of the logits that are read, in the columns of the inputs.
        cache: of the tokens before; None where the texts are whole. fixed: blocks that run once.
    """

    model: Any
    inputs: dict[str, Tensor]
    cuts: tuple[int, ...]
    read: Places
    fixed: FixedBlocks
    cache: Any = None

    @classmethod
    def whole(
        cls,
        model: Any,
        tokenizer: Any,
        rows: Sequence[Tokens],
        read: Places,
        fixed_blocks: Sequence[nn.Module],
    ) -> CachedTexts:
        """Put whole texts to the model; arguments as `of`."""
        device, batch = input_device(model), collate(rows, padding_id(tokenizer))
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        return cls(model, inputs, (0,) * len(rows), read, FixedBlocks(fixed_blocks))

    @classmethod
    def of(
        cls,
        model: Any,
        tokenizer: Any,
        rows: Sequence[Tokens],
        cuts: Sequence[int],
        read: Places,
        fixed_blocks: Sequence[nn.Module],
        tried: int = 2,
    ) -> CachedTexts:
        """Put the first tokens into a cache, where the model keeps one and going on from it gives what whole texts give.

        Args:
            cuts: how many tokens of each row cannot change. read: rows, ascending, and columns of the logits that are read.
            fixed_blocks: the first blocks, whose outputs cannot change. tried: on how many rows the cache is tried.
        """
        whole = cls.whole(model, tokenizer, rows, read, fixed_blocks)
        if not all(cuts):
            return whole
        before, inputs = split_batch(model, rows, cuts, padding_id(tokenizer), input_device(model))
        try:
            with torch.no_grad(), no_logits(model):
                _, cache = call_with_cache(model, model, before)
        except NotImplementedError:  # a model that keeps no cache: nothing is wrong with it
            return whole
        except Exception as error:  # a model may fail in any way when it is asked for a cache: that is told, not raised
            logger.warning(SLOWER, type(model).__name__, f"{type(error).__name__}: {error}")
            return whole
        columns = read[1] - torch.tensor(cuts)[read[0]]
        cached = cls(
            model, inputs, tuple(cuts), (read[0], columns), FixedBlocks(fixed_blocks), cache
        )
        some = range(min(tried, len(rows)))
        with torch.no_grad():
            expected = whole.select(some).logits()
            difference = (cached.select(some).logits() - expected).abs().max()
        if difference <= TOLERANCE * (1 + expected.abs().max()):
            return cached
        logger.warning(SLOWER, type(model).__name__, f"its logits are off by {difference:.2g}")
        return whole

    def logits(self) -> Tensor:
        """Compute the logits that are read, (n, vocabulary)."""
        head = self.model.get_output_embeddings()
        with self.fixed.run_once(), logits_only_at(head, at_least_four(self.read)):
            if self.cache is None:
                logits = full_logits(self.model, **self.inputs)
            else:
                cache = fork(self.cache)
                logits, _ = call_with_cache(self.model, self.model, self.inputs, cache)
        return logits[: len(self.read[0])]

    def select(self, chosen: Sequence[int]) -> CachedTexts:
        """Make the same of some of the rows."""
        counts = self.read[0].bincount(minlength=len(self.cuts)).tolist()
        columns = self.read[1].split(counts)
        numbers = torch.arange(len(chosen)).repeat_interleave(
            torch.tensor([counts[row] for row in chosen])
        )
        index = torch.tensor(list(chosen), device=self.inputs["input_ids"].device)
        outputs = {
            block: with_hidden(output, lambda hidden: hidden[index.to(hidden.device)])
            for block, output in self.fixed.outputs.items()
        }
        return replace(
            self,
            inputs={name: part[index] for name, part in self.inputs.items()},
            cuts=tuple(self.cuts[row] for row in chosen),
            read=(numbers, torch.cat([columns[row] for row in chosen])),
            fixed=FixedBlocks(self.fixed.blocks, outputs),
            cache=None if self.cache is None else select_rows(self.cache, index),
        )
