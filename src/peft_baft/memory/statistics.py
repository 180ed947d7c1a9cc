"""Measure what is the same for every memory of a base model: how its states become keys, and how its tokenizer writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from peft_baft.adapter.context import EditContext
from peft_baft.data.batching import RAW_END, encode, encode_prompt, special_ids, tokens_around
from peft_baft.data.contexts import CHAT_CONTEXTS, RAW_CONTEXTS
from peft_baft.data.templates import Template
from peft_baft.data.unrelated import GENERAL
from peft_baft.memory.keys import key_states, keys_of
from peft_baft.memory.matching import Question, read
from peft_baft.memory.reading import Ids, Reading
from peft_baft.memory.tensors import packed
from peft_baft.running import end_tokens

SHRINKAGE = 0.1  # of the spread in each direction, towards the mean spread
BATCH_SIZE = 16  # texts of a forward
NAME = "Karin Holm"  # whom the wordings of relations are about: made up, so that the model knows nothing of her
WORDS = "Who was it?"  # of a user, around which a chat template is found
SPACES = ("\u2581", "\u0120")  # how tokens of SentencePiece and of byte pairs begin a word


def relation_wordings(subject: str) -> Iterator[tuple[str, str]]:
    """Yield the name of a common relation and a question or statement about a subject that asks for it, for all wordings."""
    text = files("peft_baft.memory").joinpath("relations.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        name, listed = line.split(":", 1)
        for wording in listed.split("|"):
            yield name, wording.strip().replace("{}", subject)


@torch.no_grad()
def measured(
    context: EditContext,
    adapter_name: str,
    tokenizer: Any,
    dimensions: int,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Measure a base model and its tokenizer, and return the tensors that belong to them.

    Args:
        context: of the base model, on which the memory `adapter_name` is. dimensions: k, of a key, at most d.
        options: further arguments of `apply_chat_template`.
    """
    reading = tokenizer_reading(context.model, tokenizer, options)
    names, wordings = zip(*relation_wordings(NAME), strict=True)
    asked = [_question(tokenizer, reading, text) for text in wordings]
    texts = [_question(tokenizer, reading, text) for text in _neutral_texts()]
    texts = [ids for ids in texts if len(ids) > 1]
    states = key_states(context, adapter_name, [*texts, *asked], BATCH_SIZE)
    # The first token's states are of another size than all others.
    every = torch.cat([found[1:] for found in states]).cpu()
    mean = every.mean(0)
    spread, directions = torch.linalg.eigh((every - mean).mT @ (every - mean) / len(every))
    kept = spread[-dimensions:]
    kept = (1 - SHRINKAGE) * kept + SHRINKAGE * kept.mean()
    whitening = (directions[:, -dimensions:] / kept.clamp(min=1e-12).sqrt()).half()
    questions = [
        Question(torch.tensor(ids, dtype=torch.int32), keys_of(found[1:], mean, whitening).cpu())
        for ids, found in zip(asked, states[len(texts) :], strict=True)
    ]
    relation_keys, told, relations = _relations(names, questions, reading.texts)
    reading = Reading.from_json({**reading.to_json(), "relations": relations})
    return {
        "reading": packed(reading.to_json()),
        "mean": mean,
        "whitening": whitening,
        "relation_keys": relation_keys,
        "wordings": told,
    }


def texts_read() -> list[str]:
    """List all texts that a model is measured on."""
    return [*_neutral_texts(), *(wording for _, wording in relation_wordings(NAME))]


def _question(tokenizer: Any, reading: Reading, text: str) -> Ids:
    return reading.read(encode_prompt(tokenizer, text).ids).question


def _neutral_texts() -> list[str]:
    """List the package's texts about nothing in particular."""
    texts = [f"{text.prompt} {text.answer}" for text in GENERAL]
    for context in (*CHAT_CONTEXTS, *RAW_CONTEXTS):
        texts += [context.system, context.before, context.after]
    return [text for text in texts if text]


def _relations(
    names: Sequence[str], questions: Sequence[Question], texts: Sequence[str]
) -> tuple[Tensor, Tensor, list[str]]:
    """Keep of wordings of relations the tokens that tell them, as `Relations` takes them; wordings without any are left out."""
    different = list(dict.fromkeys(names))
    kept, told = [questions[0].keys[:0]], []
    for name, question in zip(names, questions, strict=True):
        reading = read(question, texts)
        named = torch.tensor([reading.words[n] in NAME.casefold().split() for n in reading.word])
        telling = reading.content & ~named
        if telling.any():
            kept.append(question.keys[telling])
            told.append((int(telling.sum()), different.index(name), reading.kind))
    if not told:  # of a tokenizer that knows none of these words
        return torch.zeros_like(questions[0].keys[:1]), torch.tensor([[1, 0, 0]]).int(), ["none"]
    return torch.cat(kept), torch.tensor(told, dtype=torch.int32), different


def tokenizer_reading(
    model: Any, tokenizer: Any, options: Mapping[str, Any] | None = None
) -> Reading:
    """Find what a tokenizer and its chat template put around questions and answers."""
    raw = encode(tokenizer, WORDS, "Me.", end=True)
    bare = encode(tokenizer, WORDS, "Me.")
    start = _special_start(tokenizer, encode_prompt(tokenizer, WORDS).ids)
    line_break = raw.ids[len(bare.ids) :]
    before: Ids = ()
    after: Ids = ()
    lead: Ids = ()
    chat_end: Ids = ()
    if getattr(tokenizer, "chat_template", None):
        template = Template(True, dict(options or {}))
        before, after = _chat_frame(tokenizer, template)
        turn = encode(tokenizer, WORDS, "Me.", template=template)
        lead = turn.ids[turn.prompt_length : turn.prompt_length + turn.lead]
        chat_end = encode(tokenizer, WORDS, "Me.", template=template, end=True).ids[len(turn.ids) :]
    ends = tuple(end_tokens(model)[:1]) if hasattr(model, "generation_config") else ()
    first = start[-1:] or _ids(tokenizer, RAW_END)[:1] or ends or (0,)
    texts = tuple(token_texts(tokenizer))
    return Reading(texts, (), first, start, before, after, lead, chat_end, (*line_break, *ends))


def _ids(tokenizer: Any, text: str) -> Ids:
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def _special_start(tokenizer: Any, ids: Ids) -> Ids:
    """Return the special tokens with which a tokenizer begins raw text."""
    special = special_ids(tokenizer)
    return ids[: next((n for n, token in enumerate(ids) if token not in special), 0)]


def _chat_frame(tokenizer: Any, template: Template) -> tuple[Ids, Ids]:
    """Find what a chat template puts directly before a user's words, from the last special token on, and after them."""
    before, after = tokens_around(tokenizer, WORDS, template=template)
    special = special_ids(tokenizer)
    marks = [place for place, token in enumerate(before) if token in special]
    return (before[marks[-1] :] if marks else before), after


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
