#!/usr/bin/env python3
"""Checks the elementwise kernels against numpy: activations, quantisation, convert_fp8,
apply_repetition_penalties, rotary_embedding, fused_qk_norm_rope, merge_attn_states,
copy_blocks, swap_blocks and reshape_and_cache.

    check_elementwise.py --lib-dir DIR [--out results.json] [--quick] [--cpu]
                         [--only CHECK]

Needs a GPU, JAX and numpy, and the libraries libxla_ops_*_cuda.so in DIR,
and the wheel, or its content on PYTHONPATH, without torch.
--quick runs a small set, for
compute-sanitizer; --cpu checks libxla_ops_*_cpu.so by the same cases; --only
runs the checks whose names hold a word, such as merge. Exit status 1 if a case
fails, or if there is none.
"""

import argparse
import itertools
import json
import math
import sys
import traceback

import jax
import jax.numpy as jnp
import numpy as np

import kernel_calls
from kernel_cases import BF16, DTYPES, F32, ROUNDING, poison

jax.config.update("jax_enable_x64", True)

E4M3, E5M2 = np.dtype(jnp.float8_e4m3fn), np.dtype(jnp.float8_e5m2)


def call(target, results, *args, aliases=None, **attributes):
    """Calls a target; `results` are arrays or (shape, dtype) pairs."""
    shapes = [
        jax.ShapeDtypeStruct(*(r if isinstance(r, tuple) else (r.shape, r.dtype)))
        for r in results
    ]
    for shape in shapes:
        if shape.dtype in DTYPES and shape.size < 2**26:
            poison(shape.shape, shape.dtype)
    f = jax.ffi.ffi_call(
        f"xla_ops.{target}", tuple(shapes), input_output_aliases=aliases or {}
    )
    return jax.jit(lambda *args: f(*args, **attributes))(*args)


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    erf = np.vectorize(math.erf, otypes=[np.float64])
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# Each op's activation, and the half that it applies to.
ACTIVATIONS = {
    "silu_and_mul": (silu, 0),
    "mul_and_silu": (silu, 1),
    "gelu_and_mul": (gelu, 0),
    "gelu_tanh_and_mul": (gelu_tanh, 0),
}


def check_activation(rng, name, dtype, tokens, size):
    x = (rng.standard_normal((tokens, 2 * size)) * 3).astype(dtype)
    (got,) = call(name, [((tokens, size), dtype)], x)
    activate, half = ACTIVATIONS[name]
    halves = x[:, :size].astype(np.float64), x[:, size:].astype(np.float64)
    gate = activate(halves[half]).astype(dtype).astype(np.float64)
    want = gate * halves[1 - half]
    # The last bits of fp32's exp move the first rounding by one step at most;
    # 1 + erf and 1 + tanh cancel below zero, to a few fp32 steps of x.
    steps = 16 if dtype == F32 else 3
    bound = steps * ROUNDING[dtype] * np.abs(want)
    bound += 2.0**-21 * np.abs(halves[0] * halves[1]) + 2.0**-23
    error = np.abs(np.asarray(got).astype(np.float64) - want)
    assert (error <= bound).all(), f"{(error > bound).sum()} elements are off"


def gelu_inner(name, x, rounded):
    if name == "gelu_new":
        cube = rounded(rounded(x * x) * x)
        return 0.79788456 * rounded(x + rounded(0.044715 * cube))
    square = rounded(rounded(0.044715 * x) * x)
    return rounded(0.79788456 * x) * rounded(1 + square)


def check_alone(rng, name, dtype, tokens, size):
    x = (rng.standard_normal((tokens, size)) * 3).astype(dtype)
    rounded = lambda v: v.astype(dtype).astype(np.float64)  # noqa: E731
    x64 = x.astype(np.float64)
    if name == "gelu_quick":
        want = x64 / (1 + np.exp(-1.702 * x64))
    else:
        tanh = rounded(np.tanh(rounded(gelu_inner(name, x64, rounded))))
        want = rounded(0.5 * x64) * rounded(1 + tanh)
    # A last bit of tanh may move the rounding of 1 + tanh by one step, and a step of
    # its argument that of tanh; fp32's cancels below zero, to a few steps of x.
    bound = 3 * ROUNDING[dtype] * np.abs(want) + 2.0**-20 * np.abs(x64) + 2.0**-23
    if dtype != F32 and name != "gelu_quick":
        bound += 2 * ROUNDING[dtype] * np.abs(x64) * (np.abs(x64) < 6)
    for alias in (False, True):
        aliases = {0: 0} if alias else {}
        (got,) = call(name, [x], x, aliases=aliases)
        error = np.abs(np.asarray(got).astype(np.float64) - want)
        assert (error <= bound).all(), f"{(error > bound).sum()} elements are off"


def check_fatrelu(rng, dtype, tokens, size):
    x = (rng.standard_normal((tokens, 2 * size)) * 3).astype(dtype)
    threshold = np.float32(0.5)
    (got,) = call("fatrelu_and_mul", [((tokens, size), dtype)], x, threshold=threshold)
    gate, up = x[:, :size].astype(np.float32), x[:, size:].astype(np.float32)
    want = (np.where(gate > threshold, gate, 0) * up).astype(dtype)
    assert np.array_equal(np.asarray(got), want), "not the same to the bit"


def check_swigluoai(rng, dtype, tokens, size):
    x = (rng.standard_normal((tokens, 2 * size)) * 6).astype(dtype)
    constants = {"alpha": np.float32(1.702), "limit": np.float32(7)}
    (got,) = call("swigluoai_and_mul", [((tokens, size), dtype)], x, **constants)
    gate = np.minimum(x[:, ::2].astype(np.float64), 7)
    up = np.clip(x[:, 1::2].astype(np.float64), -7, 7)
    want = (up + 1) * gate / (1 + np.exp(-np.float64(np.float32(1.702)) * gate))
    bound = (ROUNDING[dtype] + 2.0**-19) * np.abs(want) + 2.0**-23
    error = np.abs(np.asarray(got).astype(np.float64) - want)
    assert (error <= bound).all(), f"{(error > bound).sum()} elements are off"


def check_quant(rng, dtype, tokens, size):
    x = (rng.standard_normal((tokens, 2 * size)) * 3).astype(dtype)
    x[0, 0] = np.nan
    scale = np.float32([0.013])
    (gated,) = call("silu_and_mul", [((tokens, size), dtype)], x)
    (got,) = call("silu_and_mul_quant", [((tokens, size), E4M3)], x, scale)
    want = np.asarray(gated).astype(np.float32) * (np.float32(1) / scale)
    want = np.nan_to_num(np.clip(want, -448, 448), nan=448.0).astype(E4M3)
    assert np.array_equal(np.asarray(got).view(np.uint8), want.view(np.uint8))


def check_static_quant(rng, dtype, tokens, size):
    x = (rng.standard_normal((tokens, size), np.float32) * 3).astype(dtype)
    x.reshape(-1)[:1] = np.nan
    scale = np.float32([0.013])
    (got,) = call("static_scaled_fp8_quant", [(x.shape, E4M3)], x, scale)
    want = x.astype(np.float32) * (np.float32(1) / scale)
    want = np.nan_to_num(np.clip(want, -448, 448), nan=448.0).astype(E4M3)
    assert np.array_equal(np.asarray(got).view(np.uint8), want.view(np.uint8))


def check_convert(rng, dtype, fp8, tokens, size):
    name = {E4M3: "fp8_e4m3", E5M2: "fp8_e5m2"}[fp8]
    attributes = {"kv_cache_dtype": name, "scale": np.float32(0.37)}
    x = (rng.standard_normal((tokens, size)) * 60).astype(dtype)
    x.reshape(-1)[:3] = [np.nan, np.inf, -np.inf][: x.size]
    largest = float(jnp.finfo(fp8).max)
    want = (x.astype(np.float32) / np.float32(0.37)).clip(-largest, largest).astype(fp8)
    for result in (fp8, np.dtype(np.uint8)):
        (codes,) = call("convert_fp8", [(x.shape, result)], x, **attributes)
        assert np.array_equal(
            np.asarray(codes).view(fp8).astype(np.float32),
            want.astype(np.float32),
            equal_nan=True,
        )
    codes = np.arange(tokens * size).astype(np.uint8).reshape(tokens, size)
    want = (codes.view(fp8).astype(np.float32) * np.float32(0.37)).astype(dtype)
    for source in (codes, codes.view(fp8)):
        (got,) = call("convert_fp8", [(x.shape, dtype)], source, **attributes)
        assert np.array_equal(
            np.asarray(got).astype(np.float32),
            want.astype(np.float32),
            equal_nan=True,
        )


def rotated(heads, positions, cache, is_neox):
    """The definition, each product and sum rounded to the dtype."""
    dtype, pairs = heads.dtype, cache.shape[1] // 2
    out = heads.copy()
    valid = (positions >= 0) & (positions < len(cache))
    row = cache[positions[valid]][:, None]
    cos, sin = row[..., :pairs], row[..., pairs:]
    first = np.s_[..., :pairs] if is_neox else np.s_[..., : 2 * pairs : 2]
    second = np.s_[..., pairs : 2 * pairs] if is_neox else np.s_[..., 1 : 2 * pairs : 2]
    old = heads[valid].astype(np.float32)
    x, y = old[first], old[second]

    def product(a, b):
        return (a * b.astype(np.float32)).astype(dtype).astype(np.float32)

    new = heads[valid]
    new[first] = (product(x, cos) - product(y, sin)).astype(dtype)
    new[second] = (product(y, cos) + product(x, sin)).astype(dtype)
    out[valid] = new
    return out


def check_rotary(rng, dtype, is_neox, tokens, heads, head_size, rotary_dim):
    positions = rng.integers(-1, 12, tokens)
    query = rng.standard_normal((tokens, 2 * heads, head_size)).astype(dtype)
    key = rng.standard_normal((tokens, heads, head_size)).astype(dtype)
    cache = rng.standard_normal((11, rotary_dim)).astype(dtype)
    attributes = {"head_size": np.int64(head_size), "is_neox": is_neox}
    got = call(
        "rotary_embedding", [query, key], positions, query, key, cache, **attributes
    )
    for result, before in zip(got, (query, key), strict=True):
        want = rotated(before, positions, cache, is_neox)
        assert np.array_equal(np.asarray(result), want), "not the same to the bit"
    # Alone, with positions of 32 bits and an fp32 cache, which is rounded first.
    for table in (cache, cache.astype(F32)):
        (alone,) = call(
            "rotary_embedding_one",
            [query],
            *(positions.astype(np.int32), query, table),
            **attributes,
        )
        assert np.array_equal(np.asarray(alone), np.asarray(got[0]))


def check_qk_norm_rope(rng, dtype, wide, is_neox, tokens, heads, head_dim):
    """Two query heads a key head, and a value head that stays."""
    q, k, v, pairs = 2 * heads, heads, 1, head_dim // 2
    qkv = (rng.standard_normal((tokens, (q + k + v) * head_dim)) * 2).astype(dtype)
    weights = [(1 + 0.3 * rng.standard_normal(head_dim)).astype(dtype) for _ in "qk"]
    table = rng.standard_normal((11, head_dim)).astype(F32 if wide else dtype)
    positions = rng.integers(-1, 12, tokens)
    x = qkv.reshape(tokens, q + k + v, head_dim).astype(np.float64)
    weight = np.repeat(np.stack(weights).astype(np.float64), [q, k], axis=0)
    eps = np.float32(1e-5)
    y = x[:, : q + k]
    y = y / np.sqrt((y**2).mean(-1, keepdims=True) + eps) * weight
    valid = (positions >= 0) & (positions < len(table))
    row = np.where(
        valid[:, None],
        table[positions.clip(0, len(table) - 1)].astype(np.float64),
        np.repeat([1.0, 0.0], pairs),
    )[:, None]
    cos, sin = row[..., :pairs], row[..., pairs:]
    first = np.s_[..., :pairs] if is_neox else np.s_[..., ::2]
    second = np.s_[..., pairs:] if is_neox else np.s_[..., 1::2]
    a, b = y[first], y[second]
    want = x.copy()
    want[:, : q + k][first] = a * cos - b * sin
    want[:, : q + k][second] = b * cos + a * sin
    # Parts of a difference may be larger than it.
    parts = np.zeros_like(want)
    parts[:, : q + k][first] = np.abs(a * cos) + np.abs(b * sin)
    parts[:, : q + k][second] = np.abs(b * cos) + np.abs(a * sin)
    bound = ROUNDING[dtype] * np.abs(want) + 2.0**-20 * parts + 2.0**-25
    attributes = {"num_heads_q": q, "num_heads_k": k, "num_heads_v": v}
    attributes |= {"head_dim": head_dim}
    attributes = {name: np.int64(value) for name, value in attributes.items()}
    attributes |= {"eps": eps, "is_neox": is_neox}
    for aliases in ({0: 0}, {}):
        for ids in (positions, positions.astype(np.int32)):
            args = (qkv, *weights, table, ids)
            (got,) = call(
                "fused_qk_norm_rope", [qkv], *args, aliases=aliases, **attributes
            )
            error = np.abs(np.asarray(got).astype(np.float64).reshape(x.shape) - want)
            assert (error <= bound).all(), f"{(error > bound).sum()} elements are off"


def check_merge(rng, dtype, tokens, heads, head_dim):
    p, s = (rng.standard_normal((tokens, heads, head_dim)).astype(dtype) for _ in "ps")
    pl, sl = (
        (rng.standard_normal((heads, tokens)) * 4).astype(np.float32) for _ in "ps"
    )
    pl[0, 0], sl[-1, -1] = np.inf, -np.inf
    if tokens * heads > 1:
        p[0, 0], s[-1, -1] = np.nan, np.nan
    got, lse = call("merge_attn_states", [p, pl], p, pl, s, sl)
    p64, s64 = np.nan_to_num(p.astype(np.float64)), np.nan_to_num(s.astype(np.float64))
    wp, ws = (
        np.exp(np.where(x == np.inf, -np.inf, x).astype(np.float64)) for x in (pl, sl)
    )
    both = (wp + ws == 0).T[..., None]
    with np.errstate(divide="ignore", invalid="ignore"):
        a = p64 * np.where(both, 1, (wp / (wp + ws)).T[..., None])
        b = s64 * np.where(both, 0, (ws / (wp + ws)).T[..., None])
        want_lse = np.log(wp + ws)
    bound = (
        ROUNDING[dtype] * np.abs(a + b) + 2.0**-20 * (np.abs(a) + np.abs(b)) + 2.0**-25
    )
    error = np.abs(np.asarray(got).astype(np.float64) - (a + b))
    assert (error <= bound).all(), f"{(error > bound).sum()} elements are off"
    assert np.allclose(np.asarray(lse), want_lse, rtol=1e-6, atol=4e-6)


def check_penalties(rng, dtype, seqs, vocab, share):
    logits = (rng.standard_normal((seqs, vocab)) * 3).astype(dtype)
    prompt, output = (rng.random((seqs, vocab)) < share for _ in "po")
    penalties = (rng.random(seqs) + 0.7).astype(dtype)
    x, p = logits.astype(np.float32), penalties.astype(np.float32)[:, None]
    want = np.where(x > 0, x / p, x * p).astype(dtype)
    want = np.where(prompt | output, want, logits)
    for aliases in ({0: 0}, {}):
        (got,) = call(
            "apply_repetition_penalties",
            [logits],
            *(logits, prompt, output, penalties),
            aliases=aliases,
        )
        assert np.array_equal(np.asarray(got), want), "not the same to the bit"


def geometry(blocks, size, stride=None, offset=0):
    """Blocks of `size` elements in one run, `stride` apart."""
    values = {
        "num_blocks": blocks,
        "page_size": 1,
        "num_kv_heads": 1,
        "head_dim": size,
        "block_stride": size if stride is None else stride,
        "page_stride": 0,
        "head_stride": 0,
        "offset": offset,
    }
    return {name: np.int64(value) for name, value in values.items()} | {"debug": False}


def check_copy(rng, dtype, blocks, size, pairs, offset):
    stride = size + offset
    cache = rng.integers(0, 100, blocks * stride + offset).astype(dtype)
    mapping = rng.integers(-1, blocks + 1, (pairs, 2))
    want = cache.copy()
    rows = want[offset : offset + blocks * stride].reshape(blocks, stride)[:, :size]
    for source, target in mapping:
        if 0 <= source < blocks and 0 <= target < blocks:
            rows[target] = rows[source].copy()
    attributes = geometry(blocks, size, stride, offset)
    for aliases in ({0: 0}, {}):
        (got,) = call(
            "copy_blocks", [cache], cache, mapping, aliases=aliases, **attributes
        )
        assert np.array_equal(np.asarray(got), want)


def check_swap(rng, dtype, blocks, size, pairs, offset):
    """From a cache of more blocks, twice as far apart."""
    src_blocks, src_stride, stride = blocks + 3, 2 * size, size + offset
    src = rng.integers(0, 100, src_blocks * src_stride).astype(dtype)
    dst = rng.integers(0, 100, blocks * stride + offset).astype(dtype)
    mapping = rng.integers(-1, blocks + 4, (pairs, 2))
    want = dst.copy()
    rows = want[offset : offset + blocks * stride].reshape(blocks, stride)[:, :size]
    for source, target in mapping:
        if 0 <= source < src_blocks and 0 <= target < blocks:
            rows[target] = src.reshape(src_blocks, src_stride)[source, :size]
    values = {"num_src_blocks": src_blocks, "num_dst_blocks": blocks}
    values |= {"page_size": 1, "num_kv_heads": 1, "head_dim": size}
    values |= {"src_block_stride": src_stride, "dst_block_stride": stride}
    values |= {"src_offset": 0, "dst_offset": offset}
    values |= {f"{c}_{n}_stride": 0 for c in ("src", "dst") for n in ("page", "head")}
    attributes = {name: np.int64(value) for name, value in values.items()}
    attributes["debug"] = False
    for aliases in ({0: 0}, {}):
        (got,) = call(
            "swap_blocks", [dst], dst, src, mapping, aliases=aliases, **attributes
        )
        assert np.array_equal(np.asarray(got), want)


def check_cache_write(rng, dtype, fp8, tokens, heads, head_dim, page, x):
    """Both caches at once, in place and not; one alone; both in one buffer."""
    blocks, block = 5, heads * head_dim * page
    cache_dtype = fp8 or dtype
    key, value = (
        (rng.standard_normal((tokens, heads, head_dim)) * 40).astype(dtype)
        for _ in "kv"
    )
    slots = np.full(tokens, -1)
    count = min(tokens, blocks * page)
    # Runs of neighbours, as a prefill has them, and single ones; and no slots at all.
    slots[:count] = np.roll(np.arange(blocks * page), 3)[:count]
    slots[count // 2 : count] = rng.permutation(slots[count // 2 : count])
    slots[rng.random(tokens) < 0.1] = blocks * page
    scales = np.float32([0.37]), np.float32([1.9])
    before = rng.integers(0, 100, (2, blocks, block)).astype(cache_dtype)
    want = before.copy()
    largest = float(jnp.finfo(fp8).max) if fp8 else None
    for side, (rows, scale, chunk) in enumerate(
        ((key, scales[0], x), (value, scales[1], 1))
    ):
        view = want[side].reshape(blocks, heads, head_dim // chunk, page, chunk)
        if fp8:
            rows = (rows.astype(np.float32) / scale).clip(-largest, largest).astype(fp8)
        for token, slot in enumerate(slots):
            if 0 <= slot < blocks * page:
                row = rows[token].reshape(heads, head_dim // chunk, chunk)
                view[slot // page, :, :, slot % page] = row
    names = {None: "auto", E4M3: "fp8_e4m3", E5M2: "fp8_e5m2"}
    sizes = {"num_blocks": blocks, "page_size": page, "key_x": x}
    sizes |= {"key_block_stride": block, "key_offset": 0}
    sizes = {name: np.int64(size) for name, size in sizes.items()}
    one = sizes | {"kv_cache_dtype": names[fp8], "debug": False}
    both = one | {"value_block_stride": np.int64(block), "value_offset": np.int64(0)}
    stacked = both | {"value_offset": np.int64(blocks * block)}
    for in_place in (True, False):
        aliases = {2: 0, 3: 1} if in_place else {}
        args = (key, value, *before, slots, *scales)
        got = call("reshape_and_cache", list(before), *args, aliases=aliases, **both)
        assert np.array_equal(raw(np.stack([np.asarray(g) for g in got])), raw(want))
    args = (key, value, before, slots, *scales)
    (got,) = call(
        "reshape_and_cache_stacked", [before], *args, aliases={2: 0}, **stacked
    )
    assert np.array_equal(raw(got), raw(want))
    args = (key, before[0], slots, scales[0])
    (got,) = call("reshape_and_cache_one", before[:1], *args, aliases={1: 0}, **one)
    assert np.array_equal(raw(got), raw(want[0]))


def raw(x):
    return np.ascontiguousarray(np.asarray(x)).view(np.uint8)


def cases(quick):
    sizes = (
        [(1, 1), (3, 7), (5, 40)]
        if quick
        else [
            *[(1, 1), (3, 7), (5, 40), (0, 8), (1, 14336), (300, 257), (5000, 96)],
        ]
    )
    for name, dtype, (tokens, size) in itertools.product(ACTIVATIONS, DTYPES, sizes):
        case = {"name": name, "dtype": dtype, "tokens": tokens, "size": size}
        yield check_activation, case
    for dtype, (tokens, size) in itertools.product(DTYPES, sizes):
        case = {"dtype": dtype, "tokens": tokens, "size": size}
        for name in ("gelu_new", "gelu_fast", "gelu_quick"):
            yield check_alone, case | {"name": name}
        yield check_fatrelu, case
        yield check_swigluoai, case
        for fp8 in (E4M3, E5M2):
            yield check_convert, case | {"fp8": fp8}
        yield check_static_quant, case
        if tokens:
            yield check_quant, case
    if not quick:
        # From 2^23 elements on a thread takes two vectors.
        for dtype, size in itertools.product(DTYPES, (4096, 4099)):
            yield check_static_quant, {"dtype": dtype, "tokens": 2049, "size": size}
    heads = (
        [(3, 1, 7, 6), (5, 2, 64, 32)]
        if quick
        else [
            *[
                (3, 1, 7, 6),
                (5, 2, 64, 32),
                (1, 1, 2, 2),
                (4, 3, 80, 20),
                (2, 2, 16, 0),
            ],
            *[(700, 4, 128, 128), (33, 8, 256, 64)],
        ]
    )
    for dtype, is_neox, (tokens, count, size, rotary) in itertools.product(
        DTYPES, (True, False), heads
    ):
        case = {"tokens": tokens, "heads": count, "head_size": size}
        case |= {"dtype": dtype, "is_neox": is_neox, "rotary_dim": rotary}
        yield check_rotary, case
    for dtype, is_neox, wide, (tokens, count, size, _) in itertools.product(
        DTYPES, (True, False), (False, True), heads
    ):
        case = {"tokens": tokens, "heads": count, "head_dim": size // 2 * 2}
        case |= {"dtype": dtype, "is_neox": is_neox, "wide": wide}
        yield check_qk_norm_rope, case
    outputs = (
        [(2, 3, 7), (5, 2, 64)]
        if quick
        else [
            *[
                (2, 3, 7),
                (5, 2, 64),
                (1, 1, 1),
                (17, 5, 40),
                (900, 8, 128),
                (3, 1, 4096),
            ],
        ]
    )
    for dtype, (tokens, count, size) in itertools.product(DTYPES, outputs):
        case = {"tokens": tokens, "heads": count, "head_dim": size}
        yield check_merge, case | {"dtype": dtype}
    copies = (
        [(3, 7, 5, 1), (9, 64, 6, 0)]
        if quick
        else [
            *[(3, 7, 5, 1), (9, 64, 6, 0), (2, 1, 1, 3), (5, 4096, 40, 8)],
            *[(40, 3000, 12, 2), (600, 32, 300, 0), (50, 48, 800, 16)],
        ]
    )
    for dtype, (blocks, size, pairs, offset) in itertools.product(
        (F32, BF16, np.dtype(np.uint8)), copies
    ):
        case = {"blocks": blocks, "size": size, "pairs": pairs, "offset": offset}
        yield check_copy, case | {"dtype": dtype}
        yield check_swap, case | {"dtype": dtype}

    rows = [(37, 3), (5, 1031)]
    if not quick:
        rows += [(1, 1), (0, 8), (3, 50257), (64, 128256)]
    for dtype, share, (seqs, vocab) in itertools.product(DTYPES, (0.01, 0.7), rows):
        case = {"seqs": seqs, "vocab": vocab, "share": share, "dtype": dtype}
        yield check_penalties, case
    writes = (
        [(21, 2, 64, 8, 16), (5, 3, 7, 3, 7)]
        if quick
        else [
            *[(21, 2, 64, 8, 16), (5, 3, 7, 3, 7), (1, 1, 1, 1, 1), (0, 2, 8, 4, 8)],
            *[(16, 8, 128, 16, 8), (300, 4, 80, 16, 4), (33, 2, 24, 128, 24)],
        ]
    )
    for dtype, fp8, (tokens, heads, head_dim, page, x) in itertools.product(
        DTYPES, (None, E4M3, E5M2), writes
    ):
        case = {"tokens": tokens, "heads": heads, "head_dim": head_dim}
        case |= {"dtype": dtype, "fp8": fp8, "page": page, "x": x}
        yield check_cache_write, case


def main(cases=cases, description=__doc__):
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--lib-dir", required=True)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--only", default="", metavar="CHECK")
    options = parser.parse_args()
    platform = "cpu" if options.cpu else "cuda"
    results = {"archs": kernel_calls.use(options.lib_dir, platform)}
    results |= kernel_calls.describe_device() | {"cases": {}, "failures": []}
    for i, (check, case) in enumerate(cases(options.quick)):
        name = check.__name__
        if options.only not in name:
            continue  # the others draw the same operands as ever
        results["cases"][name] = results["cases"].get(name, 0) + 1
        try:
            check(np.random.default_rng(i), **case)
        except Exception:  # noqa: BLE001 - reported, and the exit status
            text = f"{name} {case}: {traceback.format_exc()}"
            print("FAIL", text[:800], flush=True)
            results["failures"].append(text)
    if options.out:
        with open(options.out, "w") as file:
            json.dump(results, file, indent=1)
    print(results["cases"], f"{len(results['failures'])} failures")
    return 1 if results["failures"] or not results["cases"] else 0


if __name__ == "__main__":
    sys.exit(main())
