"""A tiny random model of any architecture of the installed transformers, made from its own default config.

The numbers of a default config are replaced by name, with the same small number for the same name in every config, so that
most architectures need nothing of their own. What a few of them need beside that stands in `OVERRIDES`.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers as tr
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, WIDTH, DEPTH, HEADS = 96, 32, 4, 4

SMALL: dict[str, Any] = {
    # tokens
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "unpadded_vocab_size"), VOCABULARY),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 64),
    **dict.fromkeys(("max_target_positions", "max_source_positions", "model_max_length"), 64),
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    # widths
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim", "word_embed_proj_dim"), WIDTH),
    **dict.fromkeys(("embedding_size", "input_embedding_size", "output_embedding_size", "lru_width"), WIDTH),
    **dict.fromkeys(("attention_hidden_size", "backbone_hidden_size", "hidden_size_global", "out_hidden_size"), WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_ff"), 48),
    **dict.fromkeys(("ffn_hidden_size", "dim_ff", "dff", "d_inner", "feed_forward_size", "intermediate_size_mlp"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 24),
    **dict.fromkeys(("shared_experts_intermediate_size", "expert_ffn_hidden_size", "dense_intermediate_size"), 24),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "hidden_size_per_layer_input", "router_hidden_size"), 16),
    # depth
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), DEPTH),
    **dict.fromkeys(("num_decoder_layers", "num_blocks", "num_layers_per_stack", "encoder_layers"), DEPTH),
    **dict.fromkeys(("num_encoder_layers", "depth", "num_global_layers"), 2),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    # attention
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "attention_heads", "num_decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_encoder_attention_heads", "num_query_groups"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "d_head", "d_kv", "kv_channels", "attention_head_size"), 8),
    **dict.fromkeys(("global_head_dim", "query_pre_attn_scalar", "index_head_dim", "attention_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rotary_dim", "swa_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank", "hc_lowrank", "adapter_rank"), 16),
    "qk_head_dim": 16, "index_n_heads": 2, "index_topk": 32, "o_groups": 2, "mem_len": 64,
    **dict.fromkeys(("sliding_window", "sliding_window_size", "local_attention", "attention_window_size"), 8),
    **dict.fromkeys(("attention_chunk_size", "window_size"), 8),
    "keep_window_size": 64,  # fewer would let Doge choose later tokens
    # experts
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "num_experts_per_token"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    # recurrences
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "mamba_chunk_size", "chunk_size"), 4),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("mamba_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    # pictures and sound
    "image_size": 32, "patch_size": 16, "num_mel_bins": 8, "base_channels": 32, "num_filters": 4,
}  # fmt: skip

# What an architecture needs beside `SMALL`; of a nested config under its name.
_KINDS = ["linear_attention", "hybrid"] * 2
_SHARED = {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
_INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 32, "indexer_compress_ratio": 4,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_ROPE_BY_KIND = {"full_attention": _ROPE, "sliding_attention": _ROPE}
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blenderbot": {"encoder_layers": DEPTH},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": _ROPE_BY_KIND,
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {"sliding_window": 64},  # fewer, and the unedited model cannot go on from its cache
    "dots1": {
        "moe_intermediate_size": 24,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
    },
    "dots3_note": {
        "text_config": {"num_key_value_heads": HEADS},
        "vision_config": {
            "adapter_in_dim": WIDTH,
            "adapter_out_dim": WIDTH,
            "per_layer_config": None,
        },
        "audio_config": {"adapter_input_size": WIDTH, "adapter_out_dim": WIDTH},
    },
    "dots3_note_text": {"num_key_value_heads": HEADS},
    "gemma3n_text": _SHARED,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hrm_text": {"num_hidden_layers": DEPTH, "num_layers_per_stack": None},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "moshi": {
        "sliding_window": 64
    },  # fewer, and the unedited model's cache is not its full forward
    "nemotron": {"num_key_value_heads": 2},
    "prophetnet": {"num_encoder_layers": DEPTH},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": HEADS,
        "layers_block_type": _KINDS,
    },
    "zamba2": {
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": HEADS,
        "layers_block_type": _KINDS,
    },
}


# Classes that are no language models of their own: a tiny one can be built, but not asked.
NOT_ALONE = {
    "gemma4_assistant": "a draft model, which reads the keys and values of the model that it drafts for",
    "gemma4_unified_assistant": "a draft model, which reads the keys and values of the model that it drafts for",
    "musicgen": "it reads codes of sound, several rows for each text, and no text",
    "musicgen_melody": "it reads codes of sound, several rows for each text, and no text",
}


def model_types() -> dict[str, str]:
    """Every architecture of transformers' causal-LM mapping, and the name of its class."""
    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **overrides: Any) -> Any:
    """A small config of an architecture, whose layers show every kind that its default config has.

    Raises:
        Exception: whatever the config's class raises where it needs more than the generic numbers.
    """
    config_class = tr.CONFIG_MAPPING[model_type]
    own = OVERRIDES.get(model_type, {}) | overrides
    return config_class(**_shrunk(_default(config_class, own), own))


def _default(config_class: Any, own: dict[str, Any]) -> Any:
    """The default config; of a class whose defaults contradict each other, the one of its overrides alone."""
    try:
        return config_class()
    except (TypeError, ValueError):
        return config_class(**own)


def _shrunk(config: Any, own: dict[str, Any]) -> dict[str, Any]:
    """Small values of the fields of a config, those of nested configs as dictionaries."""
    depth = _depth(config)
    values: dict[str, Any] = {}
    for name, value in vars(config).items():
        given = own.get(name)
        if hasattr(value, "to_dict"):
            nested = given if isinstance(given, dict) else {}
            values[name] = {"model_type": value.model_type} | _shrunk(value, nested)
        elif isinstance(value, list | tuple) and depth and len(value) == depth > DEPTH:
            values[name] = _of_few_layers(value)
        elif name in SMALL and _is_number(value):
            values[name] = min(value, SMALL[name]) if value > 0 else value
        elif (
            name.endswith(("_token_id", "_token_index"))
            and _is_number(value)
            and value >= VOCABULARY
        ):
            values[name] = (
                VOCABULARY
                - 1
                - len([v for n, v in values.items() if n.endswith(("_token_id", "_index"))])
            )
    if "kv_lora_rank" in values:  # keys and values come out of the compressed ones for every head
        values["num_key_value_heads"] = values["num_attention_heads"]
    nested_names = {
        name for name, value in values.items() if isinstance(value, dict) and "model_type" in value
    }
    return values | {name: value for name, value in own.items() if name not in nested_names}


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _depth(config: Any) -> int | None:
    """How many layers a default config has."""
    names = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
    return next((vars(config)[name] for name in names if _is_number(vars(config).get(name))), None)


def _of_few_layers(values: Any) -> list[Any]:
    """`DEPTH` of the values of a list that holds one per layer: every kind of them, in turn."""
    if _is_number(values[0]) and list(values) == list(range(len(values))):
        return list(range(DEPTH))
    kinds = list(dict.fromkeys(values))[:DEPTH]
    return (kinds * DEPTH)[:DEPTH]


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> Any:
    """A tiny random model in float32 and evaluation mode, with weights large enough to make its layers matter."""
    config = tiny_config(model_type, **overrides)
    model_class = getattr(tr, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    if not isinstance(
        config, model_class.config_class
    ):  # of pictures and text, where the class reads the text alone
        config = config.get_text_config(decoder=True)
    torch.manual_seed(seed)
    with torch.device("cpu"):
        model = model_class(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # Weights are drawn with a deviation of .02 for a width of thousands: at width 32 a block would add next to nothing.
            if parameter.ndim > 1 and 0 < parameter.std() < 0.05:
                parameter.mul_(4.0)
            elif parameter.ndim > 1 and not parameter.any():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.generation_config.eos_token_id = None  # answers are as long as they are asked to be
    return model
