"""What edits of a base model share is kept with the model: from adapter to adapter, not longer than the model, never stale."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import facts
from conftest import make_model
from facts import DESCENT, FactModel
from peft_baft import NARROW, BaftConfig, BaftEditor
from peft_baft.data.batching import Tokens
from peft_baft.editing import fast_paths
from peft_baft.editing.acceleration import packed_linear
from peft_baft.editing.acceleration.cached_prefix import CachedPrefix
from peft_baft.editing.edit_cache import EditCache, release
from peft_baft.editing.fast_paths import open_forward

fact_model = facts.fact_model
ROW = Tokens((5, 6, 7, 8, 9, 10), 4)
packs = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)


def with_adapter(base: Any) -> PeftModel:
    return get_peft_model(base, BaftConfig(task_type="CAUSAL_LM", r=4))


def opened(model: PeftModel) -> EditCache:
    """What is prepared when an edit of the model has begun."""
    assert isinstance(open_forward(model, [ROW], [0], 0, 3), CachedPrefix)
    return EditCache.of(model)


@packs
def test_a_fresh_adapter_neither_packs_nor_tries_the_cache_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    for module, name in ((packed_linear, "_pack"), (fast_paths, "_require_equal")):
        original = getattr(module, name)

        def counted(*given: Any, name: str = name, original: Any = original, **more: Any) -> Any:
            calls.append(name)
            return original(*given, **more)

        monkeypatch.setattr(module, name, counted)
    model = with_adapter(make_model("llama"))
    first = opened(model)
    assert set(calls) == {"_pack", "_require_equal"}
    calls.clear()
    second = opened(with_adapter(model.unload()))
    assert second is first
    assert calls == []
    release(model.get_base_model())
    opened(with_adapter(model.unload()))
    assert set(calls) == {"_pack", "_require_equal"}


@packs
def test_it_goes_with_the_base_model() -> None:
    model = with_adapter(make_model("llama"))
    references = [weakref.ref(weight) for weight in opened(model).packed.values()]
    base = model.unload()
    gc.collect()
    assert references and all(reference() is not None for reference in references)
    del model, base
    gc.collect()
    assert not any(reference() is not None for reference in references)


@packs
def test_it_is_freed_on_demand() -> None:
    model = with_adapter(make_model("llama"))
    references = [weakref.ref(weight) for weight in opened(model).packed.values()]
    release(model.unload())
    gc.collect()
    assert references and not any(reference() is not None for reference in references)


def by_data(base: Any) -> Any:
    for parameter in base.parameters():
        parameter.data.mul_(1.5)
    return base


def by_lora(base: Any) -> Any:
    config = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    return get_peft_model(base, config).merge_and_unload()


def by_training(base: Any) -> Any:
    base.requires_grad_()
    ids = torch.arange(5, 15)[None]
    optimizer = torch.optim.SGD(base.parameters(), lr=1.0)
    base(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    return base


def by_loading(base: Any) -> Any:
    base.load_state_dict({name: 1.5 * tensor for name, tensor in base.state_dict().items()})
    return base


def by_casting(base: Any) -> Any:
    return by_data(base.double().float())


@pytest.mark.parametrize("change", [by_data, by_lora, by_training, by_loading, by_casting])
def test_an_edit_of_a_changed_base_is_that_of_a_model_that_was_always_so(
    change: Any, fact_model: FactModel
) -> None:
    def edited(base: Any) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = get_peft_model(
            base, BaftConfig(task_type="CAUSAL_LM", r=4, layers_to_transform=[0, 2])
        )
        editor = BaftEditor(
            model, fact_model.tokenizer, descent=DESCENT, template="raw", scope=NARROW
        )
        editor.edit(facts.edits(0))
        state = {name: tensor.clone() for name, tensor in editor.state_dict().items()}
        model.unload()
        return state

    base = copy.deepcopy(fact_model.base)
    before = edited(base)
    torch.manual_seed(1)
    base = change(base)
    changed, anew = edited(base), edited(copy.deepcopy(base))
    name = max(before, key=lambda name: before[name].numel())
    torch.testing.assert_close(changed, anew, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(changed[name], before[name], atol=1e-2)


def test_a_model_that_computes_otherwise_is_tried_anew() -> None:
    model = with_adapter(make_model("llama"))
    first = opened(model)
    model.get_base_model().double()
    second = EditCache.of(model)
    assert second is not first
    assert second.verified_length == 0 < first.verified_length


def test_copies_and_saved_models_have_their_own() -> None:
    model = with_adapter(make_model("llama"))
    first = opened(model)
    again = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    assert len({id(first), *(id(EditCache.of(other)) for other in again)}) == 3
    assert all(EditCache.of(other).verified_length == 0 for other in again)


def test_threads_get_the_same() -> None:
    model = with_adapter(make_model("llama"))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: EditCache.of(model), range(16)))
    assert len({id(prepared) for prepared in found}) == 1


def test_what_methods_computed_goes_with_the_last_adapter() -> None:
    model = with_adapter(make_model("llama"))
    EditCache.of(model).computed["texts"] = ["a"]
    assert EditCache.of(model).computed
    assert not EditCache.of(with_adapter(model.unload())).computed
