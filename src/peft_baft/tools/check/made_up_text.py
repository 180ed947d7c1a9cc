"""Text to try a model with: sentences about a country that does not exist, or numbers that stand for tokens."""

from __future__ import annotations

import random
import re
from typing import Any

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
LENGTHS = (17, 7, 2)  # of prompts that are drawn, in tokens
SPECIAL = re.compile(r"(_token_id|_token_index|_token_ids)$")


class NumberTokenizer:
    """Read a text of token ids, "17 5 923": the tokenizer of a model that came without one.

    It has what this package asks of a fast tokenizer, and no more.
    """

    is_fast, chat_template, pad_token_id, eos_token_id = True, None, 0, None

    def __call__(self, text: str, **_: Any) -> dict[str, list[Any]]:
        """Token ids, where in the text each stands, and that none of them is special."""
        found = list(re.finditer(r"\d+", text))
        return {
            "input_ids": [int(match.group()) for match in found],
            "offset_mapping": [match.span() for match in found],
            "special_tokens_mask": [0] * len(found),
        }


def drawn_texts(model: Any, seed: int = 0) -> tuple[tuple[str, ...], tuple[str, str]]:
    """Prompts of different lengths, and a fact (prompt, target), for a `NumberTokenizer`.

    The ids are drawn from the model's vocabulary, without those that its config gives a meaning.
    """
    config = text_config(model)
    size = min(
        model.get_input_embeddings().weight.shape[0], getattr(config, "vocab_size", None) or 10**9
    )
    special = _special_ids(model.config.to_dict())
    ordinary = [i for i in range(size) if i not in special] or list(range(size))
    generator = random.Random(seed)

    def draw(length: int) -> str:
        return " ".join(str(generator.choice(ordinary)) for _ in range(length))

    return tuple(draw(length) for length in LENGTHS), (draw(12), draw(2))


def _special_ids(config: dict[str, Any]) -> set[int]:
    """Token ids that a config, or one nested in it, names."""
    ids: set[int] = set()
    for name, value in config.items():
        if isinstance(value, dict):
            ids |= _special_ids(value)
        elif SPECIAL.search(str(name)):
            ids |= {
                i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)
            }
    return ids
