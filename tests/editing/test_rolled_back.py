"""An edit that is rolled back leaves nothing that a later edit depends on: the same edit gives the same adapter again."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import facts
from facts import OBJECTIVE, FactModel, adapted, edits, meals
from peft_baft import NARROW, AdapterEditor, BaftEditor, DescentConfig, rolled_back
from peft_baft.adapter import find_context
from peft_baft.adapter.rollback import Cursors
from peft_baft.adapter.state import snapshot

fact_model = facts.fact_model
TEXTS = meals(0, 6)
FEW_STEPS = DescentConfig(lr=0.02, max_steps=5)
Edits = Callable[[Any], object]


def _baft(fact_model: FactModel, **settings: Any) -> BaftEditor:
    return BaftEditor(
        adapted(fact_model.base),
        fact_model.tokenizer,
        TEXTS,
        OBJECTIVE,
        FEW_STEPS,
        FEW_STEPS,
        scope=NARROW,
        **settings,
    )


def _lora(fact_model: FactModel) -> AdapterEditor:
    config = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5, task_type="CAUSAL_LM")
    model = get_peft_model(deepcopy(fact_model.base), config)
    return AdapterEditor(model, fact_model.tokenizer, FEW_STEPS)


def _tensors(editor: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in editor.state_dict().items()}


def _same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


EDITORS: dict[str, Callable[[FactModel], Any]] = {"baft": _baft, "lora": _lora}
EDITS: dict[str, Edits] = {
    "one": lambda editor: editor.edit(edits(0)),
    "a batch": lambda editor: editor.edit(edits(0, 1)),
    "in turn": lambda editor: list(editor.edit_in_turn(edits(0, 1))),
}


@pytest.mark.parametrize("how", EDITS)
@pytest.mark.parametrize("method", EDITORS)
def test_the_same_edit_gives_the_same_adapter_again(
    method: str, how: str, fact_model: FactModel
) -> None:
    editor = EDITORS[method](fact_model)
    editor.edit(edits(2))
    before, found = _tensors(editor), []
    for seed in (1, 2):
        with rolled_back(editor.model):
            torch.manual_seed(seed)  # edits draw no random numbers
            EDITS[how](editor)
            found.append(_tensors(editor))
        assert _same(_tensors(editor), before)
    assert _same(*found)
    assert not _same(found[0], before)


def test_without_rolling_back_the_next_edit_takes_the_next_texts(fact_model: FactModel) -> None:
    editor = _baft(fact_model)
    restore = snapshot(editor.model)
    editor.edit(edits(0))
    first, used = _tensors(editor), editor.unrelated_used
    restore()
    editor.unrelated_used = used  # the control: this is what rolling back has to undo
    editor.edit(edits(0))
    assert not _same(_tensors(editor), first)


def test_every_editor_of_the_model_is_rolled_back_also_one_that_came_later(
    fact_model: FactModel,
) -> None:
    editor = _baft(fact_model)
    other = BaftEditor(editor.model, fact_model.tokenizer, TEXTS, scope=NARROW, unrelated_used=4)
    with rolled_back(editor.model):
        later = BaftEditor(
            editor.model, fact_model.tokenizer, TEXTS, scope=NARROW, unrelated_used=2
        )
        for one in (editor, other, later):
            one._take_unrelated(3)
        assert (editor.unrelated_used, other.unrelated_used, later.unrelated_used) == (3, 7, 5)
    assert (editor.unrelated_used, other.unrelated_used, later.unrelated_used) == (0, 4, 2)


def test_edits_side_by_side_that_break_off_leave_the_cursor_where_it_was(
    fact_model: FactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError

    editor = _baft(fact_model)
    with monkeypatch.context() as patch:
        patch.setattr("peft_baft.editing.baft.train_lanes", broken)
        with pytest.raises(ZeroDivisionError):
            list(editor.edit_each(edits(0, 1)))
    assert editor.unrelated_used == 0
    list(editor.edit_each(edits(0, 1)))
    assert editor.unrelated_used == 2


def test_a_model_holds_no_editor_and_copies_have_none(fact_model: FactModel) -> None:
    # A fresh model: transformers leaves hooks that cannot be pickled on one that was asked for its hidden states.
    base: Any = type(fact_model.base)(fact_model.base.config)
    editor = _baft(FactModel(base.eval(), fact_model.tokenizer))
    model: PeftModel = editor.model
    for copied in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        context = find_context(copied)
        assert context is not None
        assert not len(context.cursors._beginnings)
    context = find_context(model)
    assert context is not None
    assert len(context.cursors._beginnings) == 1
    del editor
    gc.collect()
    assert not len(context.cursors._beginnings)
    assert isinstance(copy.copy(context.cursors), Cursors)
