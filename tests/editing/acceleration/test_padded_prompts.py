"""Contrast texts are those that the unedited model answers alone, also where it cannot take padding on the left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model

from peft_baft import BaftConfig, Scope
from peft_baft.adapter import baft_layers
from peft_baft.data.batching import context_window
from peft_baft.data.templates import CHAT
from peft_baft.editing.contrasts import contrast_rows, contrast_targets, squared_lengths
from peft_baft.editing.edit_cache import EditCache
from tiny_models import tiny_model
from tiny_tokenizer import FACT, tiny_tokenizer

SCOPE = Scope(contexts=1, wordings=0, subjects=4, questions=0, answer_tokens=3)


def held(name: str, prepared: EditCache) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hidden vectors of contrast texts that are held together, and of each text alone, by block."""
    model, tokenizer = (
        get_peft_model(tiny_model(name), BaftConfig(task_type="CAUSAL_LM")),
        tiny_tokenizer(),
    )
    layers = baft_layers(model)
    rows = sorted(contrast_rows(model, tokenizer, FACT, CHAT, SCOPE), key=lambda row: len(row.ids))
    assert len({len(row.ids) for row in rows}) > 1
    together = contrast_targets(
        model, tokenizer, layers, rows, SCOPE, 3, "default", prepared
    ).hidden
    parts = [
        contrast_targets(model, tokenizer, layers, [row], SCOPE, 3, "default").hidden
        for row in rows
    ]
    alone = {layer.name: torch.cat([part[layer.name] for part in parts]) for layer in layers}
    return dict(together), alone


@pytest.mark.parametrize(
    ("name", "padded"),
    [("llama", True), ("jamba", True), ("bart", False), ("rwkv", False), ("dory", False)],
)
def test_contrast_texts_have_together_the_hidden_vectors_that_each_has_alone(
    name: str, padded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    prepared = EditCache()
    together, alone = held(name, prepared)
    assert prepared.takes_left_padding is padded
    assert ("one by one" in caplog.text) is not padded
    for block, vectors in alone.items():
        torch.testing.assert_close(together[block], vectors, atol=1e-4, rtol=1e-4)


def test_in_a_left_padded_batch_they_would_be_others() -> None:
    together, alone = held("bart", EditCache(takes_left_padding=True))
    last = list(alone)[-1]
    assert (together[last] - alone[last]).norm() > 0.1 * alone[last].norm()


def test_a_vector_that_is_zero_counts_with_a_least_length() -> None:
    hidden = torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0], [1e-12, 0.0]])
    assert squared_lengths(hidden).tolist() == pytest.approx([25.0, 0.025, 100.0, 0.025])
    assert squared_lengths(torch.zeros(2, 3)).tolist() == pytest.approx([1e-3, 1e-3])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mpt", "whisper"])
def test_a_models_window_is_known_whatever_its_config_calls_it(name: str) -> None:
    assert context_window(tiny_model(name)) == 64
