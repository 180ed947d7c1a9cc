"""An adapter is published whole or not at all, over HTTP, and comes back from the Hub as it was."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_server import READ_ONLY, TOKEN, HubServer
from huggingface_hub import ModelCard, constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load
from transformers import AutoModelForCausalLM

import facts
import peft_baft_cli as cli
from conftest import make_model
from facts import CAPITALS, FactModel
from peft_baft import BaftConfig, push
from peft_baft.integrations import hub as hub_module
from peft_baft.integrations import peft_methods
from peft_baft.integrations.card import BEGIN, END

fact_model = facts.fact_model
BASE = "someone/toy"
ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
FACT_FILES = {"journal.jsonl", "report.json"}


@pytest.fixture(scope="module")
def folder(fact_model: FactModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model in `model`, and an adapter in `edits` that was taught two facts."""
    folder = facts.saved(fact_model, tmp_path_factory.mktemp("toy"))
    records = [{"prompt": CAPITALS[i].prompt, "target": CAPITALS[i + 8].answer} for i in (0, 1)]
    (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, records)))
    words = ["edit", "--model", str(folder / "model"), "--edits", str(folder / "facts.jsonl")]
    words += ["--output", str(folder / "edits"), "--lr", "0.02", "--preset", "plain"]
    assert cli.main(words) == 0
    return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub for this process, and a token that may write."""
    server = HubServer()
    settings: dict[str, Any] = {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }
    for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
        value = getattr(constants, name).replace(constants.ENDPOINT, server.url)
        settings[name] = value
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hub_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()


def run_steps(server: HubServer, folder: Path, *steps: list[str]) -> list[Any]:
    """Let a process that has the server as its Hub from the beginning go through some steps."""
    (folder / "steps.json").write_text(json.dumps(steps))
    settings = {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN}
    settings |= {"HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1"}
    worker = Path(__file__).with_name("hub_worker.py")
    words = [sys.executable, str(worker), str(folder / "steps.json"), str(folder / "results.json")]
    done = subprocess.run(words, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


def card_of(content: bytes) -> Any:
    return ModelCard(content.decode())


def logits(model: Any) -> list[float]:
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        return model.eval()(input_ids=ids, labels=ids).logits[0, -1, :5].tolist()


def test_what_was_pushed_is_loaded_elsewhere_by_its_name_and_revision(
    folder: Path, tmp_path: Path
) -> None:
    server = HubServer()
    base, edits = str(folder / "model"), str(folder / "edits")
    bare = AutoModelForCausalLM.from_pretrained(base)
    unedited = logits(bare)
    edited = logits(PeftModel.from_pretrained(bare, edits))
    try:
        pushed = ["baft", "push", edits, "user/toy", "--base-model", BASE, "--private"]
        ask = ["baft", "ask", "--model", base, "--adapter", "user/toy", CAPITALS[0].prompt]
        results = run_steps(
            server,
            tmp_path,
            pushed,
            ["load", base, "user/toy", ""],
            ["baft", *pushed[1:], "--revision", "second", "--no-facts"],
            ["load", base, "user/toy", "second"],
            ask,
            [*ask, "--adapter-revision", "second"],
            ["model push", base, edits, "user/other", BASE],
            ["load", base, "user/other", ""],
            ["trainer push", base, edits, str(tmp_path / "trained"), "user/trained", BASE],
            ["load", base, "user/trained", ""],
            ["baft", "log", "user/toy"],
            ["baft", "log", "user/toy", "--adapter-revision", "second"],
            [
                "baft",
                "report",
                "user/toy",
                "--model",
                base,
                "--output",
                str(tmp_path / "page.html"),
            ],
        )
        assert [results[i] for i in (0, 2, 4, 5)] == [0, 0, 0, 0]
        # The branch without facts has no journal.
        assert results[10:] == [0, 2, 0]
        page = (tmp_path / "page.html").read_text()
        assert CAPITALS[0].prompt in page and CAPITALS[8].answer in page
        for i in (1, 3, 6, 7, 8, 9):
            assert results[i] == pytest.approx(edited, abs=1e-5)
        assert edited != pytest.approx(unedited, abs=1e-3)  # the control: an edit can be seen here
        hub = server.hub
        assert hub.repositories["user/toy"].private and not hub.repositories["user/other"].private
        files = hub.files("user/toy")
        assert files.keys() == ADAPTER_FILES | FACT_FILES
        weights = (folder / "edits" / "adapter_model.safetensors").read_bytes()
        assert load(files["adapter_model.safetensors"]).keys() == load(weights).keys()
        # A branch begins as main is, so what told the facts is taken away.
        assert hub.files("user/toy", "second").keys() == ADAPTER_FILES
        card = card_of(hub.files("user/toy", "second")["README.md"])
        assert CAPITALS[8].answer not in card.text and "taught 2 facts" in card.text
        assert CAPITALS[8].answer in files["README.md"].decode()
        assert (
            str(folder)
            not in b"".join(
                content for name, content in files.items() if "." in name and "safet" not in name
            ).decode()
        )
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
        other = card_of(hub.files("user/other")["README.md"])
        assert hub.files("user/other").keys() == ADAPTER_FILES
        trained = card_of(hub.files("user/trained")["README.md"])
        for made in (card, other, trained):
            assert made.data.library_name == "peft" and made.data.base_model == BASE
            assert f"base_model:adapter:{BASE}" in made.data.tags
            assert {"baft", "knowledge-editing"} <= set(made.data.tags)
            assert "import peft_baft" in made.text
        assert "mine" in other.data.tags
    finally:
        server.close()


def test_without_facts_nothing_that_tells_them_is_uploaded(folder: Path, server: HubServer) -> None:
    push(folder / "edits", "user/secret", base_model=BASE, facts=False)
    files = server.hub.files("user/secret")
    assert files.keys() == ADAPTER_FILES
    told = b"".join(files[name] for name in ("README.md", "adapter_config.json")).decode()
    for number in (0, 1):
        assert CAPITALS[number].prompt not in told and CAPITALS[number + 8].answer not in told
    assert str(folder) not in told  # nor where it lay


def test_a_person_s_text_on_the_hub_survives_a_second_push(folder: Path, server: HubServer) -> None:
    push(folder / "edits", "user/toy", base_model=BASE)
    files = server.hub.files("user/toy")
    card = card_of(files["README.md"])
    card.data.license = "mit"
    mine = "Ask Ada before you use this."
    files["README.md"] = f"---\n{card.data.to_yaml()}\n---\n{card.text}\n{mine}\n".encode()
    push(folder / "edits", "user/toy", base_model="someone/other")
    again = card_of(server.hub.files("user/toy")["README.md"])
    assert mine in again.text and again.data.license == "mit"
    assert again.text.count(BEGIN) == again.text.count(END) == 1
    assert again.data.base_model == "someone/other"
    assert [tag for tag in again.data.tags if "someone/toy" in tag] == []


def test_an_upload_that_breaks_off_leaves_what_was_there(folder: Path, server: HubServer) -> None:
    push(folder / "edits", "user/toy", base_model=BASE, facts=False)
    before = dict(server.hub.files("user/toy"))
    # The large file arrives; the commit, which alone makes anything visible, never does.
    server.hub.failures["/commit/"] = [0] * 100
    with pytest.raises(OSError, match=r"Nothing was uploaded to user/toy"):
        push(folder / "edits", "user/toy", base_model=BASE)
    assert server.hub.files("user/toy") == before
    server.hub.failures.clear()
    push(folder / "edits", "user/toy", base_model=BASE)
    assert server.hub.files("user/toy").keys() == ADAPTER_FILES | FACT_FILES


def test_errors_of_the_hub_s_own_are_waited_out(
    folder: Path, server: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.hub.failures |= {"/api/repos/create": [503], "/commit/": [502, 500]}
    with caplog.at_level(logging.WARNING):
        push(folder / "edits", "user/toy", base_model=BASE)
    assert server.hub.files("user/toy").keys() == ADAPTER_FILES | FACT_FILES
    assert len(server.hub.repositories["user/toy"].branches["main"]) == 2  # one commit, not three
    assert "The Hub did not answer" in caplog.text
    server.hub.failures["/commit/"] = [500] * 100
    with pytest.raises(OSError, match=r"Nothing was uploaded to user/toy: .*500"):
        push(folder / "edits", "user/toy", base_model=BASE)


@pytest.mark.parametrize(
    ("token", "status"), [(READ_ONLY, "403"), ("hf_wrong", "401"), (False, "401")]
)
def test_a_token_that_does_not_do_is_said(
    folder: Path, server: HubServer, monkeypatch: pytest.MonkeyPatch, token: Any, status: str
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(PermissionError, match=status) as caught:
        push(folder / "edits", "user/toy", base_model=BASE, token=token)
    assert "hf auth login" in str(caught.value) or "right to write" in str(caught.value)
    assert server.hub.repositories == {}


def test_what_cannot_be_published_is_refused_before_anything_is_asked(
    folder: Path, server: HubServer, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="not an id on the Hub"):
        push(folder / "edits", "user/toy")  # it was made for a folder of this machine
    with pytest.raises(ValueError, match=r"there is no adapter_config\.json and no adapter_model"):
        push(tmp_path, "user/toy", base_model=BASE)
    damaged = tmp_path / "damaged"
    shutil.copytree(folder / "edits", damaged)
    (damaged / "report.json").write_text("[1, 2")
    with pytest.raises(ValueError, match=r"report\.json is damaged"):
        push(damaged, "user/toy", base_model=BASE)
    assert server.hub.requests == []


def test_models_of_other_methods_are_handed_on_as_they_came() -> None:
    # Under names that this package has never heard of.
    original: Any = lambda model, *args, **kwargs: (args, kwargs)  # noqa: E731
    pushed = peft_methods._with_our_push(original)
    lora = get_peft_model(make_model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    assert pushed(lora, "user/lora", 1, renamed=2) == (("user/lora", 1), {"renamed": 2})


def test_a_model_of_another_method_is_pushed_as_peft_does_it(
    server: HubServer, tmp_path: Path
) -> None:
    lora = get_peft_model(
        make_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    lora.save_pretrained(str(tmp_path / "lora"))
    card = card_of((tmp_path / "lora" / "README.md").read_bytes())
    assert "lora" in card.data.tags and "baft" not in card.data.tags
    baft = get_peft_model(make_model("llama"), BaftConfig(task_type="CAUSAL_LM", r=4))
    baft.save_pretrained(str(tmp_path / "baft"))
    assert "baft" in card_of((tmp_path / "baft" / "README.md").read_bytes()).data.tags
