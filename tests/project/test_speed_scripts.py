"""The benchmarks of speed/ run as they stand, on a tiny model; what they find there says nothing."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from facts import CAPITALS, make_tokenizer

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "speed"
# Those that others import or start.
PARTS = {"common", "peer_worker"}
SCRIPTS = sorted({path.stem for path in FOLDER.glob("*.py")} - PARTS)
QUICK = ["--rounds", "1", "--threads", "1"]
# What each is asked to do little of, and a line of the table that it prints.
EXPECTED = {
    "growth": (["--edits", "10"], r"| r = 48 |"),
    "inference": ([], "| baft |"),
    "lanes": (["--rows", "2"], "| 2 lane(s) |"),
    "memory": ([], "| T = 10 |"),
    "peers": (["--rows", "2"], "| peft_lora |"),
    "processes": (["--rows", "3"], "| 2 process(es) |"),
    "shared_facts": (["--rows", "10"], "rows have the same steps"),
    "step": (["--rows", "1"], "| PEFT LoRA r=8 |"),
}
SLOW = {
    "growth",
    "lanes",
    "memory",
    "processes",
    "shared_facts",
}  # over 20 s, some for starting processes


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model that reads 1024 tokens, and with a file of facts as ZsRE's."""
    folder = tmp_path_factory.mktemp("speed")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 80, "intermediate_size": 96, "num_hidden_layers": 4}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
    special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=1024, **shape, **heads, **special
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = []
    for i, fact in enumerate(CAPITALS):
        other = CAPITALS[(i + 8) % len(CAPITALS)].answer
        asked = {"New Question": fact.rephrase, "New Answer": other}
        row: dict[str, Any] = {
            "src": fact.prompt,
            "alt": other,
            "rephrase": fact.rephrase,
            "subject": "Arvia",
        }
        row |= {"loc": "nq question: the food of", "loc_ans": "apus", "answers": [fact.answer]}
        rows.append(row | {"portability": asked | {"Recalled Relation": "(a, b, c)"}})
    rows[0]["src"] = " ".join(["the"] * 15 + [CAPITALS[0].prompt])  # of 20 tokens
    (folder / "zsre.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a script of speed/ as it is imported when it is run, and forgets it afterwards."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()

    def script(name: str) -> ModuleType:
        for part in (name, "common"):
            monkeypatch.delitem(sys.modules, part, raising=False)
        module = importlib.import_module(name)
        for part in (name, "common"):  # so that the end of the test takes them out
            loaded = sys.modules.pop(part, None)
            if loaded is not None:
                monkeypatch.setitem(sys.modules, part, loaded)
        return module

    yield script
    torch.set_num_threads(threads)


def once(works: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """`alternated` without the round that does not count."""
    return {name: [work()] for name, work in works.items()}


def test_every_script_is_listed_and_tested() -> None:
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert sorted(EXPECTED) == SCRIPTS
    assert not [name for name in SCRIPTS if f"| `{name}.py` |" not in text]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SCRIPTS],
)
def test_a_script_runs(
    name: str,
    speed: Any,
    material: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script, (options, line) = speed(name), EXPECTED[name]
    monkeypatch.setattr(sys.modules["common"], "bandwidth", lambda device: 1.0)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))  # for processes that it starts
    for constant, value in {"SIZES": (1, 10), "STEPS": 2, "BATCH": 5, "LANES": (1, 2)}.items():
        if hasattr(script, constant):
            monkeypatch.setattr(script, constant, value)
    if hasattr(script, "alternated"):
        monkeypatch.setattr(script, "alternated", once)
    where = ["--model", str(material / "model"), "--data", str(material / "zsre.json")]
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *where, *QUICK, *options])
    script.main()
    assert line in capsys.readouterr().out
