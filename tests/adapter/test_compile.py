"""torch.compile of an edited model: one graph, the same result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from conftest import make_model, randomise
from peft_baft import BaftConfig


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> PeftModel:
    model = get_peft_model(
        make_model(request.param), BaftConfig(task_type="CAUSAL_LM", r=4, gate_offset=0.0)
    ).eval()
    randomise(model)
    torch._dynamo.reset()
    return model


def test_a_forward_is_one_graph(model: PeftModel, tokens: torch.Tensor) -> None:
    compiled = torch.compile(model, backend="eager", fullgraph=True)  # an error at the first break
    with torch.no_grad():
        plain = model(input_ids=tokens).logits
        torch.testing.assert_close(compiled(input_ids=tokens).logits, plain)
        with model.disable_adapter():
            assert not torch.allclose(model(input_ids=tokens).logits, plain, atol=1e-3)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_through_one_graph_says_the_same(
    model: PeftModel, tokens: torch.Tensor, cache: str | None
) -> None:
    settings: dict[str, Any] = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "disable_compile": True,
    }
    settings |= {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    plain = model.generate(**settings)
    with model.disable_adapter():
        assert not torch.equal(model.generate(**settings), plain)
    base = model.get_base_model()
    base.forward = torch.compile(base.forward, backend="eager", fullgraph=True)
    assert torch.equal(model.generate(**settings, cache_implementation=cache), plain)
