"""Measure the variety of the words in what a model writes by itself: KnowEdit's fluency, which an edit should not lower."""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from peft_baft.data.batching import encode_prompt
from peft_baft.data.cases import Prompt
from peft_baft.data.templates import RAW, Template
from peft_baft.evaluation.forward import BATCH_SIZE, greedy_tokens

LENGTH, TOP_K = 100, 5
WORD = re.compile(r"\w+|[^\w\s]")


def fluency(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    seed: int = 0,
    *,
    template: Template = RAW,
) -> list[float]:
    """Compute the `n_gram_entropy` of what the model makes of each prompt; lower where it repeats itself."""
    return [
        n_gram_entropy(text)
        for text in sampled_texts(model, tokenizer, prompts, seed, template=template)
    ]


def n_gram_entropy(text: str) -> float:
    """Compute the mean of 2/3 H2 and 4/3 H3: entropies, in bits, of how often which two, and three, words follow each other.

    Words are runs of letters and digits, and single punctuation marks. KnowEdit prints a hundredfold of this, with words
    as nltk splits them.
    """
    words = WORD.findall(text)
    return (2 / 3 * _entropy(words, 2) + 4 / 3 * _entropy(words, 3)) / 2


def _entropy(words: Sequence[str], n: int) -> float:
    """Entropy of the n-grams, in bits; 0 where there are none."""
    counts = Counter(zip(*(words[i:] for i in range(n)), strict=False)).values()
    total = sum(counts)
    return sum(count / total * math.log2(total / count) for count in counts)


def sampled_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    seed: int = 0,
    length: int = LENGTH,
    top_k: int = TOP_K,
    batch_size: int = BATCH_SIZE,
    *,
    template: Template = RAW,
) -> list[str]:
    """Continue each prompt with what is drawn token by token among the `top_k` likeliest, past any end of text.

    What is drawn depends on the seed and the prompt alone; the caller's random numbers stay as they are.

    Args:
        length: tokens in all, prompt included; fewer where the context window ends before.
        template: the form in which prompts are put to the model.
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
    """Leaves each row one token, drawn among its `top_k` likeliest with random numbers of the row's own.

    Greedy decoding then is sampling that neither the other rows nor anyone's global random state take part in.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, top_k: int) -> None:
        seeds = [zlib.crc32(f"{seed} {prompt}".encode()) for prompt in prompts]
        self.generators, self.top_k = [torch.Generator().manual_seed(seed) for seed in seeds], top_k

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: (rows, vocabulary)."""
        likeliest = scores.topk(self.top_k)
        below = likeliest.values.float().softmax(-1).cumsum(-1).cpu()
        u = torch.stack([torch.rand(1, generator=generator) for generator in self.generators])
        drawn = (below[:, :-1] < u).sum(1, keepdim=True)
        token = likeliest.indices.gather(1, drawn.to(scores.device))
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)
