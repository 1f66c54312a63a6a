"""vLLM's attention by the custom calls that write and read its paged cache.

Tested by tests/engine/test_models.py and test_projection.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar
from unittest import mock

import torch
from vllm import forward_context
from vllm.attention.backends.abstract import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionType,
)
from vllm.v1.attention.backends.utils import (
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

from ..ops import (
    fused_qk_norm_rope_and_paged_attention,
    paged_attention,
    reshape_and_cache_flash,
)
from . import projection

_FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")


@dataclasses.dataclass
class XlaMetadata(AttentionMetadata):
    """What a program's attention needs of a step: tensors of the device, padded.

    slot_mapping is int64 [tokens], the rest int32: context_lens [rows], block_tables
    [rows, blocks], query_start_loc [rows + 1], num_seqs [1].
    """

    slot_mapping: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    query_start_loc: torch.Tensor
    num_seqs: torch.Tensor


@dataclasses.dataclass
class _Context:
    """What attention layers read of vLLM's forward context, and no more of it."""

    attn_metadata: Mapping[str, XlaMetadata]
    virtual_engine: int = 0
    no_compile_layers: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dp_metadata: None = None
    ubatch_slices: None = None


@contextlib.contextmanager
def attention_of(
    metadata: Mapping[str, XlaMetadata], layers: Mapping[str, Any]
) -> Iterator[None]:
    """While a program is traced: what each layer's attention works on.

    Args:
        metadata: by name of layer.
        layers: vLLM's layers by name, static_forward_context.
    """
    context = _Context(metadata, no_compile_layers=layers)
    with (
        mock.patch.object(forward_context, "_forward_context", context),
        projection.noting(),
    ):
        yield


class XlaMetadataBuilder(AttentionMetadataBuilder):
    """Passes vLLM's host tensors on: the runner pads and packs them."""

    def __init__(self, *args: Any, **kwargs: Any):  # vLLM has it abstract
        super().__init__(*args, **kwargs)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CommonAttentionMetadata:
        return common_attn_metadata

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        return False


class XlaAttentionBackend(AttentionBackend):
    """K and V of a layer in one cache [2, num_blocks, block_size, heads, head_size]."""

    accept_output_buffer = False
    supported_dtypes: ClassVar[list] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list] = ["auto", "bfloat16", *_FP8]

    @staticmethod
    def get_name() -> str:
        return "XLA_OPS"

    @staticmethod
    def get_impl_cls() -> type[XlaAttentionImpl]:
        return XlaAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[XlaMetadataBuilder]:
        return XlaMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        return (2, num_blocks, block_size, num_kv_heads, head_size)

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return head_size % 8 == 0 and 0 < head_size <= 256

    @classmethod
    def supports_sink(cls) -> bool:
        return True


class XlaAttentionImpl(AttentionImpl):
    """Writes the new K and V into the cache, then attends to it.

    From the fused projection where that is known, by the call that norms and rotates.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **unknown: Any,
    ) -> None:
        for name, got, rule, is_right in (
            ("attn_type", attn_type, "decoder", attn_type == AttentionType.DECODER),
            (
                "head_size",
                head_size,
                "a multiple of 8 up to 256",
                XlaAttentionBackend.supports_head_size(head_size),
            ),
            *((key, value, "None", value is None) for key, value in unknown.items()),
        ):
            if not is_right:
                raise NotImplementedError(
                    f"xla_ops: {name} of attention must be {rule}, got {got}"
                )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.alibi_slopes = (
            None if alibi_slopes is None else torch.tensor(alibi_slopes).float()
        )
        self.sliding_window = sliding_window
        self.kv_cache_dtype = kv_cache_dtype if kv_cache_dtype in _FP8 else "auto"
        self.soft_cap = logits_soft_cap or None
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: XlaMetadata,
        output: torch.Tensor | None = None,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query, key and value: [tokens, heads * head_size]; returns query's shape."""
        tokens = query.shape[0]
        scales: dict[str, Any] = {}
        if self.kv_cache_dtype != "auto":
            scales = {"k_scale": layer._k_scale, "v_scale": layer._v_scale}
        over: dict[str, Any] = {
            "context_lens": attn_metadata.context_lens,
            "block_tables": attn_metadata.block_tables,
            "query_start_loc": attn_metadata.query_start_loc,
            "num_seqs": attn_metadata.num_seqs,
            "scale": self.scale,
            "sliding_window": self.sliding_window,
            "soft_cap": self.soft_cap,
            "alibi_slopes": self.alibi_slopes,
            "sinks": self.sinks,
            "kv_cache_dtype": self.kv_cache_dtype,
            **scales,
        }
        if self.kv_sharing_target_layer_name is None:
            where: tuple[Any, ...] = (*kv_cache.unbind(0), attn_metadata.slot_mapping)
            sizes = (self.num_heads, self.num_kv_heads, self.head_size)
            made_of = projection.find(query, key, value, *sizes)
            if made_of is not None:
                rows = fused_qk_norm_rope_and_paged_attention(*made_of, *where, **over)
                return rows.reshape(query.shape)
            shape = (tokens, self.num_kv_heads, self.head_size)
            reshape_and_cache_flash(
                *(key.view(shape), value.view(shape), *where, self.kv_cache_dtype),
                **scales,
            )
        queries = query.view(tokens, self.num_heads, self.head_size)
        out = paged_attention(queries, kv_cache, **over)
        assert isinstance(out, torch.Tensor)
        return out.reshape(query.shape)
