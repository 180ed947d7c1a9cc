"""The choice between the accelerated and the plain implementation of each computation of an edit.

`editing/acceleration/` can be deleted; edits then take longer and have the same results. An accelerated implementation is
compared with the plain one before it is used. If it differs or fails, the plain one is used, with a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_baft.adapter.blocks import attention_window
from peft_baft.data.batching import Tokens, collate, padding_id
from peft_baft.editing.answers import AnswerForward, FullForward
from peft_baft.editing.edit_cache import EditCache
from peft_baft.editing.repeated_texts import Places, RepeatedTexts
from peft_baft.running import generate_greedily, input_device

ACCELERATED = find_spec("peft_baft.editing.acceleration") is not None
if ACCELERATED:
    from peft_baft.editing.acceleration.cached_prefix import CachedPrefix, with_cache
    from peft_baft.editing.acceleration.shared_prefix import padded_batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)
# Relative tolerance of a loss, a gradient or logits: the plain and the cached result differ by rounding.
TOLERANCE = 1e-3
ROUNDINGS = 8  # the tolerance in units of the dtype's spacing, where that is larger: bfloat16
SLOWER = "%s is edited without a cache, which is slower but right: continuing from a cache fails with it (%s)."
SEE_CHECK = " `baft check --model ...` shows what works with this model."


def open_forward(
    model: PeftModel,
    rows: Sequence[Tokens],
    learned: Sequence[int],
    padding: int,
    prompt_positions: int | None,
    prepared: EditCache | None = None,
) -> AnswerForward:
    """Return the loss computation for some rows: with a cache if that gives the plain result, else without.

    Loss and gradient are compared when a model is first edited. The loss is compared again for texts that are much longer or
    exceed the model's attention window.

    Args:
        rows: the texts. learned: the indices of the rows whose answers are trained.
        padding: a token id for padding.
        prompt_positions: P of the adapter; None if hidden vectors before the last P prompt tokens can change as well.
        prepared: the `EditCache` of the base model; by default the one stored for this model.
    """
    device = input_device(model)
    full = FullForward(model, rows, learned, padding, device)
    if not ACCELERATED or prompt_positions is None:
        return full
    if max(row.prompt_length for row in rows) <= prompt_positions:
        return full
    prepared = prepared or EditCache.of(model)
    longest = max(len(row.ids) for row in rows)
    if prepared.failed_length is not None and longest >= prepared.failed_length:
        return full
    first_time = prepared.verified_length == 0
    # A model that was never edited before may fail in any way with a cache: the error is logged, not raised.
    unknown_errors = (Exception,) if first_time else ()
    base = type(model.get_base_model()).__name__
    try:
        cached = CachedPrefix.build(
            model, rows, learned, padding, device, prompt_positions, prepared
        )
        if longest > prepared.verified_length:
            longest_row = max(range(len(rows)), key=lambda i: len(rows[i].ids))
            tested = sorted({learned[0], longest_row})
            _require_equal(
                model, full.select_rows(tested), cached.select_rows(tested), gradient=first_time
            )
            prepared.verified_length = verified_length(model, longest)
        return cached
    except NotImplementedError as error:  # the model has no cache, which is not a fault
        prepared.failed_length = 0
        logger.info("%s is edited without a cache: %s", base, error)
    except (CacheDiffers, *unknown_errors) as error:
        prepared.failed_length = 0 if first_time else prepared.verified_length + 1
        logger.warning(SLOWER + SEE_CHECK, base, f"{type(error).__name__}: {error}")
    return full


def repeated_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Tokens],
    cuts: Sequence[int],
    read: Places,
    fixed_blocks: Sequence[nn.Module],
    tested: int = 2,
) -> RepeatedTexts:
    """Return texts for repeated forward passes: with a cache of their first tokens if that gives the plain logits.

    Args:
        cuts: the number of each row's first tokens whose hidden vectors cannot change.
        read: rows, ascending, and columns of the logits to compute.
        fixed_blocks: the first blocks of the model, whose outputs cannot change.
        tested: the number of rows on which the cache is compared.
    """
    whole = RepeatedTexts.whole(model, tokenizer, rows, read, fixed_blocks)
    if not ACCELERATED or not all(cuts):
        return whole
    try:
        cached = with_cache(whole, rows, cuts, padding_id(tokenizer))
    except NotImplementedError:  # the model has no cache, which is not a fault
        return whole
    except (
        Exception
    ) as error:  # a model may fail in any way with a cache: the error is logged, not raised
        logger.warning(SLOWER, type(model).__name__, f"{type(error).__name__}: {error}")
        return whole
    some = range(min(tested, len(rows)))
    with torch.no_grad():
        expected = whole.select(some).logits()
        difference = (cached.select(some).logits() - expected).abs().max()
    if difference <= TOLERANCE * (1 + expected.abs().max()):
        return cached
    logger.warning(SLOWER, type(model).__name__, f"its logits are off by {difference:.2g}")
    return whole


def prompt_batches(
    model: PeftModel,
    block: nn.Module,
    prompts: Sequence[Tokens],
    padding: int,
    prompt_positions: int,
    prepared: EditCache,
) -> Iterator[tuple[Tensor, Callable[[int], Tensor]]]:
    """Yield batches of prompts to be answered by the unedited model: several each if padding does not change the answers.

    Args:
        model: with its adapters disabled. block: the last edited block, on whose outputs this is tested.
        padding: a token id for padding. prompt_positions: P of the adapter.

    Yields:
        The attention mask (rows, tokens) of a batch, padded on the left, and a function that decodes up to a number of new
        tokens of each row greedily: (rows, new tokens). A prefix that all prompts share may be missing from the mask.
    """
    if ACCELERATED:
        yield from padded_batches(model, block, prompts, padding, prompt_positions, prepared)
        return
    for prompt in prompts:
        batch = collate([prompt], padding, side="left")
        ids, mask = batch["input_ids"], batch["attention_mask"]
        yield mask, partial(generate_greedily, model, ids, mask, padding)


def verified_length(model: PeftModel, length: int) -> int:
    """Return the length up to which a test at `length` tokens counts: the next power of two, or the attention window."""
    window = attention_window(model.get_base_model())
    verified = 1 << (length - 1).bit_length()
    return min(verified, window) if window and window >= length else verified


class CacheDiffers(ArithmeticError):
    """The result with a cache differs from the plain result."""


def _require_equal(
    model: PeftModel, full: AnswerForward, cached: AnswerForward, gradient: bool
) -> None:
    """Raise CacheDiffers unless two computations of the same rows have the same loss, and the same gradient if requested.

    The cached one runs twice, to test that its first run does not affect the second.
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
    """Compute the mean loss and its gradient as one vector. Existing gradients of the parameters are preserved."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    loss = forward.losses().mean()
    torch.autograd.backward(loss)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter, gradient in zip(parameters, before, strict=True):
        parameter.grad = gradient
    return loss.item(), torch.cat([part.detach().flatten().float().cpu() for part in parts])


def _require_small(what: str, difference: float, size: float, model: PeftModel) -> None:
    """Raise CacheDiffers if a difference is larger than rounding explains for a quantity of this size."""
    dtype = torch.float32
    for parameter in model.get_base_model().parameters():
        if parameter.is_floating_point():
            dtype = parameter.dtype
            break
    tolerance = max(TOLERANCE, ROUNDINGS * torch.finfo(dtype).eps)
    if not difference <= tolerance * size:
        raise CacheDiffers(
            f"the {what} of its first step is off by {difference:.2g}, where the {what}'s size is {size:.2g}"
        )
