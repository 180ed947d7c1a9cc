"""Texts that are put to a model again and again while something behind their first tokens changes.

What cannot change is computed once: the first tokens of each row, the blocks before the first changed one, and logits that
nobody reads. `CachedPrefix` does the same for BaFT adapters, with what these need besides.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from peft_baft.adapter.model_call import (
    call_with_cache,
    fork,
    full_logits,
    input_device,
    select_rows,
)
from peft_baft.data.batching import Tokens, collate, padding_id
from peft_baft.editing.acceleration.module_patches import (
    FixedBlocks,
    at_least_four,
    logits_only_at,
    no_logits,
    with_hidden,
)
from peft_baft.editing.acceleration.prefix_cache import split_batch

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
