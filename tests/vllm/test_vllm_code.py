"""vLLM 0.12.0's own Python code on every path: vllm._custom_ops, flash attention.

A target tagged `manual`, because vLLM's wheel is half a gigabyte. XLA_OPS_TEST_VLLM is
the folder that holds its package `vllm`; the wheel's *.py are enough: see
docs/vllm_ops.md.
With its compiled libraries in that folder too, the ops are those of the libraries.
"""

import pathlib
import sys

import pytest
import torch

import xla_ops
import xla_ops.vllm
from support import setting

sys.path.insert(0, setting("XLA_OPS_TEST_VLLM", "the folder of vLLM's package `vllm`"))
import vllm._custom_ops as ops
from vllm.version import __version__ as vllm_version
from vllm.vllm_flash_attn import flash_attn_varlen_func

xla_ops.vllm.register_lowerings()

EPS = 1e-5
FP8 = torch.float8_e4m3fn


def same(got, *wanted):
    for g, w in zip(got, wanted, strict=True):
        assert torch.equal(g.float(), w.float())


def test_version():
    assert vllm_version == "0.12.0"


@pytest.mark.parametrize(
    "file, op",
    [
        ("_C.abi3.so", "_C::rms_norm"),
        ("vllm_flash_attn/_vllm_fa2_C.abi3.so", "_vllm_fa2_C::varlen_fwd"),
    ],
)
def test_library_is_loaded_if_it_is_there(file, op):
    folder = pathlib.Path(sys.path[0], "vllm")
    own = torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA")
    assert own == (folder / file).exists()


def test_rms_norm(path):
    x, w = torch.randn(5, 24), torch.randn(24)

    def into_view(base, x, w):
        ops.rms_norm(base[1:6], x, w, EPS)

    _, (base, *_) = path.run(into_view, torch.zeros(7, 24), x, w)
    same([base[1:6]], xla_ops.rms_norm(x, w, EPS))
    assert not base[0].any() and not base[6].any()


def test_fused_add_rms_norm(path):
    x, residual, w = torch.randn(5, 24), torch.randn(5, 24), torch.randn(24)
    _, got = path.run(
        lambda x, r, w: ops.fused_add_rms_norm(x, r, w, EPS), x, residual, w
    )
    same(got[:2], *xla_ops.fused_add_rms_norm(x, residual, w, EPS))


@pytest.mark.parametrize("dtype", [FP8, torch.int8])
def test_rms_norm_dynamic_per_token_quant(path, dtype):
    x, w = torch.randn(5, 24), torch.randn(24)
    got, _ = path.run(
        lambda x, w: ops.rms_norm_dynamic_per_token_quant(x, w, EPS, dtype), x, w
    )
    wanted = xla_ops.rms_norm_dynamic_per_token_quant(x, w, dtype, EPS)
    same(got, wanted[0], wanted[1].reshape(5, 1))


@pytest.mark.parametrize("is_neox", [True, False])
def test_rotary_embedding(path, is_neox):
    positions, cache = torch.tensor([3, 0, 7]), torch.randn(8, 16)
    query, key = torch.randn(3, 64), torch.randn(3, 32)
    _, got = path.run(
        lambda p, q, k, c: ops.rotary_embedding(p, q, k, 16, c, is_neox),
        *(positions, query, key, cache),
    )
    wanted = query.clone(), key.clone()
    torch.ops.xla_ops.rotary_embedding(positions, *wanted, 16, cache, is_neox)
    same(got[1:3], *wanted)


@pytest.mark.parametrize("per_token", [True, False])
def test_scaled_fp8_quant(path, per_token):
    x = torch.randn(5, 24)
    got, _ = path.run(
        lambda x: ops.scaled_fp8_quant(x, use_per_token_if_dynamic=per_token), x
    )
    dynamic = xla_ops.dynamic_scaled_fp8_quant
    if per_token:
        dynamic = xla_ops.dynamic_per_token_scaled_fp8_quant
    result, scale = dynamic(x)
    same(got, result, scale.reshape(got[1].shape))


def test_scaled_fp8_quant_static_and_padded(path):
    x, scale = torch.randn(5, 24), torch.full((1,), 1 / 64)
    got, _ = path.run(
        lambda x, s: ops.scaled_fp8_quant(x, s, num_token_padding=8), x, scale
    )
    assert got[0].shape == (8, 24)
    same([got[0][:5]], xla_ops.static_scaled_fp8_quant(x, scale))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_scaled_int8_quant(path, static, symmetric):
    x = torch.randn(5, 24)
    scale = torch.full((1,), 1 / 64) if static else None
    azp = torch.ones(1, dtype=torch.int32) if static and not symmetric else None
    got, _ = path.run(
        lambda x, scale, azp: ops.scaled_int8_quant(x, scale, azp, symmetric),
        *(x, scale, azp),
    )
    result = torch.empty(5, 24, dtype=torch.int8)
    if static:
        torch.ops.xla_ops.static_scaled_int8_quant.out(result, x, scale, azp)
        same([got[0]], result)
        return
    scale = torch.empty(5, 1)
    azp = None if symmetric else torch.empty(5, 1, dtype=torch.int32)
    torch.ops.xla_ops.dynamic_scaled_int8_quant.out(result, x, scale, azp)
    same(got[:2], result, scale)
    assert symmetric or torch.equal(got[2], azp)


def test_merge_attn_states(path):
    parts = torch.randn(5, 4, 16), torch.randn(4, 5)
    parts += torch.randn(5, 4, 16), torch.randn(4, 5)
    _, got = path.run(
        lambda out, lse, *parts: ops.merge_attn_states(out, *parts, lse),
        *(torch.zeros(5, 4, 16), torch.zeros(4, 5), *parts),
    )
    same(got[:2], *xla_ops.merge_attn_states(*parts))


@pytest.mark.parametrize("window", [None, (3, 0)])
@pytest.mark.parametrize("paged", [True, False])
def test_flash_attn_varlen_func(path, paged, window):
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    lens = torch.tensor([9, 3], dtype=torch.int32)
    table = torch.tensor([[4, 1], [2, 0]], dtype=torch.int32) if paged else None
    ends = None if paged else torch.tensor([0, 9, 12], dtype=torch.int32)
    kv = torch.randn(2, 6, 8, 2, 16) if paged else torch.randn(2, 12, 2, 16)
    q, slopes = torch.randn(5, 4, 16), torch.rand(4)

    def call(base, q, kv, starts, ends, lens, table, slopes):
        return flash_attn_varlen_func(
            q=q,
            k=kv[0],
            v=kv[1],
            out=base[1:6],
            max_seqlen_q=3,
            cu_seqlens_q=starts,
            max_seqlen_k=9,
            cu_seqlens_k=ends,
            seqused_k=lens if paged else None,
            causal=True,
            window_size=window,
            softcap=20.0,
            alibi_slopes=slopes,
            block_table=table,
            return_softmax_lse=True,
        )

    base = torch.zeros(7, 4, 16)
    given = (base, q, kv, starts, ends, lens, table, slopes)
    got, (after, *_) = path.run(call, *given)
    wanted = xla_ops.flash_attn_varlen(
        *(q, *kv, starts, ends, 3, 9, None, True, *(window or (-1, -1)), 20.0),
        seqused_k=lens if paged else None,
        block_table=table,
        alibi_slopes=slopes,
    )
    same(got, *wanted)
    assert torch.equal(after[1:6], got[0])
    assert not after[0].any() and not after[6].any()


def test_kv_cache(path):
    key, value = torch.randn(3, 2, 16), torch.randn(3, 2, 16)
    slots, one = torch.tensor([9, -1, 17]), torch.ones(())
    blocks = torch.tensor([[1, 0], [2, 3]])

    def write_and_copy(kv, key, value, slots, blocks, one):
        k, v = kv.unbind(0)
        ops.reshape_and_cache_flash(key, value, k, v, slots, "auto", one, one)
        ops.copy_blocks([k], [v], blocks)

    cache = torch.randn(2, 4, 8, 2, 16)
    _, (got, *_) = path.run(write_and_copy, cache, key, value, slots, blocks, one)
    wanted = cache.clone()
    for kv, new in zip(wanted, (key, value), strict=True):
        kv[1, 1], kv[2, 1] = new[0], new[2]
        kv[0], kv[3] = kv[1].clone(), kv[2].clone()
    assert torch.equal(got, wanted)


def test_fused_qk_norm_rope(path):
    qkv, weights = torch.randn(3, 8 * 16), torch.rand(2, 16)
    cache, positions = torch.randn(8, 16), torch.tensor([3, 0, 7])
    sizes = (4, 2, 2, 16, EPS)
    _, (got, *_) = path.run(
        lambda x, w, c, p: ops.fused_qk_norm_rope(x, *sizes, *w, c, True, p),
        *(qkv, weights, cache, positions),
    )
    wanted = qkv.clone()
    xla_ops.fused_qk_norm_rope(wanted, *sizes, *weights, cache, True, positions)
    same([got], wanted)
    assert not torch.equal(got, qkv)


def test_apply_repetition_penalties(path):
    """vLLM's own torch code is what it does on a device without the op."""
    logits, penalties = torch.randn(5, 24), torch.rand(5) + 1
    args = logits, torch.randn(5, 24) > 1, torch.randn(5, 24) > 1, penalties
    _, (got, *_) = path.run(ops.apply_repetition_penalties_cuda, *args)
    wanted = logits.clone()
    ops.apply_repetition_penalties_torch(wanted, *args[1:])
    torch.testing.assert_close(got, wanted)
    assert not torch.equal(got, logits)


def test_first_layout_and_blocks(path):
    key, slots = torch.randn(3, 2, 16), torch.tensor([9, -1, 17])
    keys, values = torch.zeros(4, 2, 4, 8, 4), torch.zeros(4, 2, 16, 8)

    def write_swap_and_convert(keys, values, others, codes, key, slots, blocks, one):
        ops.reshape_and_cache(key, key, keys, values, slots, "auto", one, one)
        ops.swap_blocks(values, others, blocks)
        ops.convert_fp8(codes, others, 0.5)

    _, (got_keys, got_values, others, codes, *_) = path.run(
        write_swap_and_convert,
        *(keys, values, torch.zeros(3, 2, 16, 8), torch.zeros(3, 2, 16, 8).to(FP8)),
        *(key, slots, torch.tensor([[1, 2], [2, 0]]), torch.ones(())),
    )
    for token, slot in ((0, 9), (2, 17)):
        found = got_keys[slot // 8, :, :, slot % 8].reshape(2, 16)
        same([found, got_values[slot // 8, :, :, slot % 8]], key[token], key[token])
    assert got_keys.count_nonzero() == got_values.count_nonzero() == 2 * key[0].numel()
    same([others[2], others[0], others[1]], got_values[1], got_values[2], values[0])
    same([codes], (others / 0.5).to(FP8))
