"""Texts that a model processes repeatedly while something in its later blocks changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_baft.data.batching import Tokens, collate, padding_id
from peft_baft.editing.module_patches import FixedBlocks, at_least_four, logits_only_at
from peft_baft.running import call_with_cache, fork, full_logits, input_device, select_rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Places = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class RepeatedTexts:
    """Texts, or their last tokens where the first ones are in a cache.

    Attributes:
        inputs: the arguments of the model. cuts: the number of each row's tokens that are in the cache.
        read: rows (n,), ascending, and columns (n,) of the logits that are computed; columns count from the first input.
        fixed: the blocks that run only once.
        cache: the cache of the first tokens; None if the texts are whole.
    """

    model: PreTrainedModel
    inputs: dict[str, Tensor]
    cuts: tuple[int, ...]
    read: Places
    fixed: FixedBlocks
    cache: Any = None

    @classmethod
    def whole(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[Tokens],
        read: Places,
        fixed_blocks: Sequence[nn.Module],
    ) -> RepeatedTexts:
        """Return the texts without a cache. fixed_blocks: the first blocks of the model, whose outputs cannot change."""
        device, batch = input_device(model), collate(rows, padding_id(tokenizer))
        inputs = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        return cls(model, inputs, (0,) * len(rows), read, FixedBlocks(fixed_blocks))

    def logits(self) -> Tensor:
        """Compute the logits at the places to read, (n, vocabulary)."""
        head = self.model.get_output_embeddings()
        with self.fixed.run_once(), logits_only_at(head, at_least_four(self.read)):
            if self.cache is None:
                logits = full_logits(self.model, **self.inputs)
            else:
                # A forward pass appends its tokens to the fork; the stored cache stays unchanged.
                cache = fork(self.cache)
                logits, _ = call_with_cache(self.model, self.model, self.inputs, cache)
        return logits[: len(self.read[0])]

    def select(self, chosen: Sequence[int]) -> RepeatedTexts:
        """Return some of the rows."""
        counts = self.read[0].bincount(minlength=len(self.cuts)).tolist()
        columns = torch.split(self.read[1], counts)
        numbers = torch.arange(len(chosen)).repeat_interleave(
            torch.tensor([counts[row] for row in chosen])
        )
        index = torch.tensor(list(chosen), device=self.inputs["input_ids"].device)
        return replace(
            self,
            inputs={name: part[index] for name, part in self.inputs.items()},
            cuts=tuple(self.cuts[row] for row in chosen),
            read=(numbers, torch.cat([columns[row] for row in chosen])),
            fixed=self.fixed.select_rows(index),
            cache=None if self.cache is None else select_rows(self.cache, index),
        )
