"""Measure what is the same for all memories on a base model: how its hidden states become keys, and how its tokenizer writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peft_baft.adapter.context import EditContext
from peft_baft.data.batching import RAW_END, encode, encode_prompt, special_ids, tokens_around
from peft_baft.data.contexts import CHAT_CONTEXTS, RAW_CONTEXTS
from peft_baft.data.templates import Template
from peft_baft.data.unrelated import GENERAL
from peft_baft.memory.keys import key_states, states_to_keys
from peft_baft.memory.prompt_format import Ids, PromptFormat
from peft_baft.memory.question import Question, parse_question
from peft_baft.memory.tensors import pack_json
from peft_baft.running import end_tokens

SHRINKAGE = 0.1  # of the variance in each direction, towards the mean variance
BATCH_SIZE = 16  # texts per forward
NAME = "Karin Holm"  # the subject in wordings of relations: made up, so that the model knows nothing about it
QUESTION, ANSWER = "Who was it?", "Me."  # to find what a chat template puts around them
SPACES = (
    "\u2581",
    "\u0120",
)  # with which tokens begin a word, in SentencePiece and in byte-level BPE


def relation_wordings(subject: str) -> Iterator[tuple[str, str]]:
    """Yield each wording of each common relation: the relation's name, and a question or statement about a subject."""
    text = files("peft_baft.memory").joinpath("relations.txt").read_text(encoding="utf-8")
    for line in text.splitlines():
        if line.startswith("#"):
            continue
        name, wordings = line.split(":", 1)
        for wording in wordings.split("|"):
            yield name, wording.strip().replace("{}", subject)


@torch.no_grad()
def measure(
    context: EditContext,
    adapter_name: str,
    tokenizer: PreTrainedTokenizerBase,
    dimensions: int,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Measure a base model and its tokenizer, and return the tensors that belong to them.

    Args:
        context: of the base model, which has the memory `adapter_name`.
        dimensions: k, of a key; at most d.
        options: further arguments of `apply_chat_template`.
    """
    prompt_format = find_prompt_format(context.model, tokenizer, options)
    names, wordings = zip(*relation_wordings(NAME), strict=True)
    asked = [_question_ids(tokenizer, prompt_format, text) for text in wordings]
    neutral = [_question_ids(tokenizer, prompt_format, text) for text in _neutral_texts()]
    neutral = [ids for ids in neutral if len(ids) > 1]
    states = key_states(context, adapter_name, [*neutral, *asked], BATCH_SIZE)
    mean, whitening = _whitening(states, dimensions)
    questions = [
        Question(
            torch.tensor(ids, dtype=torch.int32),
            states_to_keys(found[1:], mean, whitening).cpu(),
        )
        for ids, found in zip(asked, states[len(neutral) :], strict=True)
    ]
    relation_keys, wordings_table, relations = _relation_tensors(
        names, questions, prompt_format.texts
    )
    return {
        "reading": pack_json({**prompt_format.to_json(), "relations": relations}),
        "mean": mean,
        "whitening": whitening,
        "relation_keys": relation_keys,
        "wordings": wordings_table,
    }


def _whitening(states: Sequence[Tensor], dimensions: int) -> tuple[Tensor, Tensor]:
    """Return the mean (d,) of hidden states, and their whitening (d, k) float16 to the directions of largest variance."""
    # The first token of each text is left out: its states are of a different magnitude.
    all_states = torch.cat([found[1:] for found in states]).cpu()
    mean = all_states.mean(0)
    covariance = (all_states - mean).mT @ (all_states - mean) / len(all_states)
    variances, directions = torch.linalg.eigh(covariance)
    largest = variances[-dimensions:]
    largest = (1 - SHRINKAGE) * largest + SHRINKAGE * largest.mean()
    return mean, (directions[:, -dimensions:] / largest.clamp(min=1e-12).sqrt()).half()


def measurement_texts() -> list[str]:
    """Return all texts on which a model is measured."""
    return [*_neutral_texts(), *(wording for _, wording in relation_wordings(NAME))]


def _question_ids(
    tokenizer: PreTrainedTokenizerBase, prompt_format: PromptFormat, text: str
) -> Ids:
    return prompt_format.split(encode_prompt(tokenizer, text).ids).question


def _neutral_texts() -> list[str]:
    """Return the package's general texts and contexts."""
    texts = [f"{text.prompt} {text.answer}" for text in GENERAL]
    for context in (*CHAT_CONTEXTS, *RAW_CONTEXTS):
        texts += [context.system, context.before, context.after]
    return [text for text in texts if text]


def _relation_tensors(
    names: Sequence[str], questions: Sequence[Question], texts: Sequence[str]
) -> tuple[Tensor, Tensor, list[str]]:
    """Return the arguments of `Relations`: keys, wordings and names.

    Only tokens that express the relation are kept; wordings without any are left out.
    """
    distinct = list(dict.fromkeys(names))
    keys, wordings = [questions[0].keys[:0]], []
    for name, question in zip(names, questions, strict=True):
        parsed = parse_question(question, texts)
        is_subject = torch.tensor(
            [parsed.words[n] in NAME.casefold().split() for n in parsed.word_index]
        )
        is_relation = parsed.is_content & ~is_subject
        if is_relation.any():
            keys.append(question.keys[is_relation])
            wordings.append((int(is_relation.sum()), distinct.index(name), parsed.answer_kind))
    if not wordings:  # the tokenizer knows none of these words
        return torch.zeros_like(questions[0].keys[:1]), torch.tensor([[1, 0, 0]]).int(), ["none"]
    return torch.cat(keys), torch.tensor(wordings, dtype=torch.int32), distinct


def find_prompt_format(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any] | None = None
) -> PromptFormat:
    """Find what a tokenizer and its chat template put around questions and answers."""
    raw = encode(tokenizer, QUESTION, ANSWER, end=True)
    without_end = encode(tokenizer, QUESTION, ANSWER)
    line_break = raw.ids[len(without_end.ids) :]
    start = _leading_special(tokenizer, encode_prompt(tokenizer, QUESTION).ids)
    before: Ids = ()
    after: Ids = ()
    lead: Ids = ()
    chat_end: Ids = ()
    if getattr(tokenizer, "chat_template", None):
        template = Template(True, dict(options or {}))
        before, after = _around_message(tokenizer, template)
        turn = encode(tokenizer, QUESTION, ANSWER, template=template)
        lead = turn.ids[turn.prompt_length : turn.prompt_length + turn.lead]
        ended = encode(tokenizer, QUESTION, ANSWER, template=template, end=True)
        chat_end = ended.ids[len(turn.ids) :]
    ends = tuple(end_tokens(model)[:1]) if hasattr(model, "generation_config") else ()
    raw_end = tuple(tokenizer(RAW_END, add_special_tokens=False)["input_ids"])
    first = start[-1:] or raw_end[:1] or ends or (0,)
    texts = tuple(token_texts(tokenizer))
    return PromptFormat(
        texts, (), first, start, before, after, lead, chat_end, (*line_break, *ends)
    )


def _leading_special(tokenizer: PreTrainedTokenizerBase, ids: Ids) -> Ids:
    """Return the special tokens at the start of raw text."""
    special = special_ids(tokenizer)
    return ids[: next((n for n, token in enumerate(ids) if token not in special), 0)]


def _around_message(tokenizer: PreTrainedTokenizerBase, template: Template) -> tuple[Ids, Ids]:
    """Return the tokens that a chat template puts before a user's message, from the last special one on, and after it."""
    before, after = tokens_around(tokenizer, QUESTION, template=template)
    special = special_ids(tokenizer)
    places = [place for place, token in enumerate(before) if token in special]
    return (before[places[-1] :] if places else before), after


def token_texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text of each token in the vocabulary, including the space before it."""
    tokens = list(map(str, tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))))
    marks_spaces = any(token.startswith(SPACES) for token in tokens)
    is_wordpiece = not marks_spaces and any(token.startswith("##") for token in tokens)
    texts = []
    for token in tokens:
        text = tokenizer.convert_tokens_to_string([token])
        if is_wordpiece:  # tokens begin a word unless they are marked
            text = token.removeprefix("##") if token.startswith("##") else f" {token}"
        elif token.startswith(SPACES) and not text.startswith(" "):
            text = f" {text}"
        texts.append(text)
    return texts
