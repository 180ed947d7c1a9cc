"""Measure what is the same for every memory of a base model: where its states lie, and which tokens are common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_baft.adapter.base_identity import SAMPLE, embedding_sample
from peft_baft.adapter.context import EditContext
from peft_baft.adapter.matching import Question, read
from peft_baft.adapter.memory import KeyStatistics, keys_of, words_of_user
from peft_baft.adapter.model_call import input_device
from peft_baft.data.batching import (
    Tokens,
    collate,
    encode_prompt,
    padding_id,
    special_ids,
    tokens_around,
)
from peft_baft.data.contexts import CHAT_CONTEXTS, RAW_CONTEXTS
from peft_baft.data.relations import wordings as relation_wordings
from peft_baft.data.templates import RAW, Template
from peft_baft.data.unrelated import GENERAL
from peft_baft.editing.written_texts import written_texts

SHRINKAGE = 0.1  # of the spread in each direction, towards the mean spread
NAME = "Karin Holm"  # whom the wordings of relations are about: made up, so that the model knows nothing of her
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
    template: Template = RAW,
    seed: int = 0,
) -> KeyStatistics:
    """Measure states of the key block over the package's neutral texts and over texts that the model writes.

    Args:
        model: the base model, whose `context` has an empty memory of edits that is active. dimensions: k, at most d.
        options: further arguments of `apply_chat_template`. template: the form in which questions are put, and so the wordings of
            relations. seed: of what is written.
    """
    rows = [*_brought(tokenizer), *written_texts(model, tokenizer, seed)]
    # The first token's states are of another size than all others.
    states = [found[1:] for found in _states(model, context, tokenizer, rows)]
    every = torch.cat(states)
    mean = every.mean(0)
    spread, directions = torch.linalg.eigh((every - mean).mT @ (every - mean) / len(every))
    kept = spread[-dimensions:]
    kept = (1 - SHRINKAGE) * kept + SHRINKAGE * kept.mean()
    whitening = (directions[:, -dimensions:] / kept.sqrt()).half()
    sample, texts = embedding_sample(model), token_texts(tokenizer)
    before, after = chat_frame(tokenizer, options)
    names, asked = zip(*relation_wordings(NAME), strict=True)
    prompts = [encode_prompt(tokenizer, text, template=template) for text in asked]
    wordings = []
    for name, row, found in zip(
        names, prompts, _states(model, context, tokenizer, prompts), strict=True
    ):
        words = words_of_user(row.ids, before, after)
        keys = keys_of(found[words][1:], mean, whitening)
        wordings.append((name, Question(torch.tensor(row.ids[words], dtype=torch.int32), keys)))
    relation_keys, told, relation_names = _relations(wordings, texts)
    return KeyStatistics(
        mean=mean,
        whitening=whitening,
        texts=texts,
        sample=torch.zeros(SAMPLE) if sample is None else sample,
        relation_keys=relation_keys,
        wordings=told,
        relation_names=relation_names,
        before=before,
        after=after,
    )


def _states(
    model: Any, context: EditContext, tokenizer: Any, rows: Sequence[Tokens]
) -> Iterator[Tensor]:
    """Compute the states (n, d) of the key block at the tokens of texts."""
    for start in range(0, len(rows), ROWS):
        inputs = collate(rows[start : start + ROWS], padding_id(tokenizer))
        real = inputs["attention_mask"].bool().to(input_device(model))
        found = context.routing.key_states(inputs["input_ids"].to(real.device), real)
        for states, mask in zip(found, real.to(found.device), strict=True):
            yield states[mask].float().cpu()


def _relations(
    wordings: Sequence[tuple[str, Question]], texts: Sequence[str]
) -> tuple[Tensor, Tensor, list[str]]:
    """Keep of wordings of relations the tokens that tell them, as `Relations` takes them; wordings without any are left out."""
    names = list(dict.fromkeys(name for name, _ in wordings))
    kept, told = [wordings[0][1].keys[:0]], []
    for name, question in wordings:
        reading = read(question, texts)
        named = torch.tensor([reading.words[n] in NAME.casefold().split() for n in reading.word])
        telling = reading.content & ~named
        if telling.any():
            kept.append(question.keys[telling])
            told.append((int(telling.sum()), names.index(name), reading.kind))
    return torch.cat(kept), torch.tensor(told, dtype=torch.int32).reshape(-1, 3), names


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
    return [row for row in (_tokens(tokenizer, text) for text in texts if text) if len(row.ids) > 1]


def _tokens(tokenizer: Any, text: str) -> Tokens:
    ids = tuple(tokenizer(text)["input_ids"])
    return Tokens(ids, len(ids))
