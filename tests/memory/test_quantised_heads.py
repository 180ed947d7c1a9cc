"""A memory on models whose weights, and whose head, are stored in 4 or 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from peft import PeftModel, get_peft_model
from toy import config

import facts
from facts import FactModel, edits
from peft_baft import MemoryEditor
from peft_baft.evaluation.scoring import token_match

fact_model = facts.fact_model
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
KINDS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("head", [True, False], ids=["with its head", "without its head"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_says_what_it_is_taught(
    fact_model: FactModel, kind: str, head: bool, tmp_path: Path
) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    fact_model.base.save_pretrained(tmp_path / "base")
    # The last block stays as it is, so that not all is made of rounded numbers.
    left = ["model.layers.3"] if head else ["model.layers.3", "lm_head"]
    quantisation = tr.BitsAndBytesConfig(**KINDS[kind], llm_int8_skip_modules=left)

    def load() -> Any:
        return tr.AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantisation, dtype=torch.float32
        ).eval()

    base = load()
    of_library = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    assert isinstance(base.lm_head, of_library) == head
    editor = MemoryEditor(get_peft_model(base, config()).eval(), fact_model.tokenizer)
    editor.edit(edits(0, 3, 9))
    pairs = [(edit.prompt, edit.target) for edit in edits(0, 3, 9)]
    assert token_match(editor.model, fact_model.tokenizer, pairs) == [1.0] * 3
    with editor.model.disable_adapter():  # the control
        assert token_match(editor.model, fact_model.tokenizer, pairs) != [1.0] * 3
    editor.model.save_pretrained(str(tmp_path / "memory"))
    loaded = PeftModel.from_pretrained(load(), str(tmp_path / "memory")).eval()
    assert token_match(loaded, fact_model.tokenizer, pairs) == [1.0] * 3
