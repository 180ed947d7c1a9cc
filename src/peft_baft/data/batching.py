"""Turn (prompt, answer) texts into padded batches whose labels mark the answers."""

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


def encode(tokenizer: Any, prompt: str, answer: str, *, chat: bool = False) -> Tokens:
    """Tokenise `prompt + " " + answer` once, jointly, and split where the answer begins.

    White space around the prompt and around the answer is dropped first, so that exactly one space joins them. A token
    that reaches over the join counts to the answer. The tokenizer's special tokens before the text count to the prompt;
    those behind it are left out.

    Args:
        chat: put the prompt into the tokenizer's chat template, as a user's message; the answer then begins the reply
            and no space is put before it.

    Raises:
        TypeError: the tokenizer cannot tell which characters a token stands for (it is a slow one).
        ValueError: no token is left for the prompt or for the answer, or there is no chat template.
    """
    answer = answer.strip()
    if chat:
        prompt, gap = in_chat(tokenizer, prompt), ""
    else:
        prompt, gap = prompt.strip(), " "
    ids, ends = _tokens_and_ends(tokenizer, f"{prompt}{gap}{answer}", template=chat)
    start = next((i for i, end in enumerate(ends) if end > len(prompt)), len(ends))
    if not any(ends[:start]):
        raise ValueError(
            f"The prompt {prompt!r:.60} gives no token with this tokenizer; write it in other words."
        )
    if not any(end > len(prompt) + len(gap) for end in ends):
        raise ValueError(
            f"The target {answer!r:.60} gives no token with this tokenizer; write it in other words."
        )
    return Tokens(ids, start)


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool = False) -> Tokens:
    """Tokenise the prompt alone, as `encode` would begin with it; its answer is empty."""
    text = in_chat(tokenizer, prompt) if chat else prompt.strip()
    ids, _ = _tokens_and_ends(tokenizer, text, template=chat)
    return Tokens(ids, len(ids))


def encode_fitting(
    model: Any, tokenizer: Any, prompt: str, answer: str, *, chat: bool = False
) -> Tokens:
    """Do as `encode`, with a ValueError if the text is longer than the model's context window."""
    row = encode(tokenizer, prompt, answer, chat=chat)
    window = context_window(model)
    if window is not None and len(row.ids) > window:
        raise ValueError(
            f"{prompt[:40]!r}… has {len(row.ids)} tokens with its answer, but the model reads at most {window}."
        )
    return row


def in_chat(tokenizer: Any, prompt: str) -> str:
    """Put the prompt as a user's message into the tokenizer's chat template, up to where the reply begins.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("This tokenizer has no chat template; ask with raw text instead.")
    message = [{"role": "user", "content": prompt.strip()}]
    return tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)


def _tokens_and_ends(
    tokenizer: Any, text: str, template: bool
) -> tuple[tuple[int, ...], list[int]]:
    """Tokenise to ids, and for each the character it ends before (0 for special ones); those behind the text are left out.

    template: the text holds its special tokens already, so none are added and those in it count as text.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{type(tokenizer).__name__} is a slow tokenizer; load the model's fast one (AutoTokenizer does)."
        )
    encoded = tokenizer(
        text,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
        add_special_tokens=not template,
    )
    ends = [
        0 if special and not template else end
        for special, (_, end) in zip(
            encoded["special_tokens_mask"], encoded["offset_mapping"], strict=True
        )
    ]
    stop = max((i + 1 for i, end in enumerate(ends) if end), default=0)
    return tuple(encoded["input_ids"][:stop]), ends[:stop]


def collate(rows: Sequence[Tokens], pad_token_id: int, side: str = "right") -> dict[str, Tensor]:
    """Pad to one length, on the right, or on the left to generate.

    Returns:
        input_ids, attention_mask, labels: (rows, longest) long; labels are -100 but on answer tokens.
    """
    width = max(len(row.ids) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for i, row in enumerate(rows):
        first = width - len(row.ids) if side == "left" else 0
        input_ids[i, first : first + len(row.ids)] = torch.tensor(row.ids)
        mask[i, first : first + len(row.ids)] = 1
        answer = slice(first + row.prompt_length, first + len(row.ids))
        labels[i, answer] = input_ids[i, answer]
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels}


def padding_id(tokenizer: Any) -> int:
    """Choose a token id to pad with; any will do, since the mask marks padding and nothing here infers it from ids."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def context_window(model: Any) -> int | None:
    """Look up how many tokens the model can read, by its config; None if that does not say."""
    config = (
        model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    )
    return getattr(config, "max_position_embeddings", None)
