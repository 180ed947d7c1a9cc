"""A BaFT adapter behaves as any other PEFT adapter: attach, switch, add up, take off."""

# mypy: disable-error-code="arg-type, attr-defined"
from __future__ import annotations

import copy
import importlib.util
import pickle

import peft
import pytest
import torch
from peft import PeftModel, PeftType, get_peft_model

from adapters import config, edited_model, is_bare, logits
from conftest import ARCHITECTURES, make_model, randomise
from peft_baft import BaftConfig
from peft_baft.adapter import baft_layers
from peft_baft.adapter.blocks import block_names, default_blocks
from peft_baft.adapter.call import Call
from peft_baft.adapter.registration import BAFT, register
from peft_baft.intervention import orthonormal_rows

# registration and configuration


def test_peft_knows_the_type_as_a_real_member_of_its_enum() -> None:
    assert (
        PeftType("BAFT") is PeftType.BAFT is BAFT
        and BAFT.value == "BAFT"
        and BAFT in list(PeftType)
    )
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
        ({"r": 33}, ValueError, "r=33 exceeds the 32"),
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
def test_a_fresh_adapter_changes_no_bit_and_an_edited_one_only_the_last_tokens(
    architecture, tokens
) -> None:
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
def test_half_precision_bases_keep_their_dtype_and_get_a_float32_adapter(
    dtype, autocast, tokens
) -> None:
    model = make_model().to(dtype)
    before = logits(model, tokens)
    adapted = get_peft_model(model, config(), autocast_adapter_dtype=autocast).eval()
    assert torch.equal(before, logits(adapted, tokens)) and before.dtype == dtype
    layer = baft_layers(adapted)[0]
    assert layer.baft_source["default"].weight.dtype == (torch.float32 if autocast else dtype)
    assert layer.baft_gate_usage["default"].dtype == torch.float32  # it counts tokens


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
    h = torch.randn(2, 7, 32)
    model(tokens, prompt_lengths=[0])  # tells the blocks that every token is an answer token
    expected = h.clone()
    for name in ("default", "second"):
        R, source, w = (
            orthonormal_rows(layer.baft_basis[name].weight),
            layer.baft_source[name],
            layer.baft_gate[name](h),
        )
        expected = expected + (w * source(h)) @ R
    torch.testing.assert_close(layer(h, Call(layer.context.relative_positions)), expected)
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


@pytest.mark.filterwarnings(
    "ignore:Adapter name 'baft' should not"
)  # PEFT warns of one of the names
@pytest.mark.parametrize("name", ["layers", "model", "baft", "weight", "baft_gate"])
def test_an_adapter_name_that_peft_would_mix_up_is_refused(name) -> None:
    with pytest.raises(ValueError, match="choose another"):
        get_peft_model(make_model(), config(), adapter_name=name)


def test_what_baft_cannot_do_is_said_and_not_asked_of_the_base_model(tokens) -> None:
    model = edited_model()
    before = logits(model, tokens)
    with pytest.raises(
        NotImplementedError,
        match=r"combined with combination_type='cat' only.*when they are active together",
    ):
        model.add_weighted_adapter(["default"], [0.5], "mean", "linear")
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.unmerge_adapter()
    for name in ("update_and_allocate", "subtract_mutated_init"):  # of AdaLoRA and of LoRA
        with pytest.raises(
            AttributeError,
            match=f"Neither a BaFT adapter nor its base model LlamaForCausalLM has '{name}'",
        ):
            getattr(model, name)
    assert not hasattr(model, "update_and_allocate") and hasattr(model, "get_input_embeddings")
    assert torch.equal(before, logits(model, tokens))


def test_a_model_that_embeds_no_tokens_takes_integers_for_numbers() -> None:
    class Numbers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = torch.nn.Linear(10, 20), torch.nn.Linear(20, 2)

        def forward(self, numbers: torch.Tensor) -> torch.Tensor:
            return self.narrow(self.wide(numbers.float()))

    numbers = torch.arange(30).view(3, 10)
    model = get_peft_model(Numbers(), BaftConfig(r=2, target_modules=["wide"]))
    before = model(numbers)
    randomise(model)
    # Every vector is edited.
    assert before.shape == (3, 2) and (model(numbers) != before).any(1).all()
