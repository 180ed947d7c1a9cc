"""A model whose weights, the input embedding among them, are brought to the device only when they are needed."""

# mypy: disable-error-code="assignment, return-value"
from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tr
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model

import facts
import peft_baft
from conftest import randomise
from facts import CAPITALS
from peft_baft import BaftConfig, Case, Edit
from peft_baft.evaluation.likelihood import log_probabilities
from peft_baft.evaluation.scoring import greedy_answers, predicted_tokens
from peft_baft.tools.inspect.inspect import inspect
from peft_baft_bench.metrics.fluency import sampled_texts
from peft_baft_bench.metrics.subspace import mean_gates, removal_ladder

TOKENIZER = facts.make_tokenizer()
PROMPT, ANSWER = CAPITALS[0].prompt, CAPITALS[0].answer
CASE = Case(Edit(PROMPT, ANSWER))
ASKED: dict[str, Any] = {
    "predicted_tokens": lambda model: predicted_tokens(model, TOKENIZER, [(PROMPT, ANSWER)]),
    "greedy_answers": lambda model: greedy_answers(model, TOKENIZER, [PROMPT], 4),
    "sampled_texts": lambda model: sampled_texts(model, TOKENIZER, [PROMPT], length=12),
    "log_probabilities": lambda model: log_probabilities(model, TOKENIZER, [(PROMPT, ANSWER)]),
    "inspect": lambda model: str(inspect(model, TOKENIZER, PROMPT, 4).tokens),
    "removal_ladder": lambda model: removal_ladder(model, TOKENIZER, CASE),
    "mean_gates": lambda model: mean_gates(model, TOKENIZER, CASE),
}


def base() -> tr.PreTrainedModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    settings: dict[str, Any] = {
        "vocab_size": len(TOKENIZER),
        "max_position_embeddings": 64,
        "initializer_range": 0.1,
    }
    return tr.LlamaForCausalLM(tr.LlamaConfig(**shape, **settings)).eval()


def adapted(model: tr.PreTrainedModel) -> PeftModel:
    torch.manual_seed(1)
    model = get_peft_model(model, BaftConfig(r=4, gate_offset=0.0, task_type="CAUSAL_LM")).eval()
    randomise(model)
    return model


@pytest.fixture
def offloaded() -> tr.PreTrainedModel:
    model = base()
    cpu_offload(model, torch.device("cpu"))
    # The control: no device to put tokens on can be read there.
    assert model.get_input_embeddings().weight.is_meta
    return model


@pytest.mark.parametrize("question", ASKED)
def test_every_question_gets_the_answer_of_a_whole_model(
    question: str, offloaded: tr.PreTrainedModel
) -> None:
    ask = ASKED[question]
    whole, found = ask(adapted(base())), ask(adapted(offloaded))
    if question in ("predicted_tokens", "log_probabilities"):
        torch.testing.assert_close(found, whole)
    else:
        assert found == whole


def test_a_check_finds_it_whole(offloaded: tr.PreTrainedModel) -> None:
    report = peft_baft.check(offloaded, TOKENIZER)
    assert report.ok, str(report)
    assert offloaded.get_input_embeddings().weight.is_meta
