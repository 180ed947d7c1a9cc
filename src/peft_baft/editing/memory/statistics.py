"""Measure what is the same for every memory of a base model: where its states lie, and which tokens are common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from peft_baft.adapter.context import EditContext
from peft_baft.adapter.memory import SAMPLE, KeyStatistics, embedding_sample
from peft_baft.adapter.model_call import input_device
from peft_baft.data.batching import Tokens, collate, padding_id, special_ids, tokens_around
from peft_baft.data.contexts import CHAT_CONTEXTS, RAW_CONTEXTS
from peft_baft.data.templates import Template
from peft_baft.data.unrelated import GENERAL
from peft_baft.editing.written_texts import written_texts

SHRINKAGE = 0.1  # of the spread in each direction, towards the mean spread
WORDS = "Who was it?"  # of a user, around which a chat template is found
ROWS = 16  # texts of a forward
SPACES = ("\u2581", "\u0120")  # how tokens of SentencePiece and of byte pairs begin a word


@torch.no_grad()
def key_statistics(
    model: Any,
    context: EditContext,
    tokenizer: Any,
    dimensions: int,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> KeyStatistics:
    """Measure states of the key block over the package's neutral texts and over texts that the model writes.

    Args:
        model: the base model, whose `context` has an empty memory of edits that is active. dimensions: k, at most d.
        options: further arguments of `apply_chat_template`. seed: of what is written.
    """
    rows = [*_brought(tokenizer), *written_texts(model, tokenizer, seed)]
    states = []
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        inputs = collate(part, padding_id(tokenizer))
        real = inputs["attention_mask"].bool().to(input_device(model))
        found = context.routing.key_states(inputs["input_ids"].to(real.device), real)
        real[:, 0] = False  # the first token's states are of another size than all others
        states.append(found[real.to(found.device)].float().cpu())
    every = torch.cat(states)
    mean = every.mean(0)
    spread, directions = torch.linalg.eigh((every - mean).mT @ (every - mean) / len(every))
    kept = spread[-dimensions:]
    kept = (1 - SHRINKAGE) * kept + SHRINKAGE * kept.mean()
    whitening = directions[:, -dimensions:] / kept.sqrt()
    before, after = chat_frame(tokenizer, options)
    sample = embedding_sample(model)
    if sample is None:
        sample = torch.zeros(SAMPLE)
    return KeyStatistics(mean, whitening, token_texts(tokenizer), sample, before, after)


def token_texts(tokenizer: Any) -> list[str]:
    """List what each token stands for, with the space before it."""
    tokens = list(map(str, tokenizer.convert_ids_to_tokens(range(len(tokenizer)))))
    marks_spaces = any(token.startswith(SPACES) for token in tokens)
    continued = not marks_spaces and any(token.startswith("##") for token in tokens)
    texts = []
    for token in tokens:
        text = tokenizer.convert_tokens_to_string([token])
        if continued:  # tokens of WordPiece begin a word unless they are marked
            text = token.removeprefix("##") if token.startswith("##") else f" {token}"
        elif token.startswith(SPACES) and not text.startswith(" "):
            text = f" {text}"
        texts.append(text)
    return texts


def chat_frame(
    tokenizer: Any, options: Mapping[str, Any] | None = None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find what a chat template puts directly before a user's words, and behind them up to the reply.

    Returns:
        Ids of tokens: those from the last special token before the words on, and those behind them. Empty where the tokenizer has
        no chat template.
    """
    if not getattr(tokenizer, "chat_template", None):
        return (), ()
    template = Template(True, dict(options or {}))
    before, after = tokens_around(tokenizer, WORDS, template=template)
    special = special_ids(tokenizer)
    marks = [place for place, token in enumerate(before) if token in special]
    return before[marks[-1] :] if marks else before, after


def _brought(tokenizer: Any) -> list[Tokens]:
    """Tokenise the package's neutral texts."""
    texts = [f"{text.prompt} {text.answer}" for text in GENERAL]
    for context in (*CHAT_CONTEXTS, *RAW_CONTEXTS):
        texts += [context.system, context.before, context.after]
    found = [tuple(tokenizer(text)["input_ids"]) for text in texts if text]
    return [Tokens(ids, len(ids)) for ids in found if len(ids) > 1]
