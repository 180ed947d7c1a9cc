"""Gradients through a frozen adapter after the model has answered under `torch.inference_mode()`."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from side_by_side import METHODS, adapted, config_of, draw_adapter


def _gradient_of_inputs(model: Any, tokens: Tensor, **kwargs: Any) -> Tensor:
    vectors = model.get_input_embeddings()(tokens).detach().requires_grad_()
    model(inputs_embeds=vectors, **kwargs).logits[:, -1].square().sum().backward()
    assert vectors.grad is not None
    return vectors.grad


def _answer_in_inference_mode(model: nn.Module, tokens: Tensor, **kwargs: Any) -> None:
    with torch.inference_mode():
        model(input_ids=tokens, **kwargs)


@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_of_the_input_is_that_of_a_model_that_has_not_answered(
    method: str, tokens: Tensor
) -> None:
    model = adapted(method).requires_grad_(False)
    expected = _gradient_of_inputs(deepcopy(model), tokens)
    _answer_in_inference_mode(model, tokens)
    assert torch.equal(_gradient_of_inputs(model, tokens), expected)
    _answer_in_inference_mode(model, tokens)  # and back
    assert torch.equal(_gradient_of_inputs(model, tokens), expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_mixed_batch_has_gradients_after_inference_mode(method: str, tokens: Tensor) -> None:
    model = adapted(method)
    model.add_adapter("other", config_of(method))
    draw_adapter(model, "other", seed=2)
    model.eval().requires_grad_(False)
    rows = {"adapter_names": ["other", "default"]}
    expected = _gradient_of_inputs(deepcopy(model), tokens, **rows)
    _answer_in_inference_mode(model, tokens, **rows)
    assert torch.equal(_gradient_of_inputs(model, tokens, **rows), expected)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_a_lora_beside_a_frozen_edit_is_trained_after_inference_mode(tokens: Tensor) -> None:
    model = adapted("baft", adapted("lora"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    _answer_in_inference_mode(model, tokens)
    model(input_ids=tokens, labels=tokens).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.grad is not None for p in trained)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_is_trained_after_inference_mode(method: str, tokens: Tensor) -> None:
    model = adapted(method)
    _answer_in_inference_mode(model, tokens)
    model(input_ids=tokens, labels=tokens).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert any(p.grad is not None and p.grad.any() for p in trained)
