"""Mixed batches (PEFT's `adapter_names`): each row is computed by its own adapter, its copies of saved modules included.

IA3 has no mixed batches: PEFT ignores the argument there.
"""

# mypy: disable-error-code="union-attr, attr-defined, operator, arg-type, assignment"
from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers as tr
from peft import PeftModel
from torch import Tensor

from conftest import VOCABULARY, make_model
from peft_baft.adapter import find_context
from side_by_side import adapted, config_of, draw_adapter

NAMES = ["first", "second", "__base__"]
IDS = torch.randint(3, VOCABULARY, (3, 7), generator=torch.Generator().manual_seed(3))
both = pytest.mark.parametrize("method", ["lora", "baft"])


def model_of(
    method: str, base: Any = None, saved: Any = ("lm_head",), **settings: Any
) -> PeftModel:
    """Make a model with two adapters, each with copies of its own of the modules `saved`."""
    settings["modules_to_save"] = list(saved) if saved else None
    model = adapted(method, base, "first", 1, **settings)
    if saved:
        settings["modules_to_save"] = list(saved)
    model.add_adapter("second", config_of(method, **settings))
    draw_adapter(model, "second", 2)
    return model.eval()


@torch.no_grad()
def logits_of(model: Any, **inputs: Any) -> Tensor:
    return model(input_ids=IDS, **inputs).logits


def row_by_row(model: Any, names: list[str], ask: Any) -> list[Tensor]:
    """What each row is when the whole batch has its adapter."""
    rows = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(ask(model)[i])
        else:
            model.set_adapter(name)
            rows.append(ask(model)[i])
    return rows


def assert_rows(model: Any, names: list[str] = NAMES, active: str = "first") -> None:
    expected = torch.stack(row_by_row(model, names, logits_of))
    model.set_adapter(active)
    torch.testing.assert_close(logits_of(model, adapter_names=names), expected)
    assert not torch.allclose(logits_of(model), expected, atol=0.1)  # the control: rows differ


@both
@pytest.mark.parametrize("active", ["first", "second"])
@pytest.mark.parametrize("saved", [None, ("lm_head",), ("embed_tokens", "lm_head")], ids=str)
def test_each_row_has_its_own_adapters_modules(method: str, active: str, saved: Any) -> None:
    assert_rows(model_of(method, saved=saved), active=active)


@both
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # PEFT's
def test_tied_embeddings_that_are_saved_are_chosen_by_row(method: str) -> None:
    torch.manual_seed(0)
    config = make_model().config
    config.tie_word_embeddings = True
    base = tr.LlamaForCausalLM(config).eval()
    assert_rows(model_of(method, base, saved=("embed_tokens",)))


@both
@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_a_classifiers_head_is_chosen_by_row(method: str, task: str) -> None:
    classes = {
        "SEQ_CLS": tr.LlamaForSequenceClassification,
        "TOKEN_CLS": tr.LlamaForTokenClassification,
    }
    torch.manual_seed(0)
    config = make_model().config
    config.num_labels = 5
    assert_rows(model_of(method, classes[task](config).eval(), saved=None, task_type=task))


def test_an_adapter_without_a_copy_takes_the_models_own_module() -> None:
    """LoRA ends in a KeyError here."""
    model = model_of("baft")
    model.add_adapter("third", config_of("baft"))
    draw_adapter(model, "third", 3)
    assert_rows(model, ["first", "third", "__base__"])
    assert_rows(model, ["first", "third", "second"], active="third")


# generation

WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "beams, several returned": {"num_beams": 3, "num_return_sequences": 2},
    "several samples": {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
}


def generated(model: Any, **settings: Any) -> Tensor:
    mask = torch.ones_like(IDS)
    ids = model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=4, **settings)
    return ids.view(len(IDS), -1, ids.shape[-1])


@pytest.mark.parametrize(
    ("method", "way"),
    # With samples, and with beams in a generation config, LoRA ends in an error: it does not repeat the names there.
    [("lora", "beams"), ("lora", "beams, several returned"), *(("baft", way) for way in WAYS)],
)
@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_each_row_generates_by_its_own_adapter(method: str, way: str, task: Any) -> None:
    model = model_of(method, task_type=task)
    expected = row_by_row(model, NAMES, lambda m: generated(m, **WAYS[way]))
    model.set_adapter("first")
    assert torch.equal(generated(model, adapter_names=NAMES, **WAYS[way]), torch.stack(expected))
    assert not torch.equal(generated(model, **WAYS[way]), torch.stack(expected))  # the control


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", ["argument", "model"])
def test_a_generation_config_may_tell_how_often_rows_are_repeated(way: str, place: str) -> None:
    model = model_of("baft")
    expected = row_by_row(model, NAMES, lambda m: generated(m, **WAYS[way]))
    settings = tr.GenerationConfig(**WAYS[way], pad_token_id=0, eos_token_id=None)
    if place == "argument":
        found = generated(model, adapter_names=NAMES, generation_config=settings)
    else:
        model.get_base_model().generation_config = model.generation_config = settings
        found = generated(model, adapter_names=NAMES)
        # A forward has no beams, whatever the model's generation config says.
        assert logits_of(model, adapter_names=NAMES).shape[0] == len(NAMES)
    assert torch.equal(found, torch.stack(expected))


def test_names_that_do_not_fit_the_rows_are_refused_and_leave_nothing_behind() -> None:
    model = model_of("baft")
    plain = logits_of(model)
    for names in (["first"], ["first", "second"], ["first"] * 6, []):
        with pytest.raises(ValueError, match="Length of `adapter_names`"):
            logits_of(model, adapter_names=names)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        generated(model, adapter_names=["first", "second"])
    with pytest.raises(ValueError, match="non-existing"):
        logits_of(model, adapter_names=["first", "second", "third"])
    for nonsense in ("first", [1, 2, 3], {"first": 1}):
        with pytest.raises(TypeError, match="adapter_names must be a list"):
            logits_of(model, adapter_names=nonsense)
    assert find_context(model).row_adapters is None
    assert torch.equal(logits_of(model), plain)


def test_a_mixed_batch_of_one_thread_is_not_seen_by_another() -> None:
    model = model_of("baft")
    plain, seen = logits_of(model), []
    expected = logits_of(model, adapter_names=NAMES[::-1])

    def other_thread() -> None:
        seen.append(logits_of(model))
        seen.append(logits_of(model, adapter_names=NAMES[::-1]))

    with model._enable_peft_forward_hooks(adapter_names=NAMES):
        thread = threading.Thread(target=other_thread)
        thread.start()
        thread.join()
    assert torch.equal(seen[0], plain) and torch.equal(seen[1], expected)


def test_a_copy_of_a_model_chooses_by_its_own_rows() -> None:
    model = model_of("baft")
    expected = logits_of(model, adapter_names=NAMES)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits_of(twin, adapter_names=NAMES), expected)
    base = model.unload()
    assert not base.lm_head._forward_pre_hooks


def test_threads_that_serve_mixed_batches_do_not_disturb_each_other() -> None:
    """No hook comes or goes with a call: another thread's forward would stumble over it."""
    model = model_of("baft", saved=None)
    asked = [[name, other] for name in NAMES for other in NAMES[:2]]

    def answer(names: list[str]) -> torch.Tensor:
        settings = {"attention_mask": torch.ones_like(IDS[:2]), "pad_token_id": 0}
        return model.generate(
            IDS[:2], adapter_names=names, max_new_tokens=3, do_sample=False, **settings
        )

    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    seen: list[list[int]] = []
    watcher = model.get_base_model().register_forward_hook(
        lambda *_: seen.append([len(module._forward_pre_hooks) for module in model.modules()])
    )
    alone = [answer(names) for names in asked]
    watcher.remove()
    assert all(each == hooks for each in seen) and seen
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(answer, asked * 4))
    assert all(torch.equal(a, b) for a, b in zip(together, alone * 4, strict=True))
