"""Models from GGUF files: their weights are dequantised, so they are saved, cast and edited as any other model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tr
from peft import PeftModel, get_peft_model
from torch import Tensor

from conftest import VOCABULARY, make_model
from peft_baft.loading import load_model
from side_by_side import METHODS, adapted, config_of, draw_adapter

gguf = pytest.importorskip("gguf")
PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
Q8 = gguf.GGMLQuantizationType.Q8_0


def write_gguf(file: Path) -> None:
    """Write a tiny Llama, its large matrices in blocks of 8-bit numbers, and a tokenizer of letters."""
    model = make_model()
    config: Any = model.config
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(VOCABULARY)
    tokens = ["<pad>", "<s>", "<|endoftext|>", "ab", *map(chr, range(ord("a"), ord("z") + 1))]
    tokens += [f"x{i}" for i in range(VOCABULARY - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (VOCABULARY - 3))
    writer.add_token_merges(["a b"])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for i in range(config.num_hidden_layers):
        names |= {f"model.layers.{i}.{part}": f"blk.{i}.{PARTS[part]}" for part in PARTS}
    for name, tensor in model.state_dict().items():
        values, new_name = tensor.numpy(), names[name.removesuffix(".weight")] + ".weight"
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # llama.cpp pairs neighbours in RoPE
            of_heads = values.reshape(-1, 2, config.head_dim // 2, values.shape[1])
            values = of_heads.swapaxes(1, 2).reshape(values.shape)
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(new_name, gguf.quants.quantize(values, Q8), raw_dtype=Q8)
        else:
            writer.add_tensor(new_name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(file)
    return file


def logits(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def test_the_file_is_read(file: Path, tokens: Tensor) -> None:
    model, tokenizer = load_model(str(file))
    assert len(tokenizer) == VOCABULARY
    plain = make_model()
    difference = (logits(model, tokens) - logits(plain, tokens)).abs().max()
    assert 0 < difference < 0.05 * logits(plain, tokens).abs().max()


def test_the_model_is_as_one_that_was_never_quantised(file: Path) -> None:
    model, _ = load_model(str(file))
    plain = make_model()
    assert {name for name in vars(model) if "quant" in name} == {
        name for name in vars(plain) if "quant" in name
    }
    assert "quantization_config" not in model.config.to_dict()
    assert not hasattr(model.config, "_is_quantized")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_the_model_is_saved_and_loaded_by_transformers(
    file: Path, tokens: Tensor, tmp_path: Path
) -> None:
    model, tokenizer = load_model(str(file))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = tr.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))
    again, _ = load_model(str(tmp_path))
    assert torch.equal(logits(again, tokens), logits(model, tokens))


CASTS: dict[str, tuple[Callable[[Any], Any], torch.dtype]] = {
    "half": (lambda model: model.half(), torch.float16),
    "float": (lambda model: model.half().float(), torch.float32),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "to": (lambda model: model.to(torch.float64), torch.float64),
}


@pytest.mark.parametrize("cast", CASTS)
def test_the_model_is_cast(cast: str, file: Path, tokens: Tensor) -> None:
    model, _ = load_model(str(file))
    change, dtype = CASTS[cast]
    expected = logits(model, tokens)
    model = change(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    torch.testing.assert_close(logits(model, tokens).float(), expected, rtol=0.1, atol=0.5)


def test_the_model_is_loaded_in_another_dtype(file: Path) -> None:
    model, _ = load_model(str(file), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_on_it_is_saved_and_loaded(
    method: str, file: Path, tokens: Tensor, tmp_path: Path
) -> None:
    base, _ = load_model(str(file))
    model = adapted(method, base)
    expected = logits(model, tokens)
    model.save_pretrained(str(tmp_path))
    again, _ = load_model(str(file))
    assert torch.equal(
        logits(PeftModel.from_pretrained(again, str(tmp_path)).eval(), tokens), expected
    )
    assert not torch.equal(logits(model.unload(), tokens), expected)  # the control


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_on_it_is_trained(method: str, file: Path, tokens: Tensor) -> None:
    base, _ = load_model(str(file))
    model = get_peft_model(base, config_of(method))
    draw_adapter(model)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
