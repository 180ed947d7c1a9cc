"""Every method on models of several families: it edits, says what it cannot, and gives the model back."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch

import facts
from facts import edits_with_subjects as edits
from peft_baft.editing.presets import PRESETS
from peft_baft_bench.methods.method import EditorSetup
from peft_baft_bench.methods.methods import METHODS, parse_method
from tiny_models import tiny_model

FAMILIES = ("llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "opt", "phi", "mistral")
# Three steps: a random model learns no fact, but a method shows whether it knows its way about the model.
STEPS = ";max_steps=3"
HERE = {
    "in-context": "",
    "memit": f"{STEPS};contexts=1;layers=[0,1];moment_tokens=200",
    "alphaedit": f"{STEPS};contexts=1;layers=[0,1];moment_tokens=200;threshold=1000",
    **dict.fromkeys(("rome", "r-rome"), f"{STEPS};contexts=1;layer=1"),
    **dict.fromkeys(("wise", "wise-light"), f"{STEPS};contexts=1;threshold=0"),
    "memoir": f"{STEPS};contexts=1",
    "memory": "key_dimensions=8",
}


@cache
def model_of(family: str) -> Any:
    return tiny_model(family, vocab_size=len(facts.trained().tokenizer)).eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")  # PEFT sets it for GPT-2
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [name for name in METHODS if name != "adalora"])
def test_a_method_edits_models_of_a_family_and_gives_them_back(name: str, family: str) -> None:
    model, tokenizer = deepcopy(model_of(family)), facts.trained().tokenizer
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    (first, second) = edits(0, 5)
    ids = torch.tensor([tokenizer(first.prompt)["input_ids"]])
    with torch.no_grad():
        expected = model(input_ids=ids, logits_to_keep=1).logits
    variant = f"{name}:{HERE.get(name, STEPS).removeprefix(';')}"
    settings = parse_method(variant.removesuffix(":"), PRESETS["plain"]).settings
    editor = settings.start(model, tokenizer, EditorSetup(facts.meals(0, 4)))
    editor.edit([first])
    editor.edit([second])
    with torch.no_grad():
        found = editor.model(input_ids=ids, logits_to_keep=1).logits
        assert found.isfinite().all() and not torch.equal(found[:, -1], expected[:, -1])
        editor.remove()
        assert torch.equal(model(input_ids=ids, logits_to_keep=1).logits, expected)
    after = model.state_dict()
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
