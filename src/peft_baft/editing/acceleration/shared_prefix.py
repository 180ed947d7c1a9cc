"""Answering of prompts in batches, where a common prefix, such as that of a chat template, is computed only once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_baft.adapter.blocks import attention_window
from peft_baft.data.batching import Tokens, collate
from peft_baft.editing.acceleration.packed_linear import packed_forwards
from peft_baft.editing.acceleration.padded_prompts import takes_left_padding
from peft_baft.editing.acceleration.padding import forwards_without_padding
from peft_baft.editing.edit_cache import EditCache
from peft_baft.editing.module_patches import no_logits, replaced_forwards
from peft_baft.running import (
    cache_parameter,
    call_with_cache,
    generate_greedily,
    generates_with_cache,
    has_attention_layers_only,
    input_device,
    select_rows,
    takes_position_ids,
)

PackedForwards = Mapping[nn.Module, Callable[..., Any]]
BATCH_SIZE = 64  # prompts that are answered together
SHORTEST = 8  # tokens of a prefix below which its own forward pass does not pay off


@dataclass(frozen=True)
class SharedPrefix:
    """Tokens with which several texts begin, and their cache.

    Attributes:
        ids: the tokens; empty if nothing is shared. cache: keys and values, of one row.
    """

    ids: tuple[int, ...] = ()
    cache: Any = None

    @classmethod
    def of(cls, model: PeftModel, ids: tuple[int, ...], packed: PackedForwards) -> SharedPrefix:
        """Compute the cache of a prefix. The prefix is empty for a recurrent model, whose state cannot be masked out."""
        base: Any = model.get_base_model()
        inputs = {"input_ids": torch.tensor([ids], device=input_device(model))}
        with torch.no_grad(), replaced_forwards(packed), no_logits(base):
            _, cache = call_with_cache(model, base, inputs)
        return cls(ids, cache) if has_attention_layers_only(cache) else cls()


@dataclass(frozen=True)
class PromptBatch:
    """A batch of prompts to be answered, some of which begin with a shared prefix.

    Attributes:
        begins: (rows,) bool, whether a prompt begins with the prefix.
        ids, mask: (rows, tokens), padded on the left: the prompts, without the prefix where they begin with it.
    """

    prefix: SharedPrefix
    begins: Tensor
    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Tokens], padding: int, prefix: SharedPrefix) -> PromptBatch:
        """Remove the prefix from the prompts that begin with it."""
        rests = [without_prefix(prefix.ids, prompt) for prompt in prompts]
        begins = [len(rest) < len(prompt.ids) for rest, prompt in zip(rests, prompts, strict=True)]
        batch = collate([Tokens(rest, len(rest)) for rest in rests], padding, side="left")
        return cls(prefix, torch.tensor(begins), batch["input_ids"], batch["attention_mask"])

    def answers(
        self, model: PeftModel, padding: int, max_new_tokens: int, packed: PackedForwards
    ) -> Tensor:
        """Decode (rows, up to `max_new_tokens`) new tokens greedily."""
        base, device = model.get_base_model(), input_device(model)
        ids, mask = self.ids, self.mask
        past: dict[str, Any] = {}
        if self.prefix.ids:
            rows = len(ids)
            first_row = torch.zeros(rows, dtype=torch.long, device=device)
            past[cache_parameter(base)] = select_rows(self.prefix.cache, first_row)
            before = torch.tensor(self.prefix.ids).expand(rows, -1)
            ids = torch.cat([before, ids], 1)
            mask = torch.cat([self.begins[:, None].expand_as(before).to(mask), mask], 1)
        real = self.mask.to(device).bool()
        with replaced_forwards(forwards_without_padding(base, real, packed)):
            return generate_greedily(model, ids, mask, padding, max_new_tokens, **past)


def padded_batches(
    model: PeftModel,
    block: nn.Module,
    prompts: Sequence[Tokens],
    padding: int,
    prompt_positions: int,
    prepared: EditCache,
) -> Iterator[tuple[Tensor, Callable[[int], Tensor]]]:
    """Yield the batches of `fast_paths.prompt_batches`: several prompts each where the model supports left padding."""
    packed = packed_forwards(model.get_base_model().modules(), prepared.packed)
    prefix, size = SharedPrefix(), 1
    if takes_left_padding(model, block, prompts, padding, prompt_positions, prepared):
        size = BATCH_SIZE
        ids = find_prefix(model, prompts, prompt_positions, prepared.verified_length)
        if ids:
            prefix = SharedPrefix.of(model, ids, packed)
    for start in range(0, len(prompts), size):
        batch = PromptBatch.of(prompts[start : start + size], padding, prefix)
        yield batch.mask, partial(batch.answers, model, padding, packed=packed)


def without_prefix(prefix: tuple[int, ...], prompt: Tokens) -> tuple[int, ...]:
    """Return a prompt's tokens after a prefix; all of them if it does not begin with the prefix."""
    begins = prompt.ids[: len(prefix)] == prefix
    return prompt.ids[len(prefix) :] if begins else prompt.ids


def find_prefix(
    model: PeftModel, prompts: Sequence[Tokens], own: int, verified: int
) -> tuple[int, ...]:
    """Find the tokens with which at least half of the prompts begin; empty if sharing them saves nothing or is not safe.

    With a prefix, shorter prompts have padding in the middle. Therefore the model must take position ids, and the attention
    window, which is counted in columns, must cover the whole batch.

    Args:
        own: the number of a prompt's last tokens that are never shared.
        verified: the length up to which this model's cache was verified (`EditCache`).
    """
    base = model.get_base_model()
    if len(prompts) < 2 or not takes_position_ids(base) or not generates_with_cache(model):
        return ()
    # Sorted texts between two texts share the common prefix of these two.
    ordered = sorted(prompt.ids[: max(0, len(prompt.ids) - own)] for prompt in prompts)
    half = (len(ordered) + 1) // 2
    pairs = zip(ordered, ordered[half - 1 :], strict=False)
    prefix = max((_common_prefix(*pair) for pair in pairs), key=len)
    window = attention_window(base) or verified
    columns = len(prefix) + max(len(without_prefix(prefix, prompt)) for prompt in prompts)
    return prefix if len(prefix) >= SHORTEST and columns <= min(verified, window) else ()


def _common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    length = 0
    while length < min(len(a), len(b)) and a[length] == b[length]:
        length += 1
    return a[:length]
