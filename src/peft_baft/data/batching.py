"""Convert prompts and answers into padded batches whose labels mark the answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from peft_baft.data.cases import Prompt, prompt_words
from peft_baft.data.templates import RAW, Rendering, Template, chat_prompt, chat_turn, is_chat
from peft_baft.span import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RAW_END = "\n"  # the end of a trained answer in raw text
# Config fields with a model's maximum number of tokens: of most models, of MPT and DBRX, of Whisper and other speech decoders.
WINDOW_NAMES = ("max_position_embeddings", "max_seq_len", "max_target_positions")


@dataclass(frozen=True)
class Tokens:
    """A prompt and its reply as token ids.

    Attributes:
        ids: the prompt, the reply and, if it is trained, the end of the reply.
        prompt_length: `ids[:prompt_length]` is the prompt with its special tokens.
        lead: number of reply tokens before the answer, such as a template's empty thinking block. They are not scored.
    """

    ids: tuple[int, ...]
    prompt_length: int
    lead: int = 0


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    answer: str,
    *,
    template: Template = RAW,
    end: bool = False,
) -> Tokens:
    """Tokenise a prompt and its answer together, and find where the reply begins.

    White space around the prompt and around the answer is stripped first. In raw text exactly one space joins them; in a chat the
    reply directly follows the text of the template. A token that spans the boundary belongs to the answer. Special tokens that
    the tokenizer adds before the text belong to the prompt; those that it adds after the text are dropped.

    Args:
        template: the prompt format.
        end: add the end of the reply: what ends the assistant's turn in a chat, a line break in raw text.

    Raises:
        TypeError: the tokenizer is a slow one, which does not know the characters of a token.
        ValueError: the prompt or the answer has no tokens; or as `chat_turn`.
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
            f"The prompt {prompt!r:.60} has no tokens with this tokenizer; rephrase it."
        )
    if not any(position > len(turn.prompt) + len(turn.before) for position in ends):
        raise ValueError(
            f"The target {answer!r:.60} has no tokens with this tokenizer; rephrase it."
        )
    # White space before the answer belongs to the answer, like the space in raw text; other text before it does not.
    lead = _first_after(ends, len(turn.prompt + turn.before)) if turn.before.strip() else start
    if end:
        ids += _end_tokens(tokenizer, text, turn.end, ids, chat)
    return Tokens(ids, start, lead - start)


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, template: Template = RAW
) -> Tokens:
    """Tokenise only the prompt, as at the beginning of what `encode` returns; the answer is empty."""
    text = prompt_text(tokenizer, prompt, template=template)
    ids, _ = _tokens_and_ends(tokenizer, text, template=is_chat(prompt, template))
    return Tokens(ids, len(ids))


def last_token_of(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, words: str, *, template: Template = RAW
) -> int:
    """Return the index of the token in which the last occurrence of `words` in a prompt ends.

    Raises:
        ValueError: the words do not occur in the text that the model gets.
    """
    text = prompt_text(tokenizer, prompt, template=template)
    start = text.rfind(words)
    if start < 0:
        raise ValueError(
            f"{words!r:.60} does not occur in the prompt {prompt_words(prompt)!r:.60}."
        )
    _, ends = _tokens_and_ends(tokenizer, text, template=is_chat(prompt, template))
    return _first_after(ends, start + len(words) - 1)


def tokens_around(
    tokenizer: PreTrainedTokenizerBase, words: str, *, template: Template
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the tokens of a formatted prompt before and after the user's words, without tokens that overlap with these."""
    text = prompt_text(tokenizer, words, template=template)
    ids, ends = _tokens_and_ends(tokenizer, text, template=is_chat(words, template))
    start = text.rfind(words)
    first, last = _first_after(ends, start), _first_after(ends, start + len(words) - 1)
    return ids[:first], ids[last + 1 :]


def prompt_text(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, template: Template = RAW
) -> str:
    """Return the text that the model gets for a prompt, with the chat template if it is a chat."""
    if is_chat(prompt, template):
        return chat_prompt(tokenizer, prompt, template.options)
    assert isinstance(prompt, str)
    return prompt.strip()


def encode_fitting(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    answer: str,
    *,
    template: Template = RAW,
    end: bool = False,
) -> Tokens:
    """Call `encode`, and raise a ValueError if the text is longer than the model's context window."""
    row = encode(tokenizer, prompt, answer, template=template, end=end)
    window = context_window(model)
    if window is not None and len(row.ids) > window:
        raise ValueError(
            f"{prompt_words(prompt)[:40]!r}… has {len(row.ids)} tokens with its answer, but the model reads at most {window}."
        )
    return row


def _first_after(ends: Sequence[int], position: int) -> int:
    """Return the index of the first token that ends after a character position."""
    return next((i for i, end in enumerate(ends) if end > position), len(ends))


def _end_tokens(
    tokenizer: PreTrainedTokenizerBase, text: str, end: str, ids: tuple[int, ...], chat: bool
) -> tuple[int, ...]:
    """Return the tokens that end a reply: those of the text `end`, up to the first special one.

    If a chat template ends turns without a special token, the end-of-sequence token is used.
    """
    whole, _ = _tokens_and_ends(tokenizer, text + end, template=chat)
    tokens = whole[len(ids) :]
    if whole[: len(ids)] != ids:
        # A tokenizer may merge the answer's last character and the end into one token. Answers are scored without an end, and are
        # trained as they are scored: their tokens stay, and the tokens of the end follow.
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


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of all special tokens, including added ones that are marked as special, as the end of a turn may be."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {
        *tokenizer.all_special_ids,
        *(token_id for token_id, token in added.items() if token.special),
    }


def require_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a TypeError unless the tokenizer is a fast one, which knows the characters of each token."""
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"Pass the model's fast tokenizer, as AutoTokenizer loads it. {type(tokenizer).__name__} is a slow tokenizer, or not "
            "a tokenizer at all. If you have a processor, pass its `tokenizer`."
        )


def _tokens_and_ends(
    tokenizer: PreTrainedTokenizerBase, text: str, template: bool
) -> tuple[tuple[int, ...], list[int]]:
    """Return the token ids of a text and the end offset of each token (0 for special ones). Tokens after the text are dropped.

    template: the text was rendered by a template and has its special tokens already: none are added, and they count as text.
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
    """Pad rows to the same length, on the right, or on the left for generation.

    Returns:
        input_ids, attention_mask, labels: (rows, longest) long. Labels are -100 except at answer tokens.
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


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token id to pad with. Any id would do, since padding is marked by the attention mask only."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token_id for token_id in candidates if token_id is not None), 0)


def context_window(model: nn.Module) -> int | None:
    """Return the maximum number of tokens that the model reads, or None if its config does not say."""
    config: Any = model.config
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    windows = [getattr(config, name, None) for name in WINDOW_NAMES]
    return next((window for window in windows if isinstance(window, int) and window > 0), None)
