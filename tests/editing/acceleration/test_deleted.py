"""Without `editing/acceleration/` edits have the same results."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import facts
from facts import CAPITALS, COUNTRIES, DESCENT, OBJECTIVE, FactModel, adapted
from peft_baft import BaftEditor, Edit, Scope
from peft_baft.editing import fast_paths
from peft_baft.evaluation.scoring import greedy_answers

ROOT = Path(__file__).parents[3]
fact_model = facts.fact_model


def outcome(base: Any, tokenizer: Any) -> dict[str, Any]:
    """Make one edit with contrast texts on the toy model, and return its losses and what the model says afterwards."""
    torch.set_num_threads(1)
    model = adapted(base)
    scope = Scope(contexts=1, wordings=0, subjects=3, questions=0, answer_tokens=2)
    editor = BaftEditor(model, tokenizer, (), OBJECTIVE, DESCENT, scope=scope)
    edit = Edit(CAPITALS[0].prompt, CAPITALS[8].answer, COUNTRIES[0])
    result = editor.edit([edit])
    prompts = [fact.prompt for fact in CAPITALS[:6]]
    return {
        "accelerated": fast_paths.ACCELERATED,
        "answers": greedy_answers(model, tokenizer, prompts, 2),
        "learned": result.learned,
        "losses": result.losses,
    }


def test_without_the_folder_an_edit_has_the_same_result(
    fact_model: FactModel, tmp_path: Path
) -> None:
    with_folder = outcome(fact_model.base, fact_model.tokenizer)
    assert with_folder["accelerated"] and with_folder["learned"]
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(tmp_path / "src" / "peft_baft" / "editing" / "acceleration")
    fact_model.base.save_pretrained(tmp_path / "model")
    fact_model.tokenizer.save_pretrained(tmp_path / "model")
    code = (
        "import json, sys\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "import peft_baft_bench.methods.methods\n"
        "import peft_baft.tools.check.check\n"
        "from test_deleted import outcome\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "print(json.dumps(outcome(model, AutoTokenizer.from_pretrained(sys.argv[1]))))\n"
    )
    path = os.pathsep.join(map(str, (tmp_path / "src", ROOT / "tests", Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    without = json.loads(done.stdout.splitlines()[-1])
    assert not without["accelerated"]
    assert without["learned"] and without["answers"] == with_folder["answers"]
    assert without["losses"] == pytest.approx(with_folder["losses"], rel=0.05, abs=1e-3)
