"""Turn (prompt, answer) texts into padded batches whose labels mark the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peft_baft.data.cases import Prompt, prompt_words
from peft_baft.data.templates import RAW, Rendering, Template, chat_prompt, chat_turn, is_chat
from peft_baft.span import IGNORED_LABEL

RAW_END = "\n"  # what ends an answer in raw text, where it is learned
# Under these names configs say how many tokens a model reads: most, MPT and DBRX, Whisper and other decoders of speech.
WINDOW_NAMES = ("max_position_embeddings", "max_seq_len", "max_target_positions")


@dataclass(frozen=True)
class Tokens:
    """A prompt and the reply to it as token ids.

    Attributes:
        ids: prompt, reply and, where it is learned, the reply's end.
        prompt_length: `ids[:prompt_length]` is the prompt with its special tokens.
        lead: tokens of the reply before the answer, such as a template's empty thinking block; they are no part of a score.
    """

    ids: tuple[int, ...]
    prompt_length: int
    lead: int = 0


def encode(
    tokenizer: Any, prompt: Prompt, answer: str, *, template: Template = RAW, end: bool = False
) -> Tokens:
    """Tokenise a prompt and its answer once, jointly, and split where the reply begins.

    White space around the prompt and around the answer is dropped first. In raw text exactly one space joins them; in a chat
    nothing is put between the template's own text and the reply, nor is anything taken from it. A token that reaches over the
    join counts to the answer. The tokenizer's special tokens before the text count to the prompt; those behind it are left out.

    Args:
        template: the form in which the prompt is put to the model.
        end: add the reply's end: what ends the assistant's turn in a chat, a line break in raw text.

    Raises:
        TypeError: the tokenizer cannot tell which characters a token stands for (it is a slow one).
        ValueError: no token is left for the prompt or for the answer; or as `chat_turn`.
    """
    answer, chat = answer.strip(), is_chat(prompt, template)
    if chat:
        turn = chat_turn(tokenizer, prompt, answer, template.options)
    else:
        assert isinstance(prompt, str)
        turn = Rendering(prompt.strip(), " ", answer, RAW_END)
    text = turn.prompt + turn.before + turn.answer
    ids, ends = _tokens_and_ends(tokenizer, text, template=chat)
    start = _first_after(ends, len(turn.prompt))
    if not any(ends[:start]):
        raise ValueError(
            f"The prompt {prompt!r:.60} gives no token with this tokenizer; write it in other words."
        )
    if not any(position > len(turn.prompt) + len(turn.before) for position in ends):
        raise ValueError(
            f"The target {answer!r:.60} gives no token with this tokenizer; write it in other words."
        )
    # White space alone before the answer belongs to it, as the space of raw text does.
    lead = _first_after(ends, len(turn.prompt + turn.before)) if turn.before.strip() else start
    if end:
        ids += _end_tokens(tokenizer, text, turn.end, ids, chat)
    return Tokens(ids, start, lead - start)


def encode_prompt(tokenizer: Any, prompt: Prompt, *, template: Template = RAW) -> Tokens:
    """Tokenise the prompt alone, as `encode` would begin with it; its answer is empty."""
    text = prompt_text(tokenizer, prompt, template=template)
    ids, _ = _tokens_and_ends(tokenizer, text, template=is_chat(prompt, template))
    return Tokens(ids, len(ids))


def last_token_of(tokenizer: Any, prompt: Prompt, words: str, *, template: Template = RAW) -> int:
    """Find the token of a prompt in which some of its words end; where they stand several times, the last time.

    Raises:
        ValueError: the words do not stand in the text that the model gets.
    """
    text = prompt_text(tokenizer, prompt, template=template)
    start = text.rfind(words)
    if start < 0:
        raise ValueError(
            f"{words!r:.60} does not stand in the prompt {prompt_words(prompt)!r:.60}."
        )
    _, ends = _tokens_and_ends(tokenizer, text, template=is_chat(prompt, template))
    return _first_after(ends, start + len(words) - 1)


def tokens_around(
    tokenizer: Any, words: str, *, template: Template
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find the tokens of a prompt before a user's words and behind them, as far as they hold nothing of these."""
    text = prompt_text(tokenizer, words, template=template)
    ids, ends = _tokens_and_ends(tokenizer, text, template=is_chat(words, template))
    start = text.rfind(words)
    first, last = _first_after(ends, start), _first_after(ends, start + len(words) - 1)
    return ids[:first], ids[last + 1 :]


def prompt_text(tokenizer: Any, prompt: Prompt, *, template: Template = RAW) -> str:
    """Give the text that a model gets for a prompt, its chat template included."""
    if is_chat(prompt, template):
        return chat_prompt(tokenizer, prompt, template.options)
    assert isinstance(prompt, str)
    return prompt.strip()


def encode_fitting(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    answer: str,
    *,
    template: Template = RAW,
    end: bool = False,
) -> Tokens:
    """Do as `encode`, with a ValueError if the text is longer than the model's context window."""
    row = encode(tokenizer, prompt, answer, template=template, end=end)
    window = context_window(model)
    if window is not None and len(row.ids) > window:
        raise ValueError(
            f"{prompt_words(prompt)[:40]!r}… has {len(row.ids)} tokens with its answer, but the model reads at most {window}."
        )
    return row


def _first_after(ends: Sequence[int], position: int) -> int:
    """Find the first token that ends behind a character."""
    return next((i for i, end in enumerate(ends) if end > position), len(ends))


def _end_tokens(
    tokenizer: Any, text: str, end: str, ids: tuple[int, ...], chat: bool
) -> tuple[int, ...]:
    """Find the tokens that end a reply: those of the text `end`, up to the first special one.

    A chat template that ends a turn with no special token leaves it to the model's end-of-sequence token.
    """
    whole, _ = _tokens_and_ends(tokenizer, text + end, template=chat)
    tokens = whole[len(ids) :]
    if whole[: len(ids)] != ids:
        # A tokenizer may join the answer's last character and the end to one token. The answer is scored without its end, and
        # so is learned as it is scored: its tokens stay, and those of the end follow them.
        tokens, _ = _tokens_and_ends(tokenizer, end, template=True)
    if not chat:
        return tokens
    special = special_ids(tokenizer)
    for number, token in enumerate(tokens):
        if token in special:
            return tokens[: number + 1]
    if tokenizer.eos_token_id is not None:
        return (tokenizer.eos_token_id,)
    return tokens[:1]


def special_ids(tokenizer: Any) -> set[int]:
    """List a tokenizer's special tokens, those included that it was given as such, as the end of a turn may be."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {
        *tokenizer.all_special_ids,
        *(number for number, token in added.items() if token.special),
    }


def require_fast(tokenizer: Any) -> None:
    """Raise a TypeError unless a tokenizer can tell which characters a token stands for."""
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"Wanted the model's fast tokenizer, as AutoTokenizer loads it, not {type(tokenizer).__name__}, which is none or a "
            "slow tokenizer. Of a processor, pass its `tokenizer`."
        )


def _tokens_and_ends(
    tokenizer: Any, text: str, template: bool
) -> tuple[tuple[int, ...], list[int]]:
    """Tokenise to ids, and for each the character it ends before (0 for special ones); those behind the text are left out.

    template: the text holds its special tokens already, so none are added and those in it count as text.
    """
    require_fast(tokenizer)
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
    windows = [getattr(config, name, None) for name in WINDOW_NAMES]
    return next((window for window in windows if isinstance(window, int) and window > 0), None)
