"""(prompt, answer) texts to padded batches whose labels mark the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_baft.span import IGNORED_LABEL


@dataclass(frozen=True)
class Tokens:
    """A prompt and its answer as token ids; `ids[:prompt_length]` is the prompt with its special tokens."""

    ids: tuple[int, ...]
    prompt_length: int


def encode(tokenizer: Any, prompt: str, answer: str) -> Tokens:
    """Tokenise `prompt + " " + answer` once, jointly, and split where the answer begins.

    White space around the prompt and around the answer is dropped first, so that exactly one space joins them. A token
    that reaches over the join counts to the answer. The tokenizer's special tokens before the text count to the prompt;
    those behind it are left out.

    Raises:
        TypeError: the tokenizer cannot tell which characters a token stands for (it is a slow one).
        ValueError: no token is left for the prompt or for the answer.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{type(tokenizer).__name__} is a slow tokenizer; load the model's fast one (AutoTokenizer does)."
        )
    prompt, answer = prompt.strip(), answer.strip()
    text = f"{prompt} {answer}"
    encoded = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
    ends = [
        0 if special else end
        for special, (_, end) in zip(encoded["special_tokens_mask"], encoded["offset_mapping"], strict=True)
    ]
    stop = max((i + 1 for i, end in enumerate(ends) if end), default=0)
    start = next((i for i, end in enumerate(ends) if end > len(prompt)), stop)
    if not any(ends[:start]):
        raise ValueError(f"The prompt {prompt!r:.60} gives no token with this tokenizer; write it in other words.")
    if not any(end > len(prompt) + 1 for end in ends):
        raise ValueError(f"The target {answer!r:.60} gives no token with this tokenizer; write it in other words.")
    return Tokens(tuple(encoded["input_ids"][:stop]), start)


def collate(rows: Sequence[Tokens], pad_token_id: int) -> dict[str, Tensor]:
    """Pad to one length, on the right.

    Returns:
        input_ids, attention_mask, labels: (rows, longest) long; labels are -100 but on answer tokens.
    """
    width = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for i, row in enumerate(rows):
        input_ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
        labels[i, row.prompt_length : len(row.ids)] = torch.tensor(row.ids[row.prompt_length :])
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def padding_id(tokenizer: Any) -> int:
    """A token id to pad with; any will do, since the mask marks padding and nothing here infers it from ids."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def context_window(model: Any) -> int | None:
    """How many tokens the model can read, by its config; None if that does not say."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    return getattr(config, "max_position_embeddings", None)
