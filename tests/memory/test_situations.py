"""A memory of edits in further situations: other default dtypes, accelerate, models of pictures and text, edits rolled back."""

# mypy: disable-error-code="attr-defined, operator, union-attr, arg-type, index, call-arg, var-annotated"
from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel, get_peft_model
from torch import Tensor
from toy import config, editor_of, ids_of, prompts_of

import facts
from default_dtypes import DTYPES, default_dtype
from facts import FactModel, edits
from peft_baft import BaftConfig, Edit, MemoryEditor, rolled_back
from peft_baft.editing.continual import edit_continually
from peft_baft.evaluation.scoring import token_match
from vision_models import answer, each_model, tiny

fact_model = facts.fact_model


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_memory_made_and_loaded_under_another_default_dtype_is_the_same(
    fact_model: FactModel, dtype: torch.dtype, tmp_path: Path
) -> None:
    usual = editor_of(fact_model)
    usual.edit(edits(0, 3))
    with default_dtype(dtype):
        base: Any = deepcopy(fact_model.base)
        editor = MemoryEditor(get_peft_model(base, config()).eval(), fact_model.tokenizer)
        editor.edit(edits(0, 3))
    for name, tensor in usual.part.tensors().items():
        assert editor.part.tensors()[name].dtype == tensor.dtype
        assert torch.equal(editor.part.tensors()[name], tensor), name
    usual.model.save_pretrained(str(tmp_path))
    with default_dtype(dtype):
        loaded = PeftModel.from_pretrained(deepcopy(fact_model.base), str(tmp_path)).eval()
        pairs = [(edit.prompt, edit.target) for edit in edits(0, 3)]
        assert token_match(loaded, fact_model.tokenizer, pairs) == [1.0] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_low_precision_learns_and_answers(
    fact_model: FactModel, dtype: torch.dtype
) -> None:
    base: Any = deepcopy(fact_model.base).to(dtype)
    editor = editor_of(FactModel(base, fact_model.tokenizer))
    editor.edit(edits(0, 3))
    pairs = [(edit.prompt, edit.target) for edit in edits(0, 3)]
    assert token_match(editor.model, fact_model.tokenizer, pairs) == [1.0] * 2
    with editor.model.disable_adapter():  # the control
        assert token_match(editor.model, fact_model.tokenizer, pairs) != [1.0] * 2


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_accelerate_saves_and_loads_a_memory(
    fact_model: FactModel, accelerator: Any, safe: bool, tmp_path: Path
) -> None:
    # An empty one too: safetensors takes all empty tensors for one that is shared, and accelerate writes one of them.
    editor = editor_of(fact_model)
    for taught in ((), edits(0, 3)):
        if taught:
            editor.edit(taught)
        model = accelerator.prepare(editor.model)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        folder = tmp_path / str(len(taught))
        accelerator.save_state(str(folder), safe_serialization=safe)
        editor.edit(edits(9))
        changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
        assert changed  # the control
        accelerator.load_state(str(folder))
        after = model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert editor.numbers == list(range(1, len(taught) + 1))
        accelerator._models.clear()
    pairs = [(edit.prompt, edit.target) for edit in edits(0, 3)]
    assert token_match(editor.model, fact_model.tokenizer, pairs) == [1.0] * 2


@each_model
def test_a_memory_on_a_model_of_pictures_and_text_answers_in_a_forward_and_in_generate(
    name: str,
) -> None:
    tokenizer, (fact,) = facts.make_tokenizer(), edits(3)
    base = tiny(name)
    editor = MemoryEditor(
        get_peft_model(base, config(key_dimensions=8, after="continue")).eval(), tokenizer
    )
    editor.edit([fact])
    ids = tokenizer(fact.prompt, return_tensors="pt")["input_ids"]
    target = tokenizer(f" {fact.target}")["input_ids"]
    sequences, logits = answer(editor.model, ids, torch.ones_like(ids))
    assert sequences[0, ids.shape[1] :][: len(target)].tolist() == target
    with editor.model.disable_adapter(), torch.no_grad():
        # The control: it answers when it generates.
        assert int(editor.model(input_ids=ids).logits[0, -1].argmax()) != target[0]
    with torch.no_grad():
        forward = editor.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(forward[:, -1], logits[:, 0], atol=1e-4, rtol=1e-4)


Edits = Callable[[Any], object]
EDITS: dict[str, Edits] = {
    "one": lambda editor: editor.edit(edits(0)),
    "a batch": lambda editor: editor.edit(edits(0, 1)),
    "in turn": lambda editor: list(editor.edit_in_turn(edits(0, 1))),
}


@pytest.mark.parametrize("how", EDITS)
def test_an_edit_that_is_rolled_back_gives_the_same_memory_again(
    how: str, fact_model: FactModel
) -> None:
    editor = editor_of(fact_model)
    editor.edit(edits(2))

    def tensors() -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in editor.state_dict().items()}

    def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
        return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)

    before, found = tensors(), []
    for seed in (1, 2):
        with rolled_back(editor.model):
            torch.manual_seed(seed)  # edits draw no random numbers
            EDITS[how](editor)
            found.append(tensors())
        assert same(tensors(), before)
    assert same(*found)
    assert not same(found[0], before)


def test_a_rolled_back_run_leaves_the_numbers_of_a_memory(fact_model: FactModel) -> None:
    editor = editor_of(fact_model)
    with rolled_back(editor.model):
        list(edit_continually(editor, edits(0, 1), keep_only_good=True))
        assert editor.numbers == [1, 2]
    editor.edit(edits(0))
    assert editor.numbers == [1]


def test_a_memory_trains_nothing_and_leaves_training_alone(fact_model: FactModel) -> None:
    editor = editor_of(fact_model)
    editor.edit(edits(0))
    assert not [name for name, p in editor.model.named_parameters() if "baft" in name]
    assert not [p for p in editor.model.parameters() if p.requires_grad]
    base = editor.model.get_base_model()
    for parameter in base.parameters():
        parameter.requires_grad_(True)
    ids = torch.tensor([ids_of(fact_model, prompts_of(7)[0])])
    labels = ids.clone()
    loss = editor.model(ids, labels=labels).loss
    loss.backward()
    plain: Any = deepcopy(fact_model.base)
    for parameter in plain.parameters():
        parameter.requires_grad_(True)
    plain(ids, labels=labels).loss.backward()
    gradients = {name: p.grad for name, p in base.named_parameters()}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def test_an_edit_is_taught_to_a_model_that_is_in_training_mode_or_has_dropout(
    fact_model: FactModel,
) -> None:
    base: Any = deepcopy(fact_model.base)
    for layer in base.model.layers:
        layer.self_attn.attention_dropout = 0.5
    editor = editor_of(FactModel(base, fact_model.tokenizer))
    editor.model.train()
    editor.edit([Edit(edit.prompt, edit.target) for edit in edits(0, 3)])
    editor.model.eval()
    usual = editor_of(fact_model)
    usual.edit(edits(0, 3))
    for one, other in zip(editor.part.index().edits, usual.part.index().edits, strict=True):
        assert torch.equal(one.keys, other.keys)


def test_a_config_may_be_given_as_true_a_mapping_or_settings(fact_model: FactModel) -> None:
    for given in (True, {"after": "continue"}):
        made = BaftConfig(memory=given, task_type="CAUSAL_LM")
        assert made.kind.name == "memory" and made.memory.after in ("stop", "continue")
    assert BaftConfig(memory=False).kind.name == "baft"
