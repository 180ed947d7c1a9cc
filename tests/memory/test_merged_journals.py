"""The journal of a merged memory has the edits of both, and what each of them forgot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import get_peft_model

import facts
from facts import FactModel, edits
from peft_baft import BaftConfig, Journal, edit_continually, editor_for
from peft_baft.memory.folder import forget_saved, merge_saved

fact_model = facts.fact_model


def test_what_the_second_memory_forgot_stays_forgotten(
    fact_model: FactModel, tmp_path: Path
) -> None:
    for name, numbers in (("first", (0, 1)), ("second", (5, 9, 12))):
        settings = BaftConfig(memory={"key_dimensions": 16}, task_type="CAUSAL_LM")
        editor: Any = editor_for(get_peft_model(fact_model.base, settings), fact_model.tokenizer)
        for _ in edit_continually(editor, edits(*numbers), journal=Journal(tmp_path / name)):
            pass
        editor.model.save_pretrained(str(tmp_path / name))
        editor.remove()
    forget_saved(tmp_path / "second", [2])
    merge_saved(tmp_path / "first", tmp_path / "second", tmp_path / "both")
    state = Journal(tmp_path / "both").state()
    assert [line.edit for line in state.edits] == [1, 2, 3, 4, 5]
    assert set(state.forgotten) == {4}
