"""A BaFT adapter is copied, saved, loaded and trained as any other PEFT adapter."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from adapters import config, edited_model, is_bare, logits
from conftest import make_model, randomise
from peft_baft.adapter import BaftLayer, baft_layers, find_context

# copies and files


def test_a_copy_is_edited_by_itself(tokens) -> None:
    model = edited_model()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), through_torch(model)):
        assert find_context(twin) is not find_context(model)
        assert torch.equal(logits(twin, tokens), logits(model, tokens))
        ids = twin.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False
        )
        again = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False
        )
        assert torch.equal(ids, again)
        randomise(twin, seed=9)
        assert not torch.equal(logits(twin, tokens), logits(model, tokens))


def through_torch(model: PeftModel) -> PeftModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.fixture
def saved(tmp_path: Path, tokens) -> tuple[Path, torch.Tensor]:
    """A base model and an adapter on disk, and what they say together."""
    base = make_model()
    base.save_pretrained(str(tmp_path / "base"))
    model = get_peft_model(
        tr.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config()
    ).eval()
    randomise(model)
    for layer in baft_layers(model):
        layer.baft_gate_usage["default"].fill_(7)
    model.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path, logits(model, tokens)


def load_peft(path: Path, **kwargs: Any) -> Any:
    return PeftModel.from_pretrained(base_of(path), path / "adapter", **kwargs)


def base_of(path: Path) -> Any:
    return tr.AutoModelForCausalLM.from_pretrained(path / "base")


def with_native_loading(path: Path) -> Any:
    model = base_of(path)
    model.load_adapter(str(path / "adapter"), adapter_name="other")
    return model


LOADERS = {
    "PeftModel": load_peft,
    "low_cpu_mem_usage": lambda path: load_peft(path, low_cpu_mem_usage=True),
    "another name": lambda path: load_peft(path, adapter_name="another"),
    "AutoPeftModel": lambda path: AutoPeftModelForCausalLM.from_pretrained(path / "adapter"),
    "AutoModel": lambda path: tr.AutoModelForCausalLM.from_pretrained(path / "adapter"),
    "load_adapter": with_native_loading,
}


@pytest.mark.parametrize("how", LOADERS)
def test_every_way_of_loading_gives_the_same_logits_and_statistics_without_unpickling(
    how, saved, tokens, monkeypatch
) -> None:
    path, expected = saved

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was unpickled")

    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(pickle, "load", refuse)
    model = LOADERS[how](path)
    assert torch.equal(logits(model.eval(), tokens), expected)
    for layer in baft_layers(model):
        assert [load.tolist() for load in layer.baft_gate_usage.values()] == [[7.0] * 5]


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def rewrite(file: Path, change: Any) -> None:
    tensors = load_file(file)
    name = next(n for n in tensors if n.endswith("baft_source.weight"))
    change(tensors, name)
    save_file(tensors, file)


DAMAGE = {
    "cannot be read": truncate,
    "is missing": lambda f: rewrite(f, lambda t, n: t.pop(n)),
    "instead of": lambda f: rewrite(f, lambda t, n: t.update({n: t[n][:2].contiguous()})),
    "NaN": lambda f: rewrite(f, lambda t, n: t[n].fill_(float("nan"))),
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_file_is_refused_before_the_model_is_touched(message, saved, tokens) -> None:
    path, _ = saved
    base = base_of(path)
    before = logits(base, tokens)
    DAMAGE[message](path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, path / "adapter")
    assert is_bare(base) and torch.equal(before, logits(base, tokens))


@pytest.mark.parametrize(
    ("shape", "message"),
    [({"num_hidden_layers": 2}, "another model"), ({"hidden_size": 64}, "width 32")],
)
def test_a_model_of_another_shape_is_refused_and_stays_bare(shape, message, saved, tokens) -> None:
    path, _ = saved
    other = tr.LlamaForCausalLM(
        tr.LlamaConfig(**{**base_of(path).config.to_dict(), **shape, "head_dim": None})
    )
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(other, path / "adapter")
    assert is_bare(other)


def test_without_the_import_loading_ends_in_a_key_error_and_the_config_says_what_is_needed(
    saved,
) -> None:
    path, _ = saved
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(path / 'adapter')!r})"
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "KeyError: 'BAFT'" in alone.stderr
    assert subprocess.run([sys.executable, "-c", f"import peft_baft; {code}"]).returncode == 0
    assert (
        json.loads((path / "adapter" / "adapter_config.json").read_text())["requires"]
        == "peft_baft"
    )


# training by others


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, tokens) -> None:
    found = []
    for checkpointing in (False, True):
        model = edited_model().train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        labels = tokens.clone()
        labels[:, :4] = -100
        model(tokens, labels=labels).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*found, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_the_stock_trainer_trains_the_adapter_and_nothing_else(tmp_path, tokens) -> None:
    model = edited_model().train()
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    rows = [
        {"input_ids": row, "labels": torch.where(torch.arange(7) < 4, -100, row)} for row in tokens
    ]
    args = tr.TrainingArguments(
        tmp_path, max_steps=20, learning_rate=1e-2, report_to=[], use_cpu=True, logging_steps=1
    )
    trainer = tr.Trainer(model, args, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_status_and_other_saved_modules_work(tmp_path) -> None:
    model = edited_model(modules_to_save=["norm"])
    assert model.get_model_status().available_adapters == ["default"]
    assert {type(layer) for layer in baft_layers(model)} == {BaftLayer}
    model.save_pretrained(str(tmp_path))
    assert any("model.norm" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


def test_a_pipeline_says_what_generate_says(saved, tokens) -> None:
    path, _ = saved
    words = {f"w{i:02}": i for i in range(64)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w00"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = tr.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w00", eos_token="w02")
    model = load_peft(path)
    prompt = " ".join(f"w{i:02}" for i in tokens[0].tolist())
    settings = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(
        **fast(prompt, return_tensors="pt"), **settings, eos_token_id=None, pad_token_id=0
    )
    for piped in (model, tr.AutoModelForCausalLM.from_pretrained(path / "adapter")):
        piped.generation_config.eos_token_id = None
        said = tr.pipeline("text-generation", model=piped, tokenizer=fast)(
            prompt, return_full_text=False, **settings
        )
        assert said[0]["generated_text"] == fast.decode(expected[0, 7:])
