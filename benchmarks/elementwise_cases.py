"""Cases of the elementwise ops and of the writes to the KV cache."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import peers
import xla_ops
from case import Case, Target
from xla_ops.core.op import OPS
from xla_ops.ops import rms_norm_backward

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
HEAD_DIM, PAGE, EPS = 128, 16, 1e-6


def _normal(*shape, device):
    return torch.randn(shape, dtype=BF16, device=device)


@dataclass(frozen=True)
class _Elementwise:
    """An elementwise op on [tokens, hidden]; `moved` counts bytes an element."""

    ours: Callable[..., Any]
    reference: Callable[..., Any]
    make: Callable[..., tuple]  # (tokens, hidden, device)
    moved: float
    eager: Callable[..., Any]
    chain: Callable[[tuple, Any], tuple] | None = None
    library: str = ""  # the op's name in peers.LIBRARIES


def _make_norm(tokens, hidden, device):
    return _normal(tokens, hidden, device=device), _normal(hidden, device=device)


def _make_add_norm(tokens, hidden, device):
    return _normal(tokens, hidden, device=device), *_make_norm(tokens, hidden, device)


def _make_gated(tokens, hidden, device):
    return (_normal(tokens, 2 * hidden, device=device),)


def _make_one(tokens, hidden, device):
    return (_normal(tokens, hidden, device=device),)


def _make_rotary(tokens, hidden, device):
    # Four query heads a KV head; positions within 8k, as in serving.
    positions = torch.randint(8192, (tokens,), device=device)
    angles = torch.rand(8192, HEAD_DIM // 2, device=device) * 6.3
    cache = torch.cat([angles.cos(), angles.sin()], -1).to(BF16)
    query = _normal(tokens, hidden, device=device)
    key = _normal(tokens, max(hidden // 4, HEAD_DIM), device=device)
    return positions, query, key, cache


def _make_quant(tokens, hidden, device):
    return _normal(tokens, hidden, device=device), torch.rand(1, device=device) + 0.01


def _eager_add_norm(x, residual, weight):
    z = x + residual
    return F.rms_norm(z, weight.shape, weight, EPS), z


def _eager_gated(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def _eager_swigluoai(x):
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def _eager_quant(x, scale):
    return (x.float() * (1 / scale)).clamp(-448, 448).to(FP8)


def _make_norm_gradient(tokens, hidden, device):
    return (_normal(tokens, hidden, device=device), *_make_norm(tokens, hidden, device))


def _make_gated_gradient(tokens, hidden, device):
    return (
        _normal(tokens, hidden, device=device),
        _normal(tokens, 2 * hidden, device=device),
    )


def _make_gradient(tokens, hidden, device):
    return tuple(_normal(tokens, hidden, device=device) for _ in "gx")


def _norm_gradient(grad, x, weight):
    wanted = ("input", "weight")
    found = rms_norm_backward.gradients(grad, x, weight, None, EPS, wanted)
    return tuple(found[name] for name in wanted)


def _norm_gradient_reference(grad, x, weight):
    reference = OPS["rms_norm_backward"].reference
    dx, sums = reference(grad, x, weight, None, EPS, [1])
    return dx, sums[0].to(weight.dtype)


def _activation_gradient(name, call):
    return lambda grad, x: call(grad, x, name, 0.0, 0.0, 0.0)


def _gradient_case(name, make, moved):
    """Of an activation; the eager peer is its definition in plain torch."""
    op = OPS["activation_backward"]
    reference = _activation_gradient(name, op.reference)
    return _Elementwise(
        _activation_gradient(name, op), reference, make, moved, reference
    )


def _rotary(positions, query, key, cache):
    return xla_ops.rotary_embedding(positions, query, key, HEAD_DIM, cache, True)


def _rotary_reference(positions, query, key, cache):
    reference = OPS["rotary_embedding_both"].reference
    return reference(positions, query, key, HEAD_DIM, cache, True)


ELEMENTWISE = {
    "rms_norm": _Elementwise(
        functools.partial(xla_ops.rms_norm, eps=EPS),
        functools.partial(OPS["rms_norm"].reference, eps=EPS),
        _make_norm,
        4,
        lambda x, weight: F.rms_norm(x, weight.shape, weight, EPS),
        lambda operands, out: (out, operands[1]),
        "rms_norm",
    ),
    "fused_add_rms_norm": _Elementwise(
        functools.partial(xla_ops.fused_add_rms_norm, eps=EPS),
        functools.partial(OPS["fused_add_rms_norm_functional"].reference, eps=EPS),
        _make_add_norm,
        8,
        _eager_add_norm,
        lambda operands, out: (*out, operands[2]),
        "fused_add_rms_norm",
    ),
    "silu_and_mul": _Elementwise(
        xla_ops.silu_and_mul,
        OPS["silu_and_mul"].reference,
        _make_gated,
        6,
        _eager_gated,
        library="silu_and_mul",
    ),
    "swigluoai_and_mul": _Elementwise(
        xla_ops.swigluoai_and_mul,
        functools.partial(
            OPS["swigluoai_and_mul_functional"].reference, alpha=1.702, limit=7.0
        ),
        _make_gated,
        6,
        _eager_swigluoai,
    ),
    "gelu_new": _Elementwise(
        xla_ops.gelu_new,
        OPS["gelu_new"].reference,
        _make_one,
        4,
        functools.partial(F.gelu, approximate="tanh"),
        lambda operands, out: (out,),
    ),
    "rotary_embedding": _Elementwise(
        _rotary,
        _rotary_reference,
        _make_rotary,
        5,
        _rotary_reference,
    ),
    "rms_norm backward": _Elementwise(
        _norm_gradient,
        _norm_gradient_reference,
        _make_norm_gradient,
        6,
        _norm_gradient_reference,
    ),
    "silu_and_mul backward": _gradient_case("silu_and_mul", _make_gated_gradient, 10),
    "gelu_and_mul backward": _gradient_case("gelu_and_mul", _make_gated_gradient, 10),
    "gelu_new backward": _gradient_case("gelu_new", _make_gradient, 6),
    "static_scaled_fp8_quant": _Elementwise(
        xla_ops.static_scaled_fp8_quant,
        OPS["static_scaled_fp8_quant"].reference,
        _make_quant,
        3,
        _eager_quant,
        library="static_scaled_fp8_quant",
    ),
}

LARGE = ((16384, 8192), (4096, 4096), (16384, 4096), (4096, 8192))
SMALL = ((64, 4096), (1, 4096))
ON_CPU = ((512, 1024), (1, 1024))
# Inside XLA and by inductor, where each size is programs to compile.
COMPILED = ((16384, 8192), (4096, 4096), (64, 4096), *ON_CPU)
QUICK = ((4096, 4096), (64, 4096), (512, 1024))


def elementwise(device: str) -> Iterator[Case]:
    for shape in (*LARGE, *SMALL) if device == "cuda" else ON_CPU:
        for op in ELEMENTWISE:
            yield _elementwise_case(op, *shape)
    if device == "cuda":  # the norm of each head of q and k
        yield _elementwise_case("rms_norm", 131072, 128)


def _elementwise_case(op: str, tokens: int, hidden: int) -> Case:
    e = ELEMENTWISE[op]
    shape = (tokens, hidden)
    small = tokens <= 64
    # Few tokens need a chain, or operands cost the host more than the op.
    in_xla = shape in COMPILED and not (small and e.chain is None)
    return Case(
        op,
        f"{tokens}x{hidden}",
        "small" if small else "elementwise",
        functools.partial(e.make, tokens, hidden),
        e.ours,
        e.reference,
        int(e.moved * tokens * hidden),
        peers={
            "torch eager": e.eager,
            **(peers.inductor(e.reference) if shape in COMPILED else {}),
            **peers.libraries(e.library),
        },
        target=Target("us", 4, 2) if small else Target("of copy", 0.90, 0.97),
        in_xla=in_xla,
        xla_target=Target("speedup", 1.0, 1.1, "XLA"),
        chain=e.chain if small else None,
        quick=shape in QUICK,
    )


# Heads of queries, keys and values: Qwen3-8B's.
QKV_HEADS = (32, 8, 8)


def _make_qk_norm_rope(tokens, device):
    qkv = _normal(tokens, sum(QKV_HEADS) * HEAD_DIM, device=device)
    weights = (_normal(HEAD_DIM, device=device) for _ in "qk")
    angles = torch.rand(8192, HEAD_DIM // 2, device=device) * 6.3
    cache = torch.cat([angles.cos(), angles.sin()], -1).to(BF16)
    return qkv, *weights, cache, torch.randint(8192, (tokens,), device=device)


def _qk_norm_rope(qkv, q_weight, k_weight, cache, positions):
    xla_ops.fused_qk_norm_rope(
        *(qkv, *QKV_HEADS, HEAD_DIM, EPS, q_weight, k_weight, cache, True, positions)
    )
    return qkv


def _qk_norm_rope_eagerly(qkv, q_weight, k_weight, cache, positions):
    reference = OPS["fused_qk_norm_rope_functional"].reference
    shape = (*QKV_HEADS, HEAD_DIM, EPS)
    return reference(qkv, *shape, q_weight, k_weight, cache, True, positions)


def qk_norm_ropes(device: str) -> Iterator[Case]:
    for tokens in (16384, 64) if device == "cuda" else (64,):
        touched = sum(QKV_HEADS[:2]) * HEAD_DIM
        yield Case(
            "fused_qk_norm_rope",
            f"{tokens}x{touched}",
            "cache" if tokens > 64 else "small",  # beside the others in place
            functools.partial(_make_qk_norm_rope, tokens),
            _qk_norm_rope,
            _qk_norm_rope_eagerly,
            4 * tokens * touched,
            peers={"torch eager": _qk_norm_rope_eagerly},
            in_place=True,
            quick=True,
        )


def _make_prepare(tokens, device):
    blocks = max(tokens // PAGE + 8, 64)
    _, _, *caches, slots = _make_write(tokens, QKV_HEADS[1], blocks, device)
    return *_make_qk_norm_rope(tokens, device), *caches, slots


def _prepare(qkv, q_weight, k_weight, table, positions, *cache):
    query = xla_ops.fused_qk_norm_rope_and_cache(
        *(qkv, *QKV_HEADS[:2], HEAD_DIM, EPS, q_weight, k_weight),
        *(table, True, positions, *cache),
    )
    return query, *cache[:2]


def _prepare_apart(qkv, q_weight, k_weight, table, positions, *cache):
    """As before there was one call: keys and values are copied out of the row."""
    _qk_norm_rope(qkv, q_weight, k_weight, table, positions)
    heads = qkv.unflatten(1, (-1, HEAD_DIM)).split(QKV_HEADS, 1)
    xla_ops.reshape_and_cache_flash(*heads[1:], *cache)
    return heads[0], *cache[:2]


def _prepare_eagerly(qkv, q_weight, k_weight, table, positions, *cache):
    qkv = _qk_norm_rope_eagerly(qkv, q_weight, k_weight, table, positions)
    heads = qkv.unflatten(1, (-1, HEAD_DIM)).split(QKV_HEADS, 1)
    _write_by_index(*heads[1:], *cache)
    return heads[0], *cache[:2]


def qk_norm_ropes_and_writes(device: str) -> Iterator[Case]:
    for tokens in (4096, 64) if device == "cuda" else (64,):
        row = sum(QKV_HEADS) * HEAD_DIM
        yield Case(
            "fused_qk_norm_rope_and_cache",
            f"{tokens}x{row}",
            "cache",
            functools.partial(_make_prepare, tokens),
            _prepare,
            _prepare_eagerly,
            # Reads a row; writes as many elements, some of them to the caches.
            4 * tokens * row,
            peers={"torch eager": _prepare_eagerly, "separate calls": _prepare_apart},
            target=Target("us", 4, 2) if tokens == 64 else None,
            in_place=True,
            quick=True,
        )


def _make_penalties(seqs, vocab, device):
    # What a sequence of a thousand tokens has of a vocabulary.
    marked = [torch.rand(seqs, vocab, device=device) < 512 / vocab for _ in "po"]
    logits = torch.randn(seqs, vocab, device=device)
    return logits, *marked, torch.rand(seqs, device=device) + 1


def _penalise(logits, *rest):
    xla_ops.apply_repetition_penalties_(logits, *rest)
    return logits


def _penalise_eagerly(logits, prompt, output, penalties):
    p = torch.where(prompt | output, penalties[:, None], 1.0)
    logits *= torch.where(logits > 0, 1 / p, p)
    return logits


def penalties(device: str) -> Iterator[Case]:
    """Reads two masks; the logits of marked tokens are a few sectors."""
    for seqs, vocab in (
        ((256, 128256), (1, 128256)) if device == "cuda" else ((4, 8192),)
    ):
        yield Case(
            "apply_repetition_penalties_",
            f"{seqs}x{vocab}",
            "cache" if seqs > 64 else "small",  # beside the others that work in place
            functools.partial(_make_penalties, seqs, vocab),
            _penalise,
            _penalise_eagerly,
            2 * seqs * vocab,
            peers={"torch eager": _penalise_eagerly},
            in_place=True,
            quick=seqs in (256, 4),
        )


def _make_write(tokens, heads, blocks, device):
    key, value = (_normal(tokens, heads, HEAD_DIM, device=device) for _ in "kv")
    caches = (_normal(blocks, PAGE, heads, HEAD_DIM, device=device) for _ in "kv")
    if tokens <= 256:  # of as many sequences
        slots = torch.randperm(blocks * PAGE)
    else:  # of prompts, page by page
        slots = (torch.randperm(blocks)[:, None] * PAGE + torch.arange(PAGE)).flatten()
    return key, value, *caches, slots[:tokens].to(device)


def _write(key, value, key_cache, value_cache, slots):
    xla_ops.reshape_and_cache_flash(key, value, key_cache, value_cache, slots)
    return key_cache, value_cache


def _write_by_index(key, value, key_cache, value_cache, slots):
    for rows, cache in ((key, key_cache), (value, value_cache)):
        cache.view(-1, *rows.shape[1:]).index_copy_(0, slots, rows)
    return key_cache, value_cache


def _make_first_layout_write(tokens, heads, blocks, device):
    key, value, keys, values, slots = _make_write(tokens, heads, blocks, device)
    x = 8
    keys = keys.view(blocks, heads, HEAD_DIM // x, PAGE, x)
    return key, value, keys, values.view(blocks, heads, HEAD_DIM, PAGE), slots


def _first_layout_write(key, value, key_cache, value_cache, slots):
    xla_ops.reshape_and_cache(key, value, key_cache, value_cache, slots)
    return key_cache, value_cache


def _first_layout_by_index(key, value, key_cache, value_cache, slots):
    page, offset = slots // PAGE, slots % PAGE
    for rows, cache in ((key, key_cache), (value, value_cache)):
        cache[page, :, :, offset] = rows.reshape(len(rows), *cache[0, :, :, 0].shape)
    return key_cache, value_cache


def _first_layout_case(tokens: int, blocks: int) -> Case:
    return Case(
        "reshape_and_cache",
        f"{tokens}x8x{HEAD_DIM}",
        "cache",
        functools.partial(_make_first_layout_write, tokens, 8, blocks),
        _first_layout_write,
        _first_layout_by_index,
        8 * tokens * 8 * HEAD_DIM,
        peers={"torch eager": _first_layout_by_index},
        in_place=True,
        quick=True,
    )


def cache_writes(device: str) -> Iterator[Case]:
    for tokens in (16384, 64, 256, 1) if device == "cuda" else (256, 1):
        blocks = max(tokens // PAGE + 8, 64)
        if tokens in (16384, 256):
            yield _first_layout_case(tokens, blocks)
        small = tokens <= 256
        yield Case(
            "reshape_and_cache_flash",
            f"{tokens}x8x{HEAD_DIM}",
            "cache",
            functools.partial(_make_write, tokens, 8, blocks),
            _write,
            _write_by_index,
            8 * tokens * 8 * HEAD_DIM,
            peers={
                "torch eager": _write_by_index,
                **peers.libraries("reshape_and_cache_flash"),
            },
            target=Target("us", 4, 2) if small else Target("of copy", 0.75, 0.85),
            in_place=True,
            quick=tokens in (16384, 64, 256),
        )
