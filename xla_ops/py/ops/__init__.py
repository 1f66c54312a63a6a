"""One module an op. Importing this package defines all of them."""

from .activation import (
    fatrelu_and_mul,
    gelu_and_mul,
    gelu_fast,
    gelu_new,
    gelu_quick,
    gelu_tanh_and_mul,
    mul_and_silu,
    silu_and_mul,
    silu_and_mul_quant,
    swigluoai_and_mul,
)
from .apply_repetition_penalties import apply_repetition_penalties_
from .convert_fp8 import convert_fp8
from .copy_blocks import copy_blocks
from .flash_attn_varlen import flash_attn_varlen
from .fp8_quant import (
    dynamic_per_token_scaled_fp8_quant,
    dynamic_scaled_fp8_quant,
    static_scaled_fp8_quant,
)
from .fused_add_rms_norm import fused_add_rms_norm
from .fused_qk_norm_rope import fused_qk_norm_rope
from .fused_qk_norm_rope_and_cache import fused_qk_norm_rope_and_cache
from .fused_qk_norm_rope_and_paged_attention import (
    fused_qk_norm_rope_and_paged_attention,
)
from .grouped_matmul import grouped_matmul
from .int8_quant import dynamic_scaled_int8_quant, static_scaled_int8_quant
from .linear import linear
from .merge_attn_states import merge_attn_states
from .paged_attention import paged_attention
from .reshape_and_cache import reshape_and_cache
from .reshape_and_cache_flash import reshape_and_cache_flash
from .rms_norm import rms_norm
from .rms_norm_quant import (
    fused_add_rms_norm_static_fp8_quant,
    rms_norm_dynamic_per_token_quant,
    rms_norm_static_fp8_quant,
)
from .rotary_embedding import rotary_embedding
from .swap_blocks import swap_blocks

__all__ = [
    "apply_repetition_penalties_",
    "convert_fp8",
    "copy_blocks",
    "dynamic_per_token_scaled_fp8_quant",
    "dynamic_scaled_fp8_quant",
    "dynamic_scaled_int8_quant",
    "fatrelu_and_mul",
    "flash_attn_varlen",
    "fused_add_rms_norm",
    "fused_add_rms_norm_static_fp8_quant",
    "fused_qk_norm_rope",
    "fused_qk_norm_rope_and_cache",
    "fused_qk_norm_rope_and_paged_attention",
    "gelu_and_mul",
    "gelu_fast",
    "gelu_new",
    "gelu_quick",
    "gelu_tanh_and_mul",
    "grouped_matmul",
    "linear",
    "merge_attn_states",
    "mul_and_silu",
    "paged_attention",
    "reshape_and_cache",
    "reshape_and_cache_flash",
    "rms_norm",
    "rms_norm_dynamic_per_token_quant",
    "rms_norm_static_fp8_quant",
    "rotary_embedding",
    "silu_and_mul",
    "silu_and_mul_quant",
    "static_scaled_fp8_quant",
    "static_scaled_int8_quant",
    "swap_blocks",
    "swigluoai_and_mul",
]
