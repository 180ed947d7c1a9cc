"""A BaFT adapter behaves as any other PEFT adapter: attach, switch, add up, save, load, take off."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tr
from peft import AutoPeftModelForCausalLM, PeftModel, PeftType, get_peft_model
from safetensors.torch import load_file, save_file

from conftest import ARCHITECTURES, make_model, randomise
from peft_baft import BaftConfig
from peft_baft.adapter import BaftLayer, baft_layers, find_context
from peft_baft.adapter.blocks import block_names, default_blocks
from peft_baft.adapter.registration import BAFT, register
from peft_baft.intervention import orthonormal_rows


def config(**settings: Any) -> BaftConfig:
    return BaftConfig(**{"r": 4, "gate_offset": 0.0, "task_type": "CAUSAL_LM", **settings})


def edited_model(seed: int = 1, **settings: Any) -> PeftModel:
    model = get_peft_model(make_model(), config(**settings)).eval()
    randomise(model, seed=seed)
    return model


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


def is_bare(model: torch.nn.Module) -> bool:
    """Nothing of an adapter is left on the model."""
    hooks = [*(h for m in model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values()))]
    ours = [h for h in hooks if "peft_baft" in getattr(h, "__module__", "")]
    return not baft_layers(model) and not ours and "generate" not in model.__dict__


# registration and configuration


def test_peft_knows_the_type_as_a_real_member_of_its_enum() -> None:
    assert PeftType("BAFT") is PeftType.BAFT is BAFT and BAFT.value == "BAFT" and BAFT in list(PeftType)
    assert copy.deepcopy(BAFT) is BAFT and pickle.loads(pickle.dumps(BAFT)) is BAFT
    register(BaftConfig, type("unused", (), {}))  # a second time does nothing


def test_another_method_named_baft_is_not_replaced(monkeypatch) -> None:
    monkeypatch.setitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, BAFT, dict)
    with pytest.raises(ImportError, match="already has"):
        register(BaftConfig, type("unused", (), {}))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be at least 1, not 0"),
        ({"r": 2.5}, TypeError, "2.5"),
        ({"prompt_positions": 0}, ValueError, "prompt_positions"),
        ({"weighting": "all"}, ValueError, "'all'"),
        ({"gate_norm": "l2"}, ValueError, "'l2'"),
        ({"r": 33}, ValueError, "r=33 is more than the 32"),
        ({"layers_to_transform": [4]}, ValueError, "4 blocks, 0 to 3"),
        ({"layers_to_transform": [1, 1]}, ValueError, "twice"),
        ({"layers_to_transform": ["1"]}, TypeError, "integers"),
        ({"layers_pattern": "blocks"}, ValueError, "blocks"),
        ({"target_modules": ["model.layers.1", "model.layers.9"]}, ValueError, "model.layers.9"),
    ],
)
def test_a_bad_setting_is_named_and_the_model_stays_bare(settings, error, message, tokens) -> None:
    model = make_model()
    before = logits(model, tokens)
    with pytest.raises(error, match=message):
        get_peft_model(model, config(**settings))
    assert is_bare(model) and torch.equal(before, logits(model, tokens))


def test_default_blocks_are_the_papers_counted_from_one() -> None:
    assert [b + 1 for b in default_blocks(32)] == [9, 18, 24, 28]
    for depth in range(1, 100):
        blocks = default_blocks(depth)
        assert blocks == sorted(set(blocks)) and blocks[0] >= 0 and blocks[-1] < depth


def test_blocks_are_found_beside_lists_of_experts() -> None:
    model = make_model()
    model.model.layers[0].experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(9))
    assert block_names(model, [0], None) == ["model.layers.0"]


# what a forward gives


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_adapter_changes_no_bit_and_an_edited_one_only_the_last_tokens(architecture, tokens) -> None:
    model = make_model(architecture)
    before = logits(model, tokens)
    adapted = get_peft_model(model, config()).eval()
    assert torch.equal(before, logits(adapted, tokens))
    randomise(adapted)
    moved = (logits(adapted, tokens) - before).abs().amax((0, 2)) > 0
    assert moved.tolist() == [False] * 4 + [True] * 3
    with adapted.disable_adapter():
        assert torch.equal(before, logits(adapted, tokens))
    bare = adapted.unload()
    assert is_bare(bare) and torch.equal(before, logits(bare, tokens))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_bases_keep_their_dtype_and_get_a_float32_adapter(dtype, autocast, tokens) -> None:
    model = make_model().to(dtype)
    before = logits(model, tokens)
    adapted = get_peft_model(model, config(), autocast_adapter_dtype=autocast).eval()
    assert torch.equal(before, logits(adapted, tokens)) and before.dtype == dtype
    layer = baft_layers(adapted)[0]
    assert layer.baft_source["default"].weight.dtype == (torch.float32 if autocast else dtype)
    assert layer.baft_load["default"].dtype == torch.float32  # it counts tokens


@pytest.mark.skipif(
    importlib.util.find_spec("transformers.utils.output_capturing") is None,
    reason="older transformers capture before hooks",
)
def test_hidden_states_that_the_model_reports_are_the_edited_ones(tokens) -> None:
    model = edited_model(layers_to_transform=[1])
    with torch.no_grad(), model.disable_adapter():
        before = model(tokens, output_hidden_states=True).hidden_states
    with torch.no_grad():
        after = model(tokens, output_hidden_states=True).hidden_states
    assert torch.equal(before[1], after[1]) and not torch.equal(before[2], after[2])


def test_updates_of_several_active_adapters_come_from_the_same_vector_and_add_up(tokens) -> None:
    model = edited_model(layers_to_transform=[3])
    model.add_adapter("second", config(layers_to_transform=[3]))
    randomise(model, seed=5)
    model.base_model.set_adapter(["default", "second"])
    (layer,) = baft_layers(model)
    context = find_context(model)
    h = torch.randn(2, 7, 32)
    context.steps = torch.zeros(2, 7, dtype=torch.long)  # every token an answer token
    expected = h.clone()
    for name in ("default", "second"):
        R, source, w = (
            orthonormal_rows(layer.baft_basis[name].weight),
            layer.baft_source[name],
            layer.baft_gate[name](h),
        )
        expected = expected + (w * source(h)) @ R
    torch.testing.assert_close(layer(h), expected)
    alone = [set_and_run(model, name, tokens) for name in ("default", "second")]
    assert not torch.equal(*alone)


def set_and_run(model: PeftModel, name: str, ids: torch.Tensor) -> torch.Tensor:
    model.set_adapter(name)
    return logits(model, ids)


def test_each_row_of_a_mixed_batch_has_its_own_adapter(tokens) -> None:
    model = edited_model()
    model.add_adapter("second", config())
    randomise(model, seed=5)
    one, two = (set_and_run(model, name, tokens) for name in ("default", "second"))
    with model.disable_adapter():
        none = logits(model, tokens)
    ids = tokens[:1].repeat(3, 1)
    with torch.no_grad():
        mixed = model(ids, adapter_names=["second", "__base__", "default"]).logits
    torch.testing.assert_close(mixed, torch.cat([two[:1], none[:1], one[:1]]))
    with pytest.raises(ValueError, match="non-existing"):
        model(ids, adapter_names=["third"] * 3)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        model(ids, adapter_names=["second"])


def test_merging_is_refused_with_the_reason_before_anything_changes(tokens) -> None:
    model = edited_model()
    before = logits(model, tokens)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(NotImplementedError, match="depends on the hidden vector"):
            merge()
    assert torch.equal(before, logits(model, tokens))


def test_deleting_and_switching_leave_the_other_adapter_as_it_was(tokens) -> None:
    model = edited_model()
    before = logits(model, tokens)
    model.add_adapter("second", config())
    randomise(model, seed=5)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert all("second" not in name for name in model.state_dict())
    assert logits(model, tokens).shape == before.shape and model.active_adapters == ["default"]


@pytest.mark.filterwarnings("ignore:Adapter name 'baft' should not")  # PEFT warns of one of the names
@pytest.mark.parametrize("name", ["layers", "model", "baft", "weight", "baft_gate"])
def test_an_adapter_name_that_peft_would_mix_up_is_refused(name) -> None:
    with pytest.raises(ValueError, match="choose another"):
        get_peft_model(make_model(), config(), adapter_name=name)


# copies and files


def test_a_copy_is_edited_by_itself(tokens) -> None:
    model = edited_model()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), through_torch(model)):
        assert find_context(twin) is not find_context(model)
        assert torch.equal(logits(twin, tokens), logits(model, tokens))
        ids = twin.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False)
        again = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False)
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
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(tr.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config()).eval()
    randomise(model)
    for layer in baft_layers(model):
        layer.baft_load["default"].fill_(7)
    model.save_pretrained(tmp_path / "adapter")
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
        assert [load.tolist() for load in layer.baft_load.values()] == [[7.0] * 5]


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
    ("shape", "message"), [({"num_hidden_layers": 2}, "another model"), ({"hidden_size": 64}, "width 32")]
)
def test_a_model_of_another_shape_is_refused_and_stays_bare(shape, message, saved, tokens) -> None:
    path, _ = saved
    other = tr.LlamaForCausalLM(tr.LlamaConfig(**{**base_of(path).config.to_dict(), **shape, "head_dim": None}))
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(other, path / "adapter")
    assert is_bare(other)


def test_without_the_import_loading_ends_in_a_key_error_and_the_config_says_what_is_needed(saved) -> None:
    path, _ = saved
    code = f"from peft import PeftConfig; PeftConfig.from_pretrained({str(path / 'adapter')!r})"
    alone = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "KeyError: 'BAFT'" in alone.stderr
    assert subprocess.run([sys.executable, "-c", f"import peft_baft; {code}"]).returncode == 0
    assert json.loads((path / "adapter" / "adapter_config.json").read_text())["requires"] == "peft_baft"


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
    rows = [{"input_ids": row, "labels": torch.where(torch.arange(7) < 4, -100, row)} for row in tokens]
    args = tr.TrainingArguments(tmp_path, max_steps=20, learning_rate=1e-2, report_to=[], use_cpu=True, logging_steps=1)
    trainer = tr.Trainer(model, args, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_status_and_other_saved_modules_work(tmp_path) -> None:
    model = edited_model(modules_to_save=["norm"])
    assert model.get_model_status().available_adapters == ["default"]
    assert {type(layer) for layer in baft_layers(model)} == {BaftLayer}
    model.save_pretrained(tmp_path)
    assert any("model.norm" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
