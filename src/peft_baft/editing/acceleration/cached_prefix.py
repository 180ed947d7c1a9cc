"""Loss computation with a cache of the tokens before the last P prompt tokens, which an adapter never edits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_baft.adapter import EditContext, baft_layers, find_context
from peft_baft.data.batching import Tokens, collate
from peft_baft.editing.acceleration.packed_linear import packed_forwards
from peft_baft.editing.acceleration.padding import forwards_without_padding
from peft_baft.editing.answers import AnswerTargets, stated_lengths
from peft_baft.editing.edit_cache import EditCache
from peft_baft.editing.module_patches import (
    FixedBlocks,
    at_least_four,
    logits_only_at,
    no_logits,
    replaced_forwards,
)
from peft_baft.editing.repeated_texts import RepeatedTexts
from peft_baft.losses import answer_losses
from peft_baft.running import call_with_cache, fork, input_device, select_rows, takes_position_ids


@dataclass(frozen=True)
class CachedPrefix:
    """An `AnswerForward` that only computes the last P prompt tokens and the answers, with a cache of the tokens before.

    In addition, it computes logits only where an answer token is predicted, and runs the blocks up to the first edited one
    only once: their outputs do not depend on the adapter.

    Attributes:
        context: the edit context of the model's BaFT adapters. targets: the tokens that are trained.
        inputs: the arguments of the model at each step.
        cache: the keys and values of the tokens before. prefix_width: its number of columns.
        places: where logits are computed; at least the places of the targets.
        packed: forwards with packed weights by linear layer. forwards: those, and forwards that skip padding.
        fixed: the blocks up to the first edited one.
    """

    model: PeftModel
    context: EditContext | None
    targets: AnswerTargets
    inputs: Mapping[str, Tensor]
    cache: Any
    prefix_width: int
    places: tuple[Tensor, ...]
    packed: Mapping[nn.Module, Callable[..., Any]]
    forwards: Mapping[nn.Module, Callable[..., Any]]
    fixed: FixedBlocks

    @classmethod
    def build(
        cls,
        model: PeftModel,
        rows: Sequence[Tokens],
        learned: Sequence[int],
        padding: int,
        device: torch.device,
        prompt_positions: int,
        prepared: EditCache | None = None,
    ) -> CachedPrefix:
        """Compute the cache of the tokens before the edited ones.

        Args:
            prompt_positions: P, the number of last prompt tokens that are edited. At least one prompt must be longer.
            prepared: the `EditCache` of the base model; by default the one stored for this model.

        Raises:
            NotImplementedError: the model has no cache.
        """
        base: Any = model.get_base_model()
        context = find_context(model)
        cuts = [max(0, row.prompt_length - prompt_positions) for row in rows]
        prefix_inputs, inputs = split_batch(base, rows, cuts, padding, device)
        prefix_width, width = (part["input_ids"].shape[1] for part in (prefix_inputs, inputs))
        targets = AnswerTargets.of(rows, learned, cuts, width, device)
        packed = packed_forwards(base.modules(), (prepared or EditCache.of(model)).packed)
        real_prefix = inputs["attention_mask"][:, :prefix_width].bool()
        real_end = inputs["attention_mask"][:, prefix_width:].bool()
        with (
            torch.no_grad(),
            stated_lengths(context, targets),
            no_logits(base),
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
            fixed=FixedBlocks(blocks_up_to_first_edited(model)),
        )

    def losses(self) -> Tensor:
        """Compute the cross entropy of each trained answer token, (n,)."""
        base: Any = self.model.get_base_model()
        # A forward pass appends its tokens to the fork; the stored cache stays unchanged.
        cache = fork(self.cache)
        with (
            stated_lengths(self.context, self.targets),
            logits_only_at(base.get_output_embeddings(), self.places),
            replaced_forwards(self.forwards),
            self.fixed.run_once(),
        ):
            logits, _ = call_with_cache(self.model, base, self.inputs, cache)
        if len(logits) != len(self.targets.tokens):
            logits = logits[: len(self.targets.tokens)]  # the others repeat the first place
        return answer_losses(logits, self.targets.tokens.to(logits.device))

    def select_rows(self, chosen: Sequence[int]) -> CachedPrefix:
        """Return the computation for some of the rows, without recomputing the cache."""
        index = torch.tensor(chosen, device=self.targets.tokens.device)
        targets = self.targets.select_rows(chosen, self.targets.width)
        inputs = {name: tensor[index] for name, tensor in self.inputs.items()}
        real = inputs["attention_mask"][:, self.prefix_width :].bool()
        return replace(
            self,
            targets=targets,
            inputs=inputs,
            cache=select_rows(self.cache, index),
            places=at_least_four(targets.places),
            forwards=forwards_without_padding(self.model.get_base_model(), real, self.packed),
            fixed=self.fixed.select_rows(index),
        )


def blocks_up_to_first_edited(model: PeftModel) -> list[nn.Module]:
    """List the blocks up to and including the first one that a BaFT adapter edits; none if they are not in one list.

    The first edited block is included because the adapter changes its output after it has run.
    """
    names = [layer.name.rpartition(".") for layer in baft_layers(model)]
    one_list = len({stack for stack, _, _ in names}) == 1
    if not one_list or not all(number.isdigit() for _, _, number in names):
        return []
    stack: Any = model.get_base_model().get_submodule(names[0][0])
    first_edited = min(int(number) for _, _, number in names)
    return list(stack)[: first_edited + 1]


def split_batch(
    model: nn.Module,
    rows: Sequence[Tokens],
    cuts: Sequence[int],
    padding: int,
    device: torch.device,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Collate the first `cuts[i]` tokens of each row, and its remaining tokens, as the inputs of two calls of a model.

    The first parts are padded on the left, so that in the cache the second part directly follows the first. The attention
    mask of the second call covers both. Position ids are added if the model takes them.
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
        # By default the model would count the padding on the left as positions.
        position = (mask.cumsum(1) - 1).clamp(min=0)
        width = prefix_mask.shape[1]
        first["position_ids"], second["position_ids"] = position[:, :width], position[:, width:]
    return first, second


def with_cache(
    whole: RepeatedTexts, rows: Sequence[Tokens], cuts: Sequence[int], padding: int
) -> RepeatedTexts:
    """Put the first `cuts[i]` tokens of each row into a cache.

    Raises:
        NotImplementedError: the model has no cache.
    """
    model = whole.model
    before, inputs = split_batch(model, rows, cuts, padding, input_device(model))
    with torch.no_grad(), no_logits(model):
        _, cache = call_with_cache(model, model, before)
    numbers, columns = whole.read
    return replace(
        whole,
        inputs=inputs,
        cuts=tuple(cuts),
        read=(numbers, columns - torch.tensor(cuts)[numbers]),
        fixed=FixedBlocks(whole.fixed.blocks),
        cache=cache,
    )
