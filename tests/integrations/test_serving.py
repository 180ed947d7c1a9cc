"""Many requests at once, of several adapters and none, are answered as each one alone."""

from __future__ import annotations

import importlib.util
import json
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import torch
import transformers as tr

import facts
from conftest import randomise
from facts import CAPITALS, MEALS, FactModel

fact_model = facts.fact_model
SERVER = Path(__file__).parents[2] / "examples" / "serve.py"
ADAPTERS = (None, "default", "other")
PROMPTS = [fact.prompt for fact in (*CAPITALS[:8], *MEALS[:4])] + [CAPITALS[9].rephrase, "the food"]


@pytest.fixture(scope="module")
def model(fact_model: FactModel) -> Any:
    """Two adapters that answer otherwise than the model and than each other."""
    model = facts.adapted(fact_model.base, gate_offset=0.0)
    model.add_adapter("other", model.peft_config["default"])
    randomise(model, 0.5)
    return model.eval()


def example() -> Any:
    spec = importlib.util.spec_from_file_location("example_serve", SERVER)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def address(model: Any, fact_model: FactModel) -> Iterator[str]:
    server = example().make_server(model, fact_model.tokenizer, workers=8)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def ask(address: str, prompt: str, adapter: str | None, stream: bool = False) -> str:
    request = {"prompt": prompt, "adapter": adapter, "max_new_tokens": 4, "stream": stream}
    with urlopen(address, json.dumps(request).encode()) as answer:
        return answer.read().decode()


def alone(model: Any, fact_model: FactModel, prompt: str, adapter: str | None) -> str:
    ids = torch.tensor([fact_model.tokenizer(prompt)["input_ids"]])
    names = [adapter or "__base__"]
    out = model.generate(input_ids=ids, adapter_names=names, max_new_tokens=4, do_sample=False)
    return str(fact_model.tokenizer.decode(out[0, ids.shape[1] :]))


def test_hundreds_of_requests_at_once_get_the_answers_of_one_at_a_time(
    address: str, model: Any, fact_model: FactModel
) -> None:
    kinds = [(prompt, adapter) for prompt in PROMPTS for adapter in ADAPTERS]
    expected = {kind: alone(model, fact_model, *kind) for kind in kinds}
    # The control: who answers can be told from the answers.
    for first, second in ((None, "default"), (None, "other"), ("default", "other")):
        assert any(expected[p, first] != expected[p, second] for p in PROMPTS)
    asked = kinds * 5
    with ThreadPoolExecutor(24) as pool:
        answers = list(
            pool.map(lambda i: ask(address, *asked[i], stream=bool(i % 2)), range(len(asked)))
        )
    assert answers == [expected[kind] for kind in asked]


def test_an_adapter_that_is_not_there_is_said(address: str) -> None:
    with pytest.raises(HTTPError, match="known adapters: default, other"):
        ask(address, PROMPTS[0], "nobody")


@pytest.mark.parametrize("body", [b"", b"[]", b'{"messages": "hello"}', b'{"adapter": "default"}'])
def test_what_cannot_be_asked_is_answered_by_400(address: str, body: bytes) -> None:
    with pytest.raises(HTTPError, match=r"400.*wanted JSON with prompt or messages"):
        urlopen(address, body)


def test_messages_are_asked_in_the_chat_template(
    address: str, model: Any, fact_model: FactModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "people of {{ messages[0]['content'] }} call{% if add_generation_prompt %} their capital{% endif %}"
    monkeypatch.setattr(fact_model.tokenizer, "chat_template", template)
    country = facts.COUNTRIES[3]
    request = {
        "messages": [{"role": "user", "content": country}],
        "adapter": "other",
        "max_new_tokens": 4,
    }
    with urlopen(address, json.dumps(request).encode()) as answer:
        said = answer.read().decode()
    assert said == alone(model, fact_model, f"people of {country} call their capital", "other")
    assert said != alone(model, fact_model, f"people of {country} call", "other")  # the control


def test_saved_adapters_are_served_by_their_names(
    model: Any, fact_model: FactModel, tmp_path: Path
) -> None:
    model.save_pretrained(str(tmp_path))
    adapters = {"one": str(tmp_path), "two": str(tmp_path / "other")}
    served = example().load_adapters(deepcopy(fact_model.base), adapters)
    for theirs, ours in (("one", "default"), ("two", "other"), (None, None)):
        assert alone(served, fact_model, PROMPTS[0], theirs) == alone(
            model, fact_model, PROMPTS[0], ours
        )


def test_a_pipeline_answers_as_generate_does(model: Any, fact_model: FactModel) -> None:
    model.set_adapter("default")
    pipeline = tr.pipeline("text-generation", model=model, tokenizer=fact_model.tokenizer)
    texts = pipeline(
        PROMPTS, batch_size=4, max_new_tokens=4, do_sample=False, return_full_text=False
    )
    found = [text[0]["generated_text"] for text in texts]
    assert found == [alone(model, fact_model, prompt, "default") for prompt in PROMPTS]


def test_a_model_folder_with_an_adapter_in_it_is_loaded_edited(
    model: Any, fact_model: FactModel, tmp_path: Path
) -> None:
    """`transformers serve` calls the architecture's own `from_pretrained`, of a folder that has the model's config."""
    folder = facts.saved(fact_model, tmp_path) / "model"
    model.save_pretrained(str(tmp_path / "adapter"), selected_adapters=["default"])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, folder / name)
    served = tr.LlamaForCausalLM.from_pretrained(folder)
    served.generation_config.eos_token_id = None

    def answer(prompt: str) -> str:
        ids = torch.tensor([fact_model.tokenizer(prompt)["input_ids"]])
        out = served.generate(ids, max_new_tokens=4, do_sample=False)
        return str(fact_model.tokenizer.decode(out[0, ids.shape[1] :]))

    assert [answer(p) for p in PROMPTS] == [alone(model, fact_model, p, "default") for p in PROMPTS]
