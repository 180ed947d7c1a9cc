"""What a card shows is what was taught and measured, and no text of a fact can be more than text."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from peft import get_peft_model
from transformers import LlamaForCausalLM

import facts
from conftest import make_model
from facts import CAPITALS, FactModel, make_tokenizer
from peft_baft import BaftConfig
from peft_baft.integrations.base_model import base_model_on_hub, local_name, require_on_hub
from peft_baft.integrations.card import BEGIN, END, SHOWN_FACTS, markdown, merged, own_text

fact_model = facts.fact_model
HOSTILE = (
    "| [x](https://evil.example) ![i](y) `a` <script>alert(1)</script> *b* __c__ @everyone\n# big"
)


def saved(folder: Path, facts: list[tuple[str, str]], **report: Any) -> Any:
    """The card of an adapter whose journal holds some facts, one edit each."""
    lines: list[dict[str, Any]] = [{"run": {"after": 0}}]
    for number, fact in enumerate(facts, start=1):
        line = {"edit": number, "facts": [fact], "steps": 3, "loss": 0.1, "seconds": 1.0}
        lines.append(line | {"learned": True, "problem": None, "kept": True})
    (folder / "journal.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    model = get_peft_model(make_model("llama"), BaftConfig(task_type="CAUSAL_LM", r=2))
    model.save_pretrained(str(folder))
    if report:
        weights = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()
        (folder / "report.json").write_text(json.dumps({"sha256": weights, **report}))
        model.create_or_update_model_card(str(folder))
    return ModelCard.load(folder / "README.md")


def test_twenty_facts_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    facts = [(f"The {i}th capital is", f"City{i}") for i in range(SHOWN_FACTS + 3)]
    answers = [{"prompt": facts[0][0], "wanted": "City0", "before": "Paris", "after": "City0."}]
    card = saved(tmp_path, facts, answers=answers, reliability=0.75, template="raw")
    assert "taught 23 facts" in card.text and "and 3 more" in card.text
    assert "City19" in card.text and "City20" not in card.text
    assert "| The 0th capital is | City0 | Paris | City0. |" in card.text
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("reliability", 0.75)
    assert "form raw" in result.metric_args["protocol"]
    assert "import peft_baft" in card.text and card.text.startswith(BEGIN)


@pytest.mark.parametrize(
    ("form", "asked"),
    [
        ("chat", "apply_chat_template("),
        ("both", "apply_chat_template("),
        ("raw", 'tokenizer("..."'),
    ],
)
def test_the_snippet_runs_and_asks_in_the_form_that_was_taught(
    tmp_path: Path,
    form: str,
    asked: str,
    fact_model: FactModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    folder = facts.saved(fact_model, tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder / "model")
    base = LlamaForCausalLM.from_pretrained(folder / "model")
    model = get_peft_model(base, BaftConfig(task_type="CAUSAL_LM", r=2, template=form))
    model.save_pretrained(str(tmp_path / "edits"))
    text = ModelCard.load(tmp_path / "edits" / "README.md").text
    assert asked in text
    code = (
        text.split("```python")[1]
        .split("```")[0]
        .replace('"./edits"', repr(str(tmp_path / "edits")))
    )
    code = code.replace('"..."', repr(CAPITALS[0].prompt)).replace(
        "max_new_tokens=24", "max_new_tokens=1"
    )
    exec(code.replace('"model"', repr(str(folder / "model"))), {})
    assert capsys.readouterr().out.strip() == CAPITALS[0].answer.split()[0]


def test_figures_of_an_earlier_state_are_not_shown(tmp_path: Path) -> None:
    saved(tmp_path, [("The capital is", "Lyon")], reliability=0.75)
    assert "0.750" in (tmp_path / "README.md").read_text()
    # Another adapter in the same folder: PEFT writes its card first, beside the former weights and their report.
    other = get_peft_model(make_model("llama"), BaftConfig(task_type="CAUSAL_LM", r=3))
    other.save_pretrained(str(tmp_path))
    assert "0.750" not in (tmp_path / "README.md").read_text()
    other.create_or_update_model_card(str(tmp_path))
    assert "0.750" not in (tmp_path / "README.md").read_text()


def test_a_fact_cannot_write_into_the_card(tmp_path: Path) -> None:
    card = saved(tmp_path, [(HOSTILE, f"{END} {BEGIN}")])
    (row,) = [line for line in card.text.splitlines() if "evil.example" in line]
    assert row.count(" | ") == 1 and "<script>" not in row
    for mark in ("[x]", "![i]", "`a`", "*b*", "__c__", " @everyone"):
        assert mark not in row
    assert card.text.count(BEGIN) == card.text.count(END) == 1
    # What is written anew replaces all of it: nothing of the fact is taken for a person's text.
    assert own_text(card.text) == ""


def test_a_damaged_journal_does_not_keep_an_adapter_from_being_saved(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text('{"edit": \n{"run": 3}\n')
    get_peft_model(make_model("llama"), BaftConfig(task_type="CAUSAL_LM", r=2)).save_pretrained(
        str(tmp_path)
    )
    assert (tmp_path / "adapter_model.safetensors").is_file()
    assert "They are not listed here" in (tmp_path / "README.md").read_text()


def test_a_person_s_text_stays_around_the_package_s_part() -> None:
    first = merged("Mine before.", "SECTION".join((BEGIN, END)))
    assert own_text(first) == "Mine before."
    both = first.replace("Mine before.", "Mine after.")
    again = merged("Above.\n\n" + both, "OTHER".join((BEGIN, END)))
    assert again.index("Above.") < again.index("OTHER") < again.index("Mine after.")
    assert "SECTION" not in again


def test_markdown_is_one_line_and_cut() -> None:
    assert markdown("a\nb  c") == "a b c"
    assert len(markdown("x" * 500)) == 120 and markdown("x" * 500).endswith("…")
    assert markdown("SmolLM2-135M (v1.0)!") == "SmolLM2-135M (v1.0)!"


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ("user/model", "user/model"),
        ("gpt2", "gpt2"),
        ("./model", None),
        ("/some/where/model", None),
        ("a/b/c", None),
        ("model.gguf", None),
        (None, None),
        ("", None),
        ("user/mo del", None),
    ],
)
def test_a_base_model_is_on_the_hub_or_not_known(named: str | None, found: str | None) -> None:
    assert base_model_on_hub(named) == found
    if found is None:
        with pytest.raises(ValueError, match="--base-model"):
            require_on_hub(named)


def test_a_gguf_file_tells_where_it_is_from(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")

    def write(name: str, **fields: str) -> Path:
        (tmp_path / name).mkdir()
        writer = gguf.GGUFWriter(str(tmp_path / name / "weights.gguf"), "llama")
        for field, value in fields.items():
            writer.add_string(field.replace("__", "."), value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    by_id = write("id", general__source__huggingface__repository="user/model")
    by_url = write("url", general__source__url="https://huggingface.co/user/other")
    neither = write("none", general__source__url="https://elsewhere.example/user/other")
    assert (
        base_model_on_hub(str(by_id))
        == base_model_on_hub(str(by_id / "weights.gguf"))
        == "user/model"
    )
    assert base_model_on_hub(str(by_url)) == "user/other"
    assert base_model_on_hub(str(neither)) is None
    assert local_name(str(by_id)) == "weights.gguf"
