"""Texts that begin alike are answered as each one alone is, though their common beginning is computed once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import get_peft_model

from conftest import ARCHITECTURES, make_model
from peft_baft import BaftConfig
from peft_baft.adapter.state import without_adapters
from peft_baft.data.batching import Tokens
from peft_baft.editing.acceleration.shared_prefix import PromptBatch, SharedPrefix, find_prefix
from tiny_models import tiny_model

GENERATOR = torch.Generator().manual_seed(1)


def _random(count: int) -> tuple[int, ...]:
    return tuple(torch.randint(3, 64, (count,), generator=GENERATOR).tolist())


def _prompt(ids: tuple[int, ...]) -> Tokens:
    return Tokens(ids, len(ids))


HEAD = _random(9)
# Rests of unequal length, and one text that begins otherwise.
PROMPTS = [_prompt(HEAD + _random(count)) for count in (4, 7, 5)] + [_prompt(_random(11))]


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Iterator[Any]:
    torch.manual_seed(0)
    model: Any = get_peft_model(make_model(request.param), BaftConfig(task_type="CAUSAL_LM", r=4))
    model.generation_config.eos_token_id = None
    yield model.eval()


# Bloom counts positions by columns, and the windows of the others are shorter than the texts.
NEVER = ("bloom", "mistral", "gemma2", "gemma3")


def test_answers_are_those_of_each_text_alone(model: Any, request: pytest.FixtureRequest) -> None:
    found = find_prefix(model, PROMPTS, own=3, verified=64)
    assert found == (() if request.node.callspec.params["model"] in NEVER else HEAD)
    with without_adapters(model):
        prefix = SharedPrefix.of(model, found, {}) if found else SharedPrefix()
        batch = PromptBatch.of(PROMPTS, 0, prefix)
        if found:
            assert batch.begins.tolist() == [True, True, True, False]
            assert batch.ids.shape == (4, 11)  # and not 16: the shared tokens are not among them
        answers = batch.answers(model, 0, 4, {})
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            alone = PromptBatch.of([prompt], 0, SharedPrefix()).answers(model, 0, 4, {})
            assert answer.tolist() == alone[0].tolist()
            ids = torch.tensor([[*prompt.ids, *answer.tolist()]])
            predicted = model(input_ids=ids).logits[0, len(prompt.ids) - 1 : -1].argmax(-1)
            assert predicted.tolist() == answer.tolist()


def test_nothing_is_shared_where_that_is_not_known_to_be_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llama: Any = get_peft_model(make_model("llama"), BaftConfig(task_type="CAUSAL_LM", r=4))
    # At most all but the last `own` tokens of a text are shared.
    assert find_prefix(llama, [PROMPTS[0]] * 2, own=3, verified=64) == PROMPTS[0].ids[:-3]
    # The prefix and the longest rest are 20 tokens.
    assert find_prefix(llama, PROMPTS, own=3, verified=20) == HEAD
    assert find_prefix(llama, PROMPTS, own=3, verified=19) == ()
    assert find_prefix(llama, PROMPTS[:1], own=3, verified=64) == ()
    assert find_prefix(llama, [_prompt(_random(12)) for _ in range(4)], own=3, verified=64) == ()
    monkeypatch.setattr(llama.generation_config, "use_cache", False)
    assert find_prefix(llama, PROMPTS, own=3, verified=64) == ()


def test_a_recurrent_model_shares_nothing() -> None:
    model: Any = get_peft_model(
        tiny_model("qwen3_next"), BaftConfig(task_type="CAUSAL_LM", r=4)
    ).eval()
    with without_adapters(model):
        assert SharedPrefix.of(model, HEAD, {}) == SharedPrefix()
