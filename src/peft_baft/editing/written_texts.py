"""Let the unedited model write texts, over which methods measure what is usual for it: no download."""

from __future__ import annotations

from typing import Any

from peft_baft.data.batching import Tokens, collate, context_window, padding_id
from peft_baft.running import generate_sampled

ROWS, LENGTH = 32, 128  # of the texts that are written at once
BEGINNINGS = ("The", "Therefore", "Because", "I", "You")


def written_now(model: Any, tokenizer: Any) -> list[Tokens]:
    """Let the model write texts."""
    window = context_window(model) or LENGTH
    begun = [tokenizer(BEGINNINGS[i % len(BEGINNINGS)])["input_ids"] for i in range(ROWS)]
    batch = collate([Tokens(tuple(ids), len(ids)) for ids in begun], padding_id(tokenizer), "left")
    longest = batch["input_ids"].shape[1]
    new = generate_sampled(
        model,
        batch["input_ids"],
        batch["attention_mask"],
        padding_id(tokenizer),
        min(LENGTH, window - longest),
    )
    rows = []
    for ids, written in zip(begun, new.tolist(), strict=True):
        # What stands behind an end of the text is padding.
        ends = [i for i, token in enumerate(written) if token == padding_id(tokenizer)]
        row = (*ids, *written[: ends[0] if ends else None])
        rows.append(Tokens(row, len(row)))
    return rows
