"""Measure the variety of words in generated text: KnowEdit's fluency, which an edit should not lower."""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerBase

from peft_baft.data.batching import encode_prompt
from peft_baft.data.cases import Prompt
from peft_baft.data.templates import RAW, Template
from peft_baft.evaluation.forward import BATCH_SIZE, greedy_tokens

LENGTH, TOP_K = 100, 5
WORD = re.compile(r"\w+|[^\w\s]")


def fluency(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    seed: int = 0,
    *,
    template: Template = RAW,
) -> list[float]:
    """Compute the `n_gram_entropy` of a continuation of each prompt; it is lower where the text repeats itself."""
    return [
        n_gram_entropy(text)
        for text in sampled_texts(model, tokenizer, prompts, seed, template=template)
    ]


def n_gram_entropy(text: str) -> float:
    """Compute the mean of 2/3 H2 and 4/3 H3, the entropies of word bigrams and trigrams in bits.

    Words are runs of letters and digits, and single punctuation marks. KnowEdit reports 100 times this value,
    with words split by nltk.
    """
    words = WORD.findall(text)
    return (2 / 3 * _entropy(words, 2) + 4 / 3 * _entropy(words, 3)) / 2


def _entropy(words: Sequence[str], n: int) -> float:
    """Compute the entropy of the n-grams in bits; 0 if there are none."""
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False)).values()
    total = sum(counts)
    return sum(count / total * math.log2(total / count) for count in counts)


def sampled_texts(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    seed: int = 0,
    length: int = LENGTH,
    top_k: int = TOP_K,
    batch_size: int = BATCH_SIZE,
    *,
    template: Template = RAW,
) -> list[str]:
    """Continue each prompt by sampling each token from the `top_k` likeliest, ignoring end-of-text tokens.

    The result depends only on the seed and the prompt; the caller's random state is not changed.

    Args:
        length: the total number of tokens, prompt included; fewer if the context window is shorter.
        template: the prompt format.
    """
    rows = [encode_prompt(tokenizer, prompt, template=template) for prompt in prompts]

    def draw(numbers: Sequence[int]) -> dict[str, Any]:
        drawn = SeededTopK([prompts[number] for number in numbers], seed, top_k)
        return {"logits_processor": LogitsProcessorList([drawn]), "eos_token_id": None}

    room = [length - len(row.ids) for row in rows]
    new_tokens = greedy_tokens(model, tokenizer, rows, room, batch_size, settings=draw)
    ids = [[*row.ids, *tokens.tolist()] for row, tokens in zip(rows, new_tokens, strict=True)]
    return tokenizer.batch_decode(ids, skip_special_tokens=True)


class SeededTopK(LogitsProcessor):
    """Leaves each row only one token, drawn from the `top_k` likeliest with the row's own random numbers.

    Greedy decoding with it is sampling that depends neither on the other rows nor on the global random state.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, top_k: int) -> None:
        seeds = [zlib.crc32(f"{seed} {prompt}".encode()) for prompt in prompts]
        self.generators, self.top_k = [torch.Generator().manual_seed(seed) for seed in seeds], top_k

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores (rows, vocabulary) that are -inf except for the drawn tokens."""
        likeliest = scores.topk(self.top_k)
        below = likeliest.values.float().softmax(-1).cumsum(-1).cpu()
        u = torch.stack([torch.rand(1, generator=generator) for generator in self.generators])
        drawn = (below[:, :-1] < u).sum(1, keepdim=True)
        token = likeliest.indices.gather(1, drawn.to(scores.device))
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
