"""`baft chat`, and what `baft ask` does with the form that an adapter was taught in."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from peft.utils import CONFIG_NAME

import facts
import peft_baft_cli as cli
from facts import CAPITALS, FactModel

fact_model = facts.fact_model
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<s> {{ m['content'] }}"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
ASKED, OLD, NEW = CAPITALS[0].prompt, CAPITALS[0].answer, CAPITALS[8].answer


@pytest.fixture(scope="module")
def folder(fact_model: FactModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model, and an adapter that was taught a fact in its template."""
    path = tmp_path_factory.mktemp("chat")
    tokenizer = facts.make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    facts.saved(FactModel(fact_model.base, tokenizer), path)
    (path / "facts.jsonl").write_text(json.dumps({"prompt": ASKED, "target": NEW}))
    words = ["edit", "--model", str(path / "model"), "--edits", str(path / "facts.jsonl")]
    words += ["--output", str(path / "adapter"), "--preset", "plain", "--lr", "0.02"]
    assert cli.main([*words, "--unrelated", "none"]) == 0
    return path


def say(folder: Path, lines: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    words = ["chat", "--adapter", str(folder / "adapter"), "--max-new-tokens", "1"]
    return cli.main([*words, *more])


def test_a_pipe_is_answered_line_by_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = f"/unedited\n{ASKED}\n/unedited\n\n/again\n/what\n/quit\n{ASKED}\n"
    capsys.readouterr()
    assert say(folder, lines, monkeypatch) == 0
    answers = capsys.readouterr().out.splitlines()
    assert answers[:4] == [
        "(No question has been asked yet.)",
        NEW.split()[0],
        f"(without the edits) {OLD.split()[0]}",
        "(forgotten)",
    ]
    assert answers[4].startswith("(unknown command)")
    assert len(answers) == 5  # nothing after /quit


def test_the_end_of_a_pipe_ends_the_conversation(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert say(folder, "", monkeypatch) == 0


def test_an_adapter_is_asked_in_the_form_in_which_it_was_taught(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def asked(*more: str) -> dict[str, str]:
        capsys.readouterr()
        words = ["ask", ASKED, "--adapter", str(folder / "adapter"), "--json", *more]
        assert cli.main(words) == 0
        return json.loads(capsys.readouterr().out)

    assert asked()["template"] == "chat"
    assert asked("--template", "raw")["template"] == "raw"


def test_a_form_that_an_adapter_was_not_taught_in_is_warned_of(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def warned(*words: str) -> bool:
        capsys.readouterr()
        assert cli.main([*words, "--adapter", str(folder / "adapter")]) == 0
        return "taught in the prompt format 'chat'" in capsys.readouterr().err

    asked = ("ask", ASKED, "--max-new-tokens", "1")
    assert not warned(*asked)
    assert warned(*asked, "--template", "raw")
    bench = ("bench", "facts", "--data", str(folder / "facts.jsonl"))
    output = folder / "lines.jsonl"
    assert not warned(*bench, "--output", str(output))
    assert warned(*bench, "--output", str(output), "--template", "raw")
    forms = [json.loads(line)["protocol"]["template"] for line in output.read_text().splitlines()]
    assert forms == ["chat", "raw"]


def test_an_adapter_without_a_memory_is_asked_in_raw_text(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = tmp_path / "earlier"
    shutil.copytree(folder / "adapter", earlier)
    config = json.loads((earlier / CONFIG_NAME).read_text())
    del config["template"], config["template_hash"]
    (earlier / CONFIG_NAME).write_text(json.dumps(config))
    capsys.readouterr()
    assert cli.main(["ask", ASKED, "--adapter", str(earlier), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["template"] == "raw"


def test_nobody_can_chat_with_a_model_without_a_template(
    fact_model: FactModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts.saved(fact_model, tmp_path)
    (tmp_path / "facts.jsonl").write_text(json.dumps({"prompt": ASKED, "target": NEW}))
    words = ["edit", "--model", str(tmp_path / "model"), "--edits", str(tmp_path / "facts.jsonl")]
    words += ["--output", str(tmp_path / "adapter"), "--preset", "plain", "--unrelated", "none"]
    assert cli.main(words) == 0
    assert cli.main(["chat", "--adapter", str(tmp_path / "adapter")]) == 2
    assert "baft ask --template raw" in capsys.readouterr().err
