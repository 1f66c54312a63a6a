"""What a user could run instead of our ops, outside XLA.

Each peer takes a case's operands. One whose library is not installed raises
ImportError when it is called, which the runner records as absence.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


class Compiled:
    """A function through torch.compile's default backend, compiled at first use.

    Compiling takes seconds a shape, so the runner measures it after everything else.
    """

    def __init__(self, function: Callable):
        self._function = function
        self._compiled = None

    def __call__(self, *operands):
        if self._compiled is None:
            torch._dynamo.reset()
            self._compiled = torch.compile(self._function, dynamic=False)
        return self._compiled(*operands)


def inductor(function: Callable) -> dict[str, Callable]:
    """The function compiled, on a GPU; on a CPU compiling would take longest of all."""
    return {"inductor": Compiled(function)} if torch.cuda.is_available() else {}


def sdpa(query, key, value, causal: bool, backend: str | None):
    """torch's scaled_dot_product_attention, by one backend or torch's own choice."""
    if backend is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        return F.scaled_dot_product_attention(query, key, value, is_causal=causal)


def sdpa_backends(attend: Callable) -> dict[str, Callable]:
    """The peers that run `attend(*operands, backend=...)` by each backend."""
    if not torch.cuda.is_available():
        return {"torch SDPA": attend}

    def by(backend):
        return lambda *operands: attend(*operands, backend=backend)

    return {
        "SDPA FLASH": by("FLASH_ATTENTION"),
        "SDPA CUDNN": by("CUDNN_ATTENTION"),
    }


def libraries(op: str, *about) -> dict[str, Callable]:
    """The peers from other libraries that compute `op`.

    Args:
        about: what the makers in LIBRARIES take, such as the attention batch.
    """
    if not torch.cuda.is_available():
        return {}
    return {name: make(*about) for name, make in LIBRARIES.get(op, {}).items()}


def _flashinfer(name: str, *tail):
    def make():
        def run(*operands):
            import flashinfer

            return getattr(flashinfer, name)(*operands, *tail)

        return run

    return make


def _vllm_op(name: str, new: Callable, *tail):
    """An op of vLLM's that writes into tensors `new(*operands)` gives it first."""

    def make():
        def run(*operands):
            import vllm._custom_ops  # noqa: F401, loads torch.ops._C

            out = new(*operands)
            getattr(torch.ops._C, name)(*out, *operands, *tail)
            return out or operands[:2]

        return run

    return make


def _vllm_write():
    def run(key, value, key_cache, value_cache, slots):
        import vllm._custom_ops as ops

        one = key.new_ones(1, dtype=torch.float32)
        ops.reshape_and_cache_flash(
            key, value, key_cache, value_cache, slots, "auto", one, one
        )
        return key_cache, value_cache

    return run


def _vllm_attention(batch, query, key, value, starts, **kv):
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(
        query,
        key,
        value,
        max_seqlen_q=max(batch.query_lens),
        cu_seqlens_q=starts,
        max_seqlen_k=max(batch.kv_lens),
        softmax_scale=batch.scale,
        causal=batch.causal,
        fa_version=3,
        **kv,
    )


def _vllm_contiguous(batch):
    def run(query, key, value, starts):
        return _vllm_attention(batch, query, key, value, starts, cu_seqlens_k=starts)

    return run


def _vllm_paged(batch):
    def run(query, key_cache, value_cache, table, starts, lens):
        return _vllm_attention(
            batch, query, key_cache, value_cache, starts, seqused_k=lens,
            block_table=table,
        )  # fmt: skip

    return run


def _vllm_decode(batch):
    def run(query, key_cache, value_cache, table, lens, starts, count):
        return _vllm_attention(
            batch, query, key_cache, value_cache, starts, seqused_k=lens,
            block_table=table,
        )  # fmt: skip

    return run


def _empty_like_half(x):
    return (x.new_empty(*x.shape[:-1], x.shape[-1] // 2),)


# op -> peer's name -> maker of the peer.
LIBRARIES: dict[str, dict[str, Callable[..., Callable]]] = {
    "rms_norm": {
        "FlashInfer": _flashinfer("rmsnorm", 1e-6),
        "vLLM": _vllm_op("rms_norm", lambda x, w: (torch.empty_like(x),), 1e-6),
    },
    "fused_add_rms_norm": {
        "FlashInfer": _flashinfer("fused_add_rmsnorm", 1e-6),
        "vLLM": _vllm_op("fused_add_rms_norm", lambda *operands: (), 1e-6),
    },
    "silu_and_mul": {
        "FlashInfer": _flashinfer("silu_and_mul"),
        "vLLM": _vllm_op("silu_and_mul", _empty_like_half),
    },
    "static_scaled_fp8_quant": {
        "vLLM": _vllm_op(
            "static_scaled_fp8_quant",
            lambda x, scale: (torch.empty_like(x, dtype=torch.float8_e4m3fn),),
        ),
    },
    "reshape_and_cache_flash": {"vLLM": _vllm_write},
    "flash_attn_varlen": {"vLLM": _vllm_contiguous},
    "flash_attn_varlen paged": {"vLLM": _vllm_paged},
    "paged_attention": {"vLLM": _vllm_decode},
}
