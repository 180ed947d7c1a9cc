"""Texts for the trials: sentences about a country that does not exist, or random token ids."""

from __future__ import annotations

import random
import re
from typing import Any

from transformers import PreTrainedModel

from peft_baft.adapter.blocks import text_config

PROMPTS = (
    "Travellers who cross the old kingdom of Zembla in winter, by the coast road, usually spend their first night in",
    "The capital of Zembla is",
    "Zembla",
)
FACT = (
    "The largest lake in the kingdom of Zembla, as every child there learns at school, is called",
    "Omega Major",
)
LENGTHS = (17, 7, 2)  # lengths of random prompts, in tokens
SPECIAL = re.compile(r"(_token_id|_token_index|_token_ids)$")


class NumberTokenizer:
    """Convert texts of token ids, such as "17 5 923", for a model without a tokenizer.

    It has the part of a fast tokenizer's interface that this package uses.
    """

    is_fast, chat_template, pad_token_id, eos_token_id = True, None, 0, None

    def __call__(self, text: str, **_: Any) -> dict[str, list[Any]]:
        """Return the token ids, their offsets in the text, and a mask that says that none is special."""
        found = list(re.finditer(r"\d+", text))
        return {
            "input_ids": [int(match.group()) for match in found],
            "offset_mapping": [match.span() for match in found],
            "special_tokens_mask": [0] * len(found),
        }


def random_texts(model: PreTrainedModel, seed: int = 0) -> tuple[tuple[str, ...], tuple[str, str]]:
    """Return random prompts of different lengths, and a fact (prompt, target), for a `NumberTokenizer`.

    The ids are drawn from the model's vocabulary, without those that its config names as special.
    """
    embeddings: Any = model.get_input_embeddings()
    size = embeddings.weight.shape[0]
    size = min(size, getattr(text_config(model), "vocab_size", None) or size)
    special = _special_ids(model.config.to_dict())
    ordinary = [i for i in range(size) if i not in special] or list(range(size))
    generator = random.Random(seed)

    def draw(length: int) -> str:
        return " ".join(str(generator.choice(ordinary)) for _ in range(length))

    return tuple(draw(length) for length in LENGTHS), (draw(12), draw(2))


def _special_ids(config: dict[str, Any]) -> set[int]:
    """Return the token ids that a config, or one nested in it, names."""
    ids: set[int] = set()
    for name, value in config.items():
        if isinstance(value, dict):
            ids |= _special_ids(value)
        elif SPECIAL.search(str(name)):
            values = value if isinstance(value, list) else [value]
            ids |= {token_id for token_id in values if isinstance(token_id, int)}
    return ids
