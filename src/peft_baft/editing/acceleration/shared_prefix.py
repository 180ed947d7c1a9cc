"""Let a model answer texts that begin alike, as all questions in one chat template do: what they share is computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from peft_baft.adapter.blocks import attention_window
from peft_baft.data.batching import Tokens, collate
from peft_baft.editing.acceleration.module_patches import (
    forwards_without_padding,
    logits_only_at,
    replaced_forwards,
)
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
SHORTEST = 8  # a forward of its own does not pay for fewer tokens


@dataclass(frozen=True)
class SharedPrefix:
    """Tokens that stand at the beginning of several texts, and what later tokens need of them.

    Attributes:
        ids: the tokens; none where nothing is shared. cache: keys and values of one row.
    """

    ids: tuple[int, ...] = ()
    cache: Any = None

    @classmethod
    def of(cls, model: Any, ids: tuple[int, ...], packed: PackedForwards) -> SharedPrefix:
        """Run the tokens of a prefix; a recurrent model shares none, since other texts cannot leave out a state."""
        base, device = model.get_base_model(), input_device(model)
        nowhere = (torch.zeros(0, dtype=torch.long, device=device),) * 2  # nobody reads its logits
        inputs = {"input_ids": torch.tensor([ids], device=device)}
        with (
            torch.no_grad(),
            replaced_forwards(packed),
            logits_only_at(base.get_output_embeddings(), nowhere),
        ):
            _, cache = call_with_cache(model, base, inputs)
        return cls(ids, cache) if has_attention_layers_only(cache) else cls()


@dataclass(frozen=True)
class PromptBatch:
    """Prompts to be answered together, some of which begin with a prefix.

    Attributes:
        begins: (rows,) bool, which ones.
        ids, mask: (rows, tokens), padded on the left: what is left of those, and the others whole.
    """

    prefix: SharedPrefix
    begins: Tensor
    ids: Tensor
    mask: Tensor

    @classmethod
    def of(cls, prompts: Sequence[Tokens], padding: int, prefix: SharedPrefix) -> PromptBatch:
        """Take the prefix off the prompts that begin with it."""
        rests = [rest_behind(prefix.ids, prompt) for prompt in prompts]
        begins = [len(rest) < len(prompt.ids) for rest, prompt in zip(rests, prompts, strict=True)]
        batch = collate([Tokens(rest, len(rest)) for rest in rests], padding, side="left")
        return cls(prefix, torch.tensor(begins), batch["input_ids"], batch["attention_mask"])

    def answers(
        self, model: Any, padding: int, max_new_tokens: int, packed: PackedForwards
    ) -> Tensor:
        """Decode (rows, up to `max_new_tokens`) new tokens of each, greedily."""
        base, device = model.get_base_model(), input_device(model)
        ids, mask, given = self.ids, self.mask, {}
        if self.prefix.ids:
            rows = len(ids)
            first_row = torch.zeros(rows, dtype=torch.long, device=device)
            given[cache_parameter(base)] = select_rows(self.prefix.cache, first_row)
            before = torch.tensor(self.prefix.ids).expand(rows, -1)
            ids = torch.cat([before, ids], 1)
            mask = torch.cat([self.begins[:, None].expand_as(before).to(mask), mask], 1)
        real = self.mask.to(device).bool()
        with replaced_forwards(forwards_without_padding(base, real, packed)):
            return generate_greedily(model, ids, mask, padding, max_new_tokens, **given)


def rest_behind(prefix: tuple[int, ...], prompt: Tokens) -> tuple[int, ...]:
    """Give a prompt's tokens behind a prefix; all of them where it does not begin with it."""
    begins = prompt.ids[: len(prefix)] == prefix
    return prompt.ids[len(prefix) :] if begins else prompt.ids


def find_prefix(model: Any, prompts: Sequence[Tokens], own: int, verified: int) -> tuple[int, ...]:
    """Find the tokens with which at least half of the prompts begin; none where that saves nothing or may not be relied on.

    Behind a prefix shorter prompts are padded in their middle. So a model must take its positions from the caller, and an
    attention window, which is counted in columns, must hold everything.

    Args:
        own: how many of a prompt's last tokens are not shared.
        verified: up to how many tokens going on from a cache was found right with this model (`EditCache`).
    """
    base = model.get_base_model()
    if len(prompts) < 2 or not takes_position_ids(base) or not generates_with_cache(model):
        return ()
    # Of texts in alphabetical order, those in between begin as the first and the last do.
    ordered = sorted(prompt.ids[: max(0, len(prompt.ids) - own)] for prompt in prompts)
    half = (len(ordered) + 1) // 2
    pairs = zip(ordered, ordered[half - 1 :], strict=False)
    prefix = max((_common_beginning(*pair) for pair in pairs), key=len)
    window = attention_window(base) or verified
    columns = len(prefix) + max(len(rest_behind(prefix, prompt)) for prompt in prompts)
    return prefix if len(prefix) >= SHORTEST and columns <= min(verified, window) else ()


def _common_beginning(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    equal = takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))
    return tuple(token for token, _ in equal)
