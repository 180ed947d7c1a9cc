"""Which modules of a model are its decoder blocks, and which models are refused before they are touched."""

# mypy: disable-error-code="call-arg"
from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tr
from peft import get_peft_model
from torch import nn

from adapters import config, is_bare
from peft_baft import BaftConfig
from peft_baft.adapter import baft_layers
from peft_baft.adapter.blocks import block_names, find_stack, stack_owner
from tiny_models import tiny_model


def model_of(**parts: nn.Module) -> nn.Module:
    """A model without a config that has these parts."""
    model = nn.Module()
    for name, part in parts.items():
        model.add_module(name, part)
    return model


def stack(depth: int, *classes: type) -> nn.ModuleList:
    """Blocks of one or several classes, each with a part."""
    blocks = []
    for i in range(depth):
        block = classes[i % len(classes)]()
        block.part = nn.Linear(2, 2)
        blocks.append(block)
    return nn.ModuleList(blocks)


class Attention(nn.Module):
    pass


class Recurrence(nn.Module):
    pass


@pytest.mark.parametrize(
    ("architecture", "name", "classes"),
    [
        ("jamba", "model.layers", 2),
        ("zamba", "model.layers", 2),
        ("zamba2", "model.layers", 2),  # one class has lists of adapters inside, of the same length
        ("olmo_hybrid", "model.layers", 2),
        ("mllama", "model.layers", 2),
        ("mixtral", "model.layers", 1),  # as many experts as blocks
        ("got_ocr2", "model.language_model.layers", 1),  # its eye has as many blocks
        ("git", "git.encoder.layer", 1),
        ("musicgen", "model.decoder.layers", 1),  # as many embeddings and heads
        ("granite_swa", "model.layers", 1),  # beside a list of rotary embeddings
    ],
)
def test_the_stack_is_the_list_that_each_token_passes(
    architecture: str, name: str, classes: int
) -> None:
    model = tiny_model(architecture)
    assert find_stack(model) == name
    assert len({type(block) for block in model.get_submodule(name)}) == classes


def test_blocks_of_several_classes_are_one_stack_also_without_a_config() -> None:
    model = model_of(
        heads=nn.ModuleList(nn.Linear(2, 2) for _ in range(9)),
        blocks=stack(6, Attention, Recurrence),
    )
    model.few = stack(2, Attention)
    assert find_stack(model) == "blocks"
    assert find_stack(model, "few") == "few"
    with pytest.raises(ValueError, match=r"no ModuleList named other.*target_modules"):
        find_stack(model, "other")
    with pytest.raises(ValueError, match="no ModuleList of blocks"):
        find_stack(model_of(head=nn.Linear(2, 2)))


def test_where_several_lists_may_be_meant_all_are_named_and_one_can_be_chosen() -> None:
    model = tiny_model("hrm_text")
    with pytest.raises(
        ValueError, match=r"model\.L_module\.layers, model\.H_module\.layers.*layers_pattern"
    ):
        get_peft_model(model, config())
    assert is_bare(model)
    assert find_stack(model, "H_module.layers") == "model.H_module.layers"
    with pytest.raises(ValueError, match="several lists"):
        find_stack(model, "layers")


def test_two_lists_that_are_as_long_as_configured_are_not_told_apart() -> None:
    model = tiny_model("llama")
    assert find_stack(model) == "model.layers"
    model.model.twin = copy.deepcopy(model.model.layers)
    with pytest.raises(ValueError, match=r"several lists .*model\.layers, model\.twin"):
        find_stack(model)


def test_by_default_blocks_that_need_a_picture_are_passed_over_and_named_ones_refused() -> None:
    model = tiny_model("mllama")
    assert 3 in model.config.cross_attention_layers
    assert block_names(model, None, None) == [f"model.layers.{i}" for i in (0, 1, 2)]
    with pytest.raises(ValueError, match=r"model\.layers\.3 .* picture.*layers_to_transform"):
        get_peft_model(model, config(layers_to_transform=[3]))
    assert is_bare(model)


REFUSED = {
    "bert": "is_decoder=True",
    "xlm": "both directions",
    "xlnet": "both directions",
    "reformer": "two streams",
    "prophetnet": "several tokens at once",
    "cpmant": "both directions",
    "blt": "patches",
    "gemma3n_text": "4 hidden vectors per token .altup_num_inputs.*target_modules",
    "deepseek_v4": "hc_mult",
    "qwen4_exp_text": "hc_count",
}


@pytest.mark.parametrize("architecture", REFUSED)
def test_a_model_that_cannot_be_edited_is_refused_with_the_reason_and_not_touched(
    architecture: str,
) -> None:
    model = tiny_model(architecture)
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(
        ValueError,
        match=f"(?s){type(model).__name__}.*{REFUSED[architecture]}|{REFUSED[architecture]}",
    ):
        get_peft_model(model, config())
    assert is_bare(model) and {name: id(module) for name, module in model.named_modules()} == before


ENCODER_DECODER: dict[str, Any] = {
    "T5ForConditionalGeneration": tr.T5Config(
        d_model=16, d_ff=16, d_kv=4, num_layers=2, num_heads=2, vocab_size=32, decoder_start_token_id=0
    ),
    "BartForConditionalGeneration": tr.BartConfig(
        d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16, vocab_size=32,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=32,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODER_DECODER)
def test_a_model_with_an_encoder_for_the_prompt_is_refused(name: str) -> None:
    model = getattr(tr, name)(ENCODER_DECODER[name])
    with pytest.raises(ValueError, match=r"encoder for the prompt.*decoder-only"):
        get_peft_model(model, config(task_type="SEQ_2_SEQ_LM"))
    assert is_bare(model)


def test_a_classifier_that_reads_in_both_directions_may_be_edited() -> None:
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    model = tr.BertForSequenceClassification(tr.BertConfig(vocab_size=32, **shape))
    assert len(baft_layers(get_peft_model(model, config(task_type="SEQ_CLS")))) > 0


def test_other_modules_of_a_refused_model_may_be_named() -> None:
    model = get_peft_model(
        tiny_model("deepseek_v4"), BaftConfig(r=4, target_modules=["layers.1.mlp"])
    )
    assert [layer.name for layer in baft_layers(model)] == ["model.layers.1.mlp"]
    model(input_ids=torch.tensor([[3, 4, 5, 6]]), labels=torch.tensor([[-100, -100, 5, 6]]))


def test_tokens_are_read_where_a_module_around_the_blocks_gets_them() -> None:
    model = tiny_model("bert", is_decoder=True)
    assert stack_owner(model, "bert.encoder.layer.1") is model.bert
    llama = tiny_model("llama")
    assert stack_owner(llama, "model.layers.1") is llama.model
    custom = model_of(blocks=stack(2, Attention))
    assert stack_owner(custom, "blocks.0") is custom
