"""One running `generate`: where its prompt lies, and which forwards are steps of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peft_baft.adapter.model_call import StackCall, cached_columns
from peft_baft.span import OUTSIDE, GenerationSpan


@dataclass
class Generation:
    """One running `generate`.

    While it runs, a logits processor, a stopping criterion or a streamer may call the model on other texts. A forward is a step
    of the generation if it reads the generation's cache, or, where there is no cache, if its tokens go on from those that were
    read; any other forward is a call of its own.

    Attributes:
        span: where its prompt lies. seen: how many columns its forwards have passed so far.
        text_span: the same where a prompt that goes on with a chat counts as a new prompt, as for those who read texts.
        prompt: (rows, columns) ids, or (rows, columns, d) embeddings. real: (rows, columns) bool, False for padding.
        cached: columns that were in the cache before. cache: what holds the tokens read so far; None while there is none.
        uses_cache: whether `generate` was not told to do without.
        returned: caches that the last step gave back, for models that make their own.
        begun: whether a first step has run.
        whole: (rows, columns) ids of everything before the next step and in it, as `generate` prepared them; None before.
    """

    span: GenerationSpan
    seen: int
    text_span: GenerationSpan
    prompt: Tensor
    real: Tensor
    cached: int = 0
    cache: Any = None
    returned: list[Any] = field(default_factory=list)
    uses_cache: bool = True
    begun: bool = False
    whole: Tensor | None = None
    _prompt_texts: list[tuple[tuple[int, ...], tuple[int, ...], dict]] = field(default_factory=list)

    def has_step(self, call: StackCall) -> bool:
        """Return whether a forward is a step of this generation, and not a call of its own on another text."""
        if torch.compiler.is_compiling():
            return True  # tensors have no values to compare; a compiled forward is the generation's own
        if self.begun and call.cache is not None:
            if any(call.cache is cache for cache in (self.cache, *self.returned)):
                return True
            # What ran before without a cache was another call on the same prompt: the first step comes only now.
            self.begun = self.cache is not None or bool(cached_columns(call.cache) != 0)
            if self.begun:
                return False
            self.seen = self.cached
        if self.cache is not None and self.cache is not call.cache:
            return False
        # Where a cache should be and none was seen, what a forward goes on from is hidden: `columns_before_in_generate` raises.
        return self._reads_prompt(call.tokens) or (self.begun and self.uses_cache)

    def note_step(self, call: StackCall) -> None:
        """Remember the cache that a step reads."""
        self.begun = True
        if call.cache is not None:
            self.cache = call.cache

    def note_output(self, caches: Iterable[Any]) -> None:
        """Remember the caches that a step gives back."""
        self.returned = list(caches)

    def prompt_texts(self) -> list[tuple[tuple[int, ...], tuple[int, ...], dict]]:
        """Return ids of each prompt and of the reply that it begins, if a shorter prompt was stated, and notes about it."""
        if not self._prompt_texts:
            columns = self.text_span.relative_positions(0, *self.prompt.shape[:2])
            for ids, positions in zip(self.prompt.tolist(), columns.tolist(), strict=True):
                from_prompt = tuple(
                    i for i, p in zip(ids, positions, strict=True) if OUTSIDE < p < 0
                )
                begun = tuple(i for i, p in zip(ids, positions, strict=True) if p >= 0)
                self._prompt_texts.append((from_prompt, begun, {}))
        return self._prompt_texts

    def _reads_prompt(self, tokens: Tensor) -> bool:
        """Return whether tokens are the beginning of what is to be read, or all of it and what was generated or guessed."""
        prompt = self.prompt[:, self.cached :]
        rows, width = tokens.shape[:2]
        if self.begun and width + self.cached <= self.seen:
            return False
        if rows % len(prompt):
            return False
        if tokens.ndim != prompt.ndim:
            return True  # the model embeds the prompt before its stack of blocks sees it
        shared = min(width, prompt.shape[1])
        wanted = prompt[:, :shared].repeat_interleave(rows // len(prompt), 0)
        return torch.equal(tokens[:, :shared], wanted.to(tokens))
