"""One legal call of every public function, by its arguments' names."""

import torch

from support import int32


def caches() -> list[torch.Tensor]:
    return [torch.zeros(6, 4, 2, 16) for _ in "kv"]


def legal_calls() -> dict[str, dict]:
    x, weight, scale = torch.randn(3, 16), torch.ones(16), torch.ones(1) / 8
    rows = {"input": x, "weight": weight, "eps": 1e-6}
    fused = {**rows, "residual": x + 1}
    queries, keys = torch.randn(5, 4, 16), torch.randn(9, 2, 16)
    key_cache, value_cache = caches()
    written = {
        "key": torch.randn(3, 2, 16),
        "value": torch.randn(3, 2, 16),
        "slot_mapping": torch.tensor([0, 5, -1]),
        "kv_cache_dtype": "auto",
        "k_scale": scale,
        "v_scale": scale,
    }
    prepared = {
        "qkv": torch.randn(3, 128),
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 16,
        "eps": 1e-6,
        "q_weight": torch.randn(16),
        "k_weight": torch.randn(16),
        "cos_sin_cache": torch.randn(32, 16),
        "is_neox": True,
        "position_ids": torch.arange(3),
        "key_cache": key_cache,
        "value_cache": value_cache,
        "slot_mapping": written["slot_mapping"],
        "kv_cache_dtype": "auto",
        "k_scale": scale,
        "v_scale": scale,
    }
    blocks = torch.tensor([[0, 1], [2, 3]])
    activations = (
        *("gelu_and_mul", "gelu_fast", "gelu_new", "gelu_quick"),
        *("gelu_tanh_and_mul", "mul_and_silu", "silu_and_mul"),
    )
    return {
        **{name: {"input": x} for name in activations},
        "apply_repetition_penalties_": {
            "logits": x.clone(),
            "prompt_mask": x > 0,
            "output_mask": x > 1,
            "repetition_penalties": torch.tensor([0.5, 1.0, 2.0]),
        },
        "convert_fp8": {"src": x, "scale": 1.0, "kv_cache_dtype": "fp8"},
        "copy_blocks": {
            "key_caches": [key_cache],
            "value_caches": [value_cache],
            "block_mapping": blocks,
        },
        "dynamic_per_token_scaled_fp8_quant": {"input": x, "scale_ub": scale},
        "dynamic_scaled_fp8_quant": {"input": x},
        "dynamic_scaled_int8_quant": {"input": x, "symmetric": False},
        "fatrelu_and_mul": {"input": x, "threshold": 0.5},
        "fused_qk_norm_rope_and_cache": prepared,
        "fused_qk_norm_rope_and_paged_attention": {
            **prepared,
            "context_lens": int32(4, 8),
            "block_tables": int32([0, 1], [2, 3]),
            "query_start_loc": int32(0, 1, 3),
            "num_seqs": int32(2),
            "scale": 0.25,
            "sinks": torch.ones(4),
        },
        "flash_attn_varlen": {
            "q": queries,
            "k": keys,
            "v": keys + 1,
            "cu_seqlens_q": int32(0, 2, 5),
            "cu_seqlens_k": int32(0, 4, 9),
            "max_seqlen_q": 3,
            "max_seqlen_k": 5,
            "softmax_scale": 0.25,
            "is_causal": True,
            "alibi_slopes": torch.ones(4),
            "sinks": torch.ones(4),
        },
        "fused_add_rms_norm": fused,
        "fused_add_rms_norm_static_fp8_quant": {**fused, "scale": scale},
        "fused_qk_norm_rope": {
            "qkv": torch.randn(5, 128),
            "num_heads_q": 4,
            "num_heads_k": 2,
            "num_heads_v": 2,
            "head_dim": 16,
            "eps": 1e-6,
            "is_neox": True,
            "q_weight": weight,
            "k_weight": weight,
            "cos_sin_cache": torch.randn(32, 16),
            "position_ids": torch.arange(5),
        },
        "grouped_matmul": {
            "input": torch.randn(5, 16),
            "weight": torch.randn(3, 8, 16),
            "group_offsets": int32(0, 2, 3, 5),
        },
        "linear": {"input": x, "weight": torch.randn(8, 16), "bias": torch.ones(8)},
        "merge_attn_states": {
            "prefix_output": queries,
            "prefix_lse": torch.randn(4, 5),
            "suffix_output": queries,
            "suffix_lse": torch.randn(4, 5),
        },
        "paged_attention": {
            "query": queries,
            "kv_cache": [key_cache, value_cache],
            "context_lens": int32(4, 8),
            "block_tables": int32([0, 1], [2, 3]),
            "query_start_loc": int32(0, 2, 5),
            "num_seqs": int32(2),
            "scale": 0.25,
            "sinks": torch.ones(4),
        },
        "reshape_and_cache": {
            **written,
            "key_cache": torch.zeros(6, 2, 4, 4, 4),
            "value_cache": torch.zeros(6, 2, 16, 4),
        },
        "reshape_and_cache_flash": {
            **written,
            "key_cache": key_cache,
            "value_cache": value_cache,
        },
        "rms_norm": rows,
        "rms_norm_dynamic_per_token_quant": {
            **fused,
            "quant_dtype": torch.float8_e4m3fn,
            "scale_ub": scale,
        },
        "rms_norm_static_fp8_quant": {**rows, "scale": scale},
        "rotary_embedding": {
            "positions": torch.arange(5),
            "query": torch.randn(5, 64),
            "key": torch.randn(5, 32),
            "head_size": 16,
            "is_neox": True,
            "cos_sin_cache": torch.randn(32, 16),
        },
        "silu_and_mul_quant": {"input": x, "scale": scale},
        "static_scaled_fp8_quant": {"input": x, "scale": scale},
        "static_scaled_int8_quant": {"input": x, "scale": scale, "azp": int32(3)},
        "straight_through": {
            "input": x,
            "codes": torch.zeros(3, 16).char(),
            "scale": scale,
        },
        "swap_blocks": {"src": key_cache, "dst": value_cache, "block_mapping": blocks},
        "swigluoai_and_mul": {"input": x, "alpha": 1.702, "limit": 7.0},
    }
