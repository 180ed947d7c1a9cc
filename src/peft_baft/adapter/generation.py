"""A running `generate`: where its prompt ends, and which forwards are steps of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from peft_baft.adapter.model_call import StackCall, cached_columns
from peft_baft.span import OUTSIDE, GenerationSpan

PromptText = tuple[tuple[int, ...], tuple[int, ...], dict[Any, Any]]


@dataclass
class Generation:
    """A running `generate`.

    While it runs, a logits processor, a stopping criterion or a streamer may call the model on other texts. A forward is a step
    of the generation if it reads the generation's cache, or, without a cache, if its tokens continue those processed so far.
    Any other forward is a separate call.

    Attributes:
        span: where the prompt ends. seen: the number of columns that the steps have processed so far.
        text_span: the same for readers of texts, to whom the prompt of a chat that is continued is all of the chat.
        prompt: (rows, columns) ids, or (rows, columns, d) embeddings. real: (rows, columns) bool, False for padding.
        cached: the number of columns that were cached beforehand. cache: the cache in use; None until there is one.
        uses_cache: whether `generate` was called with a cache enabled.
        returned: the caches that the last step returned, for models that create their own.
        begun: whether a first step has run.
        ids_so_far: (rows, columns) ids of the next step and of everything before it, as `generate` prepared them.
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
    ids_so_far: Tensor | None = None
    _prompt_texts: list[PromptText] = field(default_factory=list)

    def has_step(self, call: StackCall) -> bool:
        """Return whether a forward is a step of this generation, and not a separate call on another text."""
        if torch.compiler.is_compiling():
            return True  # there are no values to compare; a compiled forward is always a step
        if self.begun and call.cache is not None:
            if any(call.cache is cache for cache in (self.cache, *self.returned)):
                return True
            # What ran before, without a cache, was another call on the same prompt: the first step is this one.
            self.begun = self.cache is not None or bool(cached_columns(call.cache) != 0)
            if self.begun:
                return False
            self.seen = self.cached
        if self.cache is not None and self.cache is not call.cache:
            return False
        # If there should be a cache and none was found, the earlier tokens are unknown: `columns_before_in_generate` raises.
        return self._reads_prompt(call.tokens) or (self.begun and self.uses_cache)

    def note_step(self, call: StackCall) -> None:
        """Record the cache that a step reads."""
        self.begun = True
        if call.cache is not None:
            self.cache = call.cache

    def note_output(self, caches: Iterable[Any]) -> None:
        """Record the caches that a step returns."""
        self.returned = list(caches)

    def prompt_texts(self) -> list[PromptText]:
        """Return, for each prompt, its ids, those of the reply that it begins (if a shorter prompt was stated), and notes."""
        if not self._prompt_texts:
            columns = self.text_span.relative_positions(0, *self.prompt.shape[:2])
            for ids, positions in zip(self.prompt.tolist(), columns.tolist(), strict=True):
                prompt = tuple(i for i, p in zip(ids, positions, strict=True) if OUTSIDE < p < 0)
                reply = tuple(i for i, p in zip(ids, positions, strict=True) if p >= 0)
                self._prompt_texts.append((prompt, reply, {}))
        return self._prompt_texts

    def _reads_prompt(self, tokens: Tensor) -> bool:
        """Return whether tokens begin the prompt that is still to be read, or are all of it with further tokens."""
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
