"""A classifier's labels are no prompt boundaries: what is edited is the same in training, evaluation and use."""

# mypy: disable-error-code="attr-defined, operator, union-attr, arg-type, index"
from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers as tr
from peft import get_peft_model
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput, TokenClassifierOutput

from conftest import VOCABULARY, make_model
from peft_baft import BaftConfig
from peft_baft.adapter import find_context
from side_by_side import METHODS, config_of, draw_adapter

IDS = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
CLASSES = torch.randint(0, 3, (2, 9), generator=torch.Generator().manual_seed(2))
LAST_THREE = [[-9, -8, -7, -6, -5, -4, -3, -2, -1]] * 2


def classifier(method: str, task: str) -> Any:
    shape = make_model().config
    shape.num_labels, shape.classifier_dropout = 3, 0.0
    classes = {
        "TOKEN_CLS": tr.LlamaForTokenClassification,
        "SEQ_CLS": tr.LlamaForSequenceClassification,
    }
    torch.manual_seed(0)
    model = get_peft_model(classes[task](shape), config_of(method, task_type=task))
    draw_adapter(model)
    return model.eval()


def labels_of(task: str) -> Tensor:
    if task == "SEQ_CLS":
        return CLASSES[:, 0]
    labels = CLASSES.clone()
    labels[:, :4] = -100  # pieces of words that are not scored
    return labels


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("task", ["TOKEN_CLS", "SEQ_CLS"])
@pytest.mark.parametrize("method", METHODS)
def test_a_classifier_says_the_same_with_and_without_labels(
    method: str, task: str, training: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = classifier(method, task).train(training)
    with caplog.at_level(logging.WARNING):
        labelled = model(input_ids=IDS, labels=labels_of(task)).logits
        plain = model(input_ids=IDS).logits
    torch.testing.assert_close(labelled, plain)
    assert "prompt" not in caplog.text  # a classifier has no answers, so nothing is missing
    if method == "baft":
        assert find_context(model).relative_positions.tolist() == LAST_THREE


def test_the_control_labels_of_a_causal_model_are_boundaries() -> None:
    model = get_peft_model(make_model(), config_of("baft"))
    model(input_ids=IDS, labels=torch.where(torch.arange(9) < 5, -100, IDS))
    assert find_context(model).relative_positions[0].tolist() == [-5, -4, -3, -2, -1, 0, 1, 2, 3]


def test_a_masked_language_model_and_soft_labels_are_none_either() -> None:
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48}
    config = tr.BertConfig(**shape, num_hidden_layers=4, num_attention_heads=4)
    model = get_peft_model(tr.BertForMaskedLM(config), BaftConfig(r=4))
    model(input_ids=IDS, labels=torch.where(torch.arange(9) < 5, -100, IDS))
    assert find_context(model).relative_positions.tolist() == LAST_THREE


class OwnModel(nn.Module):
    """A model that is none of transformers', with a head for next tokens or for classes."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.config = make_model().config
        self.model, self.head = tr.LlamaModel(self.config), nn.Linear(32, outputs)

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **inputs: Any) -> Any:
        logits = self.head(self.model(input_ids, **inputs)[0])
        return (
            CausalLMOutput(logits=logits)
            if labels is None
            else TokenClassifierOutput(logits=logits)
        )


@pytest.mark.parametrize(
    ("task", "first"), [("CAUSAL_LM", -5), ("TOKEN_CLS", -9), (None, -9)], ids=str
)
def test_of_a_model_of_ones_own_the_task_type_tells(task: str | None, first: int) -> None:
    config = BaftConfig(r=4, layers_pattern="layers", target_modules=["model.layers.2"])
    base: Any = OwnModel(VOCABULARY)
    model = get_peft_model(base, config)
    model.peft_config["default"].task_type = task
    for layer in model.base_model.own_modules():
        layer.configs["default"].task_type = task
    base(input_ids=IDS, labels=torch.where(torch.arange(9) < 5, -100, IDS))
    assert find_context(model).relative_positions[0, 0] == first


def test_the_load_balance_counts_a_classifiers_own_tokens() -> None:
    """Its share of a step is that of the tokens that it scores; none of its labels is moved by a token."""
    from peft_baft.adapter.model_call import read_training_call

    labels = labels_of("TOKEN_CLS")
    given = {"labels": labels}
    counts = [
        read_training_call((), (), given, shifts=shifts).predicted for shifts in (False, True)
    ]
    assert counts[0] == (labels != -100).sum() and counts[1] == (labels[:, 1:] != -100).sum()
