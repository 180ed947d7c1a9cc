"""`peft_baft.check`: a whole model is found whole, each thing that can go wrong is found, and the model is left as it was."""

# mypy: disable-error-code="arg-type, call-arg"
from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tr
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import facts
import peft_baft
import peft_baft_cli as cli
from adapters import config, edited_model
from conftest import make_model
from peft_baft import BaftConfig
from peft_baft.adapter import config as config_module
from peft_baft.adapter import context as context_module
from peft_baft.adapter.call import Call
from peft_baft.adapter.layer import BaftLayer
from peft_baft.editing.acceleration.cached_prefix import CachedPrefix
from peft_baft.tools.check import edit_trials
from peft_baft.tools.check.check import ATTACHED, UNLOADS
from peft_baft.tools.check.trials import (
    CACHED,
    CAUSAL,
    CONTROL,
    FAST,
    LEFT,
    PLACES,
    REACHED,
    RELOADS,
    RIGHT,
    RUNS,
)
from peft_baft_cli.errors import CHECK_FAILED


def traces(model: nn.Module) -> dict[str, Any]:
    """Everything that a check could leave on a model."""
    found: dict[str, Any] = {
        "attributes": sorted(vars(model)),
        "random": torch.get_rng_state().tolist(),
    }
    for name, module in model.named_modules():
        hooks = len(module._forward_hooks), len(module._forward_pre_hooks)
        found[f"module {name}"] = type(module), module.training, hooks
    for name, parameter in model.named_parameters():
        found[name] = parameter.detach().flatten().tolist(), parameter.requires_grad, parameter.grad
    return found


def model_of_words(vocabulary: int) -> tr.PreTrainedModel:
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    model = tr.LlamaForCausalLM(
        tr.LlamaConfig(vocab_size=vocabulary, initializer_range=0.1, **shape)
    )
    return model.eval()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3", "bloom"])
def test_a_whole_model_is_found_whole_and_left_as_it_was(architecture: str) -> None:
    model = make_model(architecture).train()
    before = traces(model)
    report = peft_baft.check(model)
    assert report.ok and all(finding.holds for finding in report.findings)
    assert traces(model) == before
    assert report.architecture == model.config.model_type and len(report.blocks) == 4


def test_the_models_own_tokenizer_is_used_where_there_is_one() -> None:
    tokenizer = facts.make_tokenizer(bos=True)
    base = model_of_words(len(tokenizer))
    assert peft_baft.check(base, tokenizer).ok
    with pytest.raises(TypeError, match="slow tokenizer"):
        peft_baft.check(base, SimpleNamespace(is_fast=False))
    assert not peft_baft.adapter.baft_layers(base)


def too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    real = config_module.edited
    monkeypatch.setattr(
        config_module, "edited", lambda relative, last, first: real(relative, last + 1, first)
    )


def answers_taken_for_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """What happened with a transformers whose cache could not be seen."""
    real = context_module.model_call.columns_before_in_generate
    patched: Callable[..., Any] = lambda *given, **named: 0 * real(*given, **named)  # noqa: E731
    monkeypatch.setattr(context_module.model_call, "columns_before_in_generate", patched)


def one_length_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    real = context_module.EditContext._passed_or_stated

    def first(self: Any, passed: Any) -> Tensor | None:
        lengths = real(self, passed)
        return None if lengths is None else lengths[:1].expand(len(lengths))

    monkeypatch.setattr(context_module.EditContext, "_passed_or_stated", first)


def a_lossy_file(monkeypatch: pytest.MonkeyPatch) -> None:
    real = PeftModel.load_adapter

    def halved(self: PeftModel, folder: str, adapter_name: str, **named: Any) -> Any:
        found = real(self, folder, adapter_name=adapter_name, **named)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if f".{adapter_name}." in name:
                    parameter.div_(2)
        return found

    monkeypatch.setattr(PeftModel, "load_adapter", halved)


def a_hook_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def detach(self: BaftLayer) -> None:
        del self._block[0]._modules["baft"]

    monkeypatch.setattr(BaftLayer, "detach", detach)


def a_wrong_fast_path(monkeypatch: pytest.MonkeyPatch) -> None:
    real = CachedPrefix.losses
    monkeypatch.setattr(CachedPrefix, "losses", lambda self: 2 * real(self))

    def chosen(*given: Any) -> CachedPrefix:
        return CachedPrefix.build(*given[:-1], torch.device("cpu"), given[-1])

    monkeypatch.setattr(edit_trials, "open_forward", chosen)


def gradient_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    real = BaftLayer.forward

    def forward(self: BaftLayer, hidden: Tensor, call: Call) -> Tensor:
        edited = real(self, hidden, call)
        return edited.detach() if self.name.endswith(".3") else edited

    monkeypatch.setattr(BaftLayer, "forward", forward)


@pytest.mark.parametrize(
    ("sabotage", "found"),
    [
        (too_many, {PLACES}),
        (answers_taken_for_prompt, {PLACES, CACHED, LEFT}),
        (one_length_for_all_rows, {RIGHT}),
        (a_lossy_file, {RELOADS}),
        (a_hook_left_behind, {UNLOADS}),
        (a_wrong_fast_path, {FAST}),
        (gradient_cut_off, {REACHED}),
    ],
)
def test_what_goes_wrong_is_found(
    sabotage: Any, found: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sabotage(monkeypatch)
    report = peft_baft.check(make_model())
    assert not report.ok
    assert found <= {finding.name for finding in report.findings if finding.holds is False}
    assert "FAILED" in str(report)


def test_a_fast_path_that_is_not_taken_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    real = CachedPrefix.losses
    monkeypatch.setattr(CachedPrefix, "losses", lambda self: 2 * real(self))
    finding = peft_baft.check(make_model())[FAST]
    assert (
        finding.holds is None
        and "plain path" in finding.detail
        and "CacheDiffers" in finding.detail
    )
    assert not caplog.records


def test_what_the_unedited_model_does_as_well_is_told_as_its_own() -> None:
    """A model whose positions begin anew at every cached step: its own answers depend on the cache."""
    model = make_model()
    rotary = model.model.rotary_emb
    real = rotary.forward
    rotary.forward = lambda hidden, position_ids: real(hidden, position_ids - position_ids[:, :1])
    report = peft_baft.check(model)
    assert report[CACHED].holds is None and "The unedited model differs" in report[CACHED].detail
    assert report[PLACES].holds and report[RIGHT].holds and report.ok


def test_an_edit_that_cannot_be_seen_proves_nothing() -> None:
    """The control: a fresh adapter changes nothing, so that edits at other places could not be told apart."""
    model = get_peft_model(make_model(), config())
    report = peft_baft.check(model)
    assert (
        report[CONTROL].holds is False
        and "Inconclusive" in report[CONTROL].detail
        and not report.ok
    )


def test_a_models_own_adapter_is_used_and_stays_as_it_is() -> None:
    model = edited_model(layers_to_transform=[1, 2])
    before = traces(model)
    report = peft_baft.check(model)
    assert report.ok and report[UNLOADS].holds is None
    assert report.blocks == ("model.layers.1", "model.layers.2")
    assert traces(model) == before and list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="not both"):
        peft_baft.check(model, adapter="a folder")
    with pytest.raises(ValueError, match="is not a PeftModel"):
        peft_baft.check(model.get_base_model())


def test_an_adapter_of_a_folder_is_tried_on_a_base_model(tmp_path) -> None:
    edited_model(layers_to_transform=[1]).save_pretrained(tmp_path)
    base = make_model()
    before = traces(base)
    report = peft_baft.check(base, adapter=str(tmp_path))
    assert report.ok and report.blocks == ("model.layers.1",) and traces(base) == before
    get_peft_model(make_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(
        tmp_path / "lora"
    )
    with pytest.raises(ValueError, match="is not a BaFT adapter"):
        peft_baft.check(base, adapter=str(tmp_path / "lora"))
    with pytest.raises(ValueError, match="active is"):
        peft_baft.check(get_peft_model(base, LoraConfig(target_modules=["q_proj"])))


def test_a_model_that_is_refused_is_reported_with_the_reason() -> None:
    shape: dict[str, Any] = {
        "d_model": 16,
        "d_ff": 16,
        "d_kv": 4,
        "num_layers": 2,
        "num_heads": 2,
        "vocab_size": 32,
    }
    model = tr.T5ForConditionalGeneration(tr.T5Config(**shape))
    before = traces(model)
    report = peft_baft.check(model)
    assert [finding.name for finding in report.findings] == [ATTACHED]
    assert not report.ok and "decoder-only" in report[ATTACHED].detail and traces(model) == before


def test_a_model_that_cannot_run_is_reported_without_more_trials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model()
    monkeypatch.setattr(type(model.model), "forward", lambda self, input_ids=None, **_: 1 / 0)
    report = peft_baft.check(model)
    assert [finding.name for finding in report.findings] == [ATTACHED, RUNS, UNLOADS]
    assert "ZeroDivisionError" in report[RUNS].detail


def test_in_half_precision_rounding_is_no_failure_and_a_wrong_place_still_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = peft_baft.check(make_model().to(torch.bfloat16))
    assert report.ok and report[CACHED].tolerance > 0.1 and report.dtype == "bfloat16"
    too_many(monkeypatch)
    assert peft_baft.check(make_model().to(torch.bfloat16))[PLACES].holds is False


def test_the_table_names_each_finding_its_numbers_and_the_versions() -> None:
    report = peft_baft.check(make_model())
    text = str(report)
    for finding in report.findings:
        assert finding.name in text
    for package in ("python", "torch", "transformers", "peft ", "accelerate", "peft-baft"):
        assert package in text
    assert (
        f"{report[CACHED].difference:.2g}" in text and "LlamaForCausalLM (llama), float32" in text
    )
    data = json.loads(json.dumps(report.to_dict()))
    assert data["ok"] is True and data["findings"][0]["name"] == ATTACHED
    assert report[CAUSAL].difference < report[CAUSAL].tolerance < report[CONTROL].difference


@pytest.fixture
def saved_model(tmp_path) -> str:
    tokenizer = facts.make_tokenizer()
    base = model_of_words(len(tokenizer))
    base.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_the_command_prints_the_table_or_json_and_tells_by_its_exit_code(
    saved_model, capsys, monkeypatch
) -> None:
    assert cli.main(["check", "--model", saved_model]) == 0
    assert CACHED in capsys.readouterr().out
    assert cli.main(["check", "--model", saved_model, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    too_many(monkeypatch)
    assert cli.main(["check", "--model", saved_model]) == CHECK_FAILED
    assert "FAILED" in capsys.readouterr().out
    assert cli.main(["check", "--model", saved_model, "--adapter", saved_model]) == 2


def test_a_random_adapter_is_no_larger_than_its_model() -> None:
    """Rank is bounded by the width of a model that is narrower than the rank."""
    shape: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
    }
    model = tr.LlamaForCausalLM(tr.LlamaConfig(vocab_size=64, **shape))
    report = peft_baft.check(model)
    assert report[ATTACHED].holds and BaftConfig().r > 8
    assert isinstance(model, tr.LlamaForCausalLM) and not isinstance(model, PeftModel)
