#!/usr/bin/env python3
"""Checks every op on arrays of more than 2^31 elements: no index wraps around.

    check_large.py --lib-dir DIR [--out results.json] [--tokens 143360] [--cpu]

Needs a GPU with 64 GiB of memory, JAX and numpy, and the libraries
libxla_ops_*_cuda.so in DIR, and the wheel, or its content on PYTHONPATH, without torch.
What an op makes of the
whole array must be, to the bit, what it makes of each eighth alone, whose elements can
be counted in 31 bits; that those are right is for the other tests. --cpu checks
libxla_ops_*_cpu.so by the same cases; give it less --tokens, a multiple of 4096. Exit
status 1 if a case fails.
"""

import argparse
import functools
import itertools
import json
import sys
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np

import kernel_calls

jax.config.update("jax_enable_x64", True)

BF16, F32, E4M3 = jnp.bfloat16, jnp.float32, jnp.float8_e4m3fn
CHUNKS = 8
HEADS, HEAD_DIM = 128, 128
HIDDEN = HEADS * HEAD_DIM
EPS = {"eps": np.float32(1e-5)}
ABSENT = np.zeros(0, np.int32)


def call(target, results, *args, aliases=None, **attributes):
    """Calls a target; `results` are (shape, dtype) pairs."""
    f = jax.ffi.ffi_call(
        f"xla_ops.{target}",
        tuple(jax.ShapeDtypeStruct(*r) for r in results),
        input_output_aliases=aliases or {},
    )
    return f(*args, **attributes)


def numbers(shape, seed):
    """bfloat16 that differ from row to row, made where they are needed."""

    def make():
        index = sum(
            jax.lax.broadcasted_iota(jnp.int64, shape, axis) * factor
            for axis, factor in enumerate((7919, 131, 17)[: len(shape)])
        )
        return (((index * seed) % 1021 - 510) / 128).astype(BF16)

    return jax.jit(make)()


def bits(x):
    return jax.lax.bitcast_convert_type(
        x, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
    )


def check_chunks(f, rows, shared=(), axes=None, result_axes=None, tolerance=None):
    """f(*rows, *shared) on all rows against f on each chunk of them.

    Args:
        rows: arrays that have a part for each token, along `axes` (0).
        shared: what every call gets whole.
        result_axes: the axis of each result that runs over tokens (0).
        tolerance: None where results must agree to the bit.
    """
    axes = axes or (0,) * len(rows)
    whole = jax.jit(f)(*rows, *shared)
    result_axes = result_axes or (0,) * len(whole)

    def part(x, axis, i):
        size = x.shape[axis] // CHUNKS
        return jax.lax.dynamic_slice_in_dim(x, i * size, size, axis)

    @jax.jit
    def differ(i, whole, rows):
        own = f(*(part(x, a, i) for x, a in zip(rows, axes, strict=True)), *shared)
        counts = []
        for mine, all_of_it, axis in zip(own, whole, result_axes, strict=True):
            theirs = part(all_of_it, axis, i)
            if tolerance is None:
                different = bits(mine) != bits(theirs)
            else:
                distance = jnp.abs(mine.astype(F32) - theirs.astype(F32))
                different = ~((distance <= tolerance) | (mine == theirs))
            counts.append(jnp.count_nonzero(different))
        return jnp.stack(counts)

    for i in range(CHUNKS):
        counts = np.asarray(differ(np.int64(i), whole, rows))
        assert not counts.any(), f"chunk {i}: elements that differ: {counts.tolist()}"


def check_rows(shape):
    """The ops on rows: (name, check) pairs."""
    x, r = numbers(shape, 3), numbers(shape, 5)
    w = 1 + numbers(shape[1:], 11) / 16
    scale, azp = np.float32([0.02]), np.int32([-3])
    hidden, int8 = shape[1], jnp.int8
    scales, azps = (F32, 1), (jnp.int32, 1)
    gated, gated_fp8 = (BF16, hidden // 2), (E4M3, hidden // 2)
    convert = {"kv_cache_dtype": "fp8", "scale": np.float32(0.37)}
    codes = jax.jit(lambda x: x.astype(E4M3))(x)
    swigluoai = {"alpha": np.float32(1.702), "limit": np.float32(7)}
    # Of each: its target, operands and results (the dtype, and the columns where they
    # are not the input's).
    table = [
        ("rms_norm", (x,), (w,), (BF16,), EPS),
        ("fused_add_rms_norm", (x, r), (w,), (BF16, BF16), EPS),
        ("rms_norm_static_fp8_quant", (x,), (w, scale), (E4M3,), EPS),
        (
            "fused_add_rms_norm_static_fp8_quant",
            *((x, r), (w, scale), (E4M3, BF16), EPS),
        ),
        ("static_scaled_fp8_quant", (x,), (scale,), (E4M3,), {}),
        ("dynamic_per_token_scaled_fp8_quant", (x,), (), (E4M3, scales), {}),
        ("convert_fp8", (x,), (), (E4M3,), convert),
        ("convert_fp8", (codes,), (), (BF16,), convert),
        ("static_scaled_int8_quant", (x,), (scale,), (int8,), {}),
        ("static_scaled_int8_quant", (x,), (scale, azp), (int8,), {}),
        ("dynamic_scaled_int8_quant", (x,), (), (int8, scales), {}),
        ("dynamic_scaled_int8_azp_quant", (x,), (), (int8, scales, azps), {}),
        ("silu_and_mul", (x,), (), (gated,), {}),
        ("mul_and_silu", (x,), (), (gated,), {}),
        ("gelu_and_mul", (x,), (), (gated,), {}),
        ("gelu_tanh_and_mul", (x,), (), (gated,), {}),
        ("silu_and_mul_quant", (x,), (scale,), (gated_fp8,), {}),
        ("fatrelu_and_mul", (x,), (), (gated,), {"threshold": np.float32(0.5)}),
        ("swigluoai_and_mul", (x,), (), (gated,), swigluoai),
        ("gelu_new", (x,), (), (BF16,), {}),
        ("gelu_fast", (x,), (), (BF16,), {}),
        ("gelu_quick", (x,), (), (BF16,), {}),
    ]
    for codes in (E4M3, int8):
        dynamic = "rms_norm_dynamic_per_token_quant"
        table.append((dynamic, (x,), (w,), (codes, scales), EPS))
        dynamic = "fused_add_rms_norm_dynamic_per_token_quant"
        table.append((dynamic, (x, r), (w,), (codes, scales, BF16), EPS))
    for target, rows, shared, results, attributes in table:

        def f(x, *rest, target=target, results=results, attributes=attributes):
            pairs = [r if isinstance(r, tuple) else (r, hidden) for r in results]
            shapes = [((x.shape[0], columns), dtype) for dtype, columns in pairs]
            return call(target, shapes, x, *rest, **attributes)

        yield target, functools.partial(check_chunks, f, rows, shared)
    yield "dynamic_scaled_fp8_quant", functools.partial(check_per_tensor, x)


def check_per_tensor(x):
    """The largest element is the last one; its scale is that of all elements."""
    x = x.at[-1, -1].set(100.0)
    codes, scale = jax.jit(
        lambda x: call("dynamic_scaled_fp8_quant", [(x.shape, E4M3), ((1,), F32)], x)
    )(x)
    assert scale[0] == np.float32(100) / np.float32(448), scale
    (wanted,) = jax.jit(
        lambda x: call("static_scaled_fp8_quant", [(x.shape, E4M3)], x, scale)
    )(x)
    assert bool((bits(codes) == bits(wanted)).all())


def check_rotary(tokens):
    query, key = numbers((tokens, HIDDEN), 3), numbers((tokens, HIDDEN // 2), 5)
    positions = jnp.arange(tokens) % 100
    cache = numbers((100, HEAD_DIM), 7)
    for is_neox in (True, False):
        rest = {"head_size": np.int64(HEAD_DIM), "is_neox": is_neox}

        def both(positions, query, key, cache, rest=rest):
            results = [(query.shape, BF16), (key.shape, BF16)]
            return call(
                "rotary_embedding", results, positions, query, key, cache, **rest
            )

        def one(positions, query, cache, rest=rest):
            results = [(query.shape, BF16)]
            return call(
                "rotary_embedding_one", results, positions, query, cache, **rest
            )

        check_chunks(both, (positions, query, key), (cache,))
        check_chunks(one, (positions, query), (cache,))


def check_qk_norm_rope(tokens):
    """HEADS heads in all, an eighth of them values."""
    qkv, cache = numbers((tokens, HIDDEN), 3), numbers((100, HEAD_DIM), 7)
    weights = [1 + numbers((HEAD_DIM,), seed) / 16 for seed in (11, 13)]
    positions = jnp.arange(tokens) % 100
    sizes = {"num_heads_q": HEADS * 3 // 4, "num_heads_k": HEADS // 8}
    sizes |= {"num_heads_v": HEADS // 8, "head_dim": HEAD_DIM}
    sizes = {name: np.int64(size) for name, size in sizes.items()}
    for is_neox in (True, False):

        def f(qkv, positions, *shared, is_neox=is_neox):
            results = [(qkv.shape, BF16)]
            args = (qkv, *shared, positions)
            rest = {**EPS, **sizes, "is_neox": is_neox}
            return call("fused_qk_norm_rope", results, *args, **rest)

        check_chunks(f, (qkv, positions), (*weights, cache))


def check_penalties(tokens):
    logits = numbers((tokens, HIDDEN), 3)
    prompt, output = (
        jax.jit(lambda x, k=k: x.astype(F32) > k)(logits) for k in (3, 3.5)
    )
    penalties = 1 + numbers((tokens,), 7) ** 2

    def f(*rows):
        return call("apply_repetition_penalties", [(rows[0].shape, BF16)], *rows)

    check_chunks(f, (logits, prompt, output, penalties))


def check_merge(tokens):
    shape = tokens, HEADS, HEAD_DIM
    prefix, suffix = numbers(shape, 3), numbers(shape, 5)
    prefix_lse, suffix_lse = (
        numbers((HEADS, tokens), seed).astype(F32) for seed in (7, 11)
    )

    def f(prefix, prefix_lse, suffix, suffix_lse):
        results = [(prefix.shape, BF16), (prefix_lse.shape, F32)]
        return call(
            "merge_attn_states", results, prefix, prefix_lse, suffix, suffix_lse
        )

    check_chunks(
        f,
        (prefix, prefix_lse, suffix, suffix_lse),
        axes=(0, 1, 0, 1),
        result_axes=(0, 1),
    )


def check_copy(tokens):
    """Of many blocks: the first to the last, and the last but one to the second."""
    cache = numbers((tokens, HIDDEN), 3)
    sizes = {"num_blocks": tokens, "page_size": 1, "num_kv_heads": 1}
    sizes |= {"head_dim": HIDDEN, "block_stride": HIDDEN}
    sizes |= {"page_stride": 0, "head_stride": 0, "offset": 0}
    pairs = np.array([[0, tokens - 1], [tokens - 2, 1]])
    sizes = {name: np.int64(size) for name, size in sizes.items()}
    results = [(cache.shape, BF16)]
    (got,) = jax.jit(
        lambda cache: call("copy_blocks", results, cache, pairs, debug=False, **sizes)
    )(cache)
    wanted = cache.at[tokens - 1].set(cache[0]).at[1].set(cache[tokens - 2])
    assert bool((bits(got) == bits(wanted)).all())


def check_swap(tokens):
    """From the last blocks to the first ones of another cache, and back to its end."""
    src, dst = numbers((tokens, HIDDEN), 3), numbers((tokens, HIDDEN), 5)
    values = {"num_src_blocks": tokens, "num_dst_blocks": tokens}
    values |= {"page_size": 1, "num_kv_heads": 1, "head_dim": HIDDEN}
    for cache in ("src", "dst"):
        values |= {f"{cache}_block_stride": HIDDEN, f"{cache}_offset": 0}
        values |= {f"{cache}_page_stride": 0, f"{cache}_head_stride": 0}
    values = {name: np.int64(value) for name, value in values.items()}
    pairs = np.array([[tokens - 1, 0], [tokens - 2, tokens - 1], [0, tokens - 2]])
    (got,) = jax.jit(
        lambda src, dst: call(
            "swap_blocks", [(dst.shape, BF16)], dst, src, pairs, debug=False, **values
        )
    )(src, dst)
    wanted = dst.at[pairs[:, 1]].set(src[pairs[:, 0]])
    assert bool((bits(got) == bits(wanted)).all())


def check_write(tokens):
    """Rows go to slots all over the caches, each to its own."""
    page = 16
    key, value = (numbers((tokens, HEADS, HEAD_DIM), seed) for seed in (3, 5))
    slots = jnp.arange(tokens, dtype=jnp.int64) * 4099 % tokens
    shape, geometry = kernel_calls.geometry(
        "NHD", tokens // page, page, HEADS, HEAD_DIM
    )
    one = np.ones(1, np.float32)
    size = tokens // CHUNKS

    @jax.jit
    def equal(i, rows, cache):
        part = jax.lax.dynamic_slice_in_dim
        slot = part(slots, i * size, size)
        found = cache.reshape(-1, HEADS, HEAD_DIM)[slot]
        wanted = part(rows, i * size, size).astype(found.dtype)
        return (bits(found) == bits(wanted)).all()

    for kind in ("auto", "fp8"):
        dtype = BF16 if kind == "auto" else E4M3
        caches = jax.jit(
            lambda key, value, caches, kind=kind: kernel_calls.reshape_and_cache_flash(
                key, value, caches, slots, (one, one), geometry, kind
            ),
            donate_argnums=2,
        )(key, value, [jnp.zeros(shape, dtype) for _ in "kv"])
        for i, (rows, cache) in itertools.product(
            range(CHUNKS), zip((key, value), caches, strict=True)
        ):
            assert bool(equal(np.int64(i), rows, cache)), f"{kind}, chunk {i}"
        del caches


def check_first_layout_write(tokens):
    """The same by reshape_and_cache, whose pages hold tokens side by side."""
    page, x = 16, 8
    key, value = (numbers((tokens, HEADS, HEAD_DIM), seed) for seed in (3, 5))
    slots = jnp.arange(tokens, dtype=jnp.int64) * 4099 % tokens
    shapes = (
        (tokens // page, HEADS, HEAD_DIM // x, page, x),
        (tokens // page, HEADS, HEAD_DIM, page),
    )
    sizes = {"num_blocks": tokens // page, "page_size": page, "key_x": x}
    sizes |= {"key_block_stride": page * HIDDEN, "key_offset": 0}
    sizes |= {"value_block_stride": page * HIDDEN, "value_offset": 0}
    sizes = {name: np.int64(size) for name, size in sizes.items()}
    one = np.ones(1, np.float32)
    size = tokens // CHUNKS

    @jax.jit
    def equal(i, rows, cache):
        part = jax.lax.dynamic_slice_in_dim
        slot = part(slots, i * size, size)
        found = jnp.moveaxis(cache, 3, 1)[slot // page, slot % page]
        wanted = part(rows, i * size, size).reshape(found.shape)
        return (bits(found) == bits(wanted)).all()

    caches = jax.jit(
        lambda *caches: call(
            "reshape_and_cache",
            [(shape, BF16) for shape in shapes],
            *(key, value, *caches, slots, one, one),
            aliases={2: 0, 3: 1},
            kv_cache_dtype="auto",
            debug=False,
            **sizes,
        ),
        donate_argnums=(0, 1),
    )(*(jnp.zeros(shape, BF16) for shape in shapes))
    for i, (rows, cache) in itertools.product(
        range(CHUNKS), zip((key, value), caches, strict=True)
    ):
        assert bool(equal(np.int64(i), rows, cache)), f"chunk {i}"


def attention(target, query, key, value, tables, sizes, num_splits=1):
    """One call; `tables` are cu_seqlens_q, cu_seqlens_k, seqused_k, block_table."""
    num_tokens, heads, head_dim = query.shape
    workspace = 128  # AttentionWorkspaceBytes of attention.h
    if num_splits > 1:
        workspace += 4 * num_splits * num_tokens * heads * (head_dim + 2)
    results = [
        (query.shape, query.dtype),
        ((heads, num_tokens), F32),
        ((workspace,), jnp.uint8),
    ]
    sizes = {
        "window_left": -1,
        "window_right": 0,
        "num_splits": num_splits,
        "num_kv_heads": heads,
        "page_stride": heads * head_dim,
        "head_stride": head_dim,
        "key_offset": 0,
        "value_offset": 0,
        **sizes,
    }
    out, lse, _ = call(
        target,
        results,
        query,
        key,
        value,
        *tables,
        *[ABSENT] * 6,
        scale=np.float32(head_dim**-0.5),
        soft_cap=np.float32(0),
        kv_cache_dtype="auto",
        paged=target == "paged_attention",
        debug=False,
        **{name: np.int64(size) for name, size in sizes.items()},
    )
    return out, lse


def check_attention(tokens):
    """Sequences of 512 tokens, all of them prefilled."""
    length = 512
    shape = tokens, HEADS, HEAD_DIM
    operands = tuple(numbers(shape, seed) for seed in (3, 5, 7))

    def f(query, key, value):
        starts = np.arange(0, query.shape[0] + 1, length, dtype=np.int32)
        rows = key.shape[0]
        sizes = {"num_blocks": 1, "page_size": rows, "block_stride": rows * HIDDEN}
        tables = starts, starts, ABSENT, ABSENT
        return attention("flash_attn_varlen", query, key, value, tables, sizes)

    check_chunks(f, operands, result_axes=(0, 1), tolerance=2**-6)


def check_paged(tokens):
    """The same sequences, decoded from pages of 16 tokens."""
    length, page = 512, 16
    query = numbers((tokens // length, HEADS, HEAD_DIM), 3)
    caches = tuple(
        numbers((tokens, HEADS, HEAD_DIM), seed).reshape(-1, page, HEADS, HEAD_DIM)
        for seed in (5, 7)
    )
    for num_splits in (1, 4):

        def f(query, key, value, num_splits=num_splits):
            blocks, seqs = key.shape[0], query.shape[0]
            sizes = {"num_blocks": blocks, "page_size": page}
            sizes["block_stride"] = page * HIDDEN
            tables = (
                np.arange(seqs + 1, dtype=np.int32),
                ABSENT,
                np.full(seqs, length, np.int32),
                np.arange(blocks, dtype=np.int32).reshape(seqs, -1),
            )
            return attention(
                "paged_attention", query, key, value, tables, sizes, num_splits
            )

        check_chunks(f, (query, *caches), result_axes=(0, 1), tolerance=2**-6)


def cases(tokens):
    """(name, check) pairs. Arrays of one case are freed before the next."""
    elements = tokens * HIDDEN
    for shape in ((tokens, HIDDEN), (elements // 8, 8)):
        for name, check in check_rows(shape):
            yield f"{name} {list(shape)}", check
    for check in (
        check_rotary,
        check_qk_norm_rope,
        check_penalties,
        check_merge,
        check_copy,
        check_swap,
        check_write,
        check_first_layout_write,
        check_attention,
        check_paged,
    ):
        yield check.__name__, functools.partial(check, tokens)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lib-dir", required=True)
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--tokens", type=int, default=143_360)
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    platform = "cpu" if options.cpu else "cuda"
    results = {"archs": kernel_calls.use(options.lib_dir, platform)}
    results |= kernel_calls.describe_device()
    results |= {"elements": options.tokens * HIDDEN, "seconds": {}, "failures": []}
    for name, check in cases(options.tokens):
        start = time.monotonic()
        try:
            check()
        except Exception:  # noqa: BLE001 - reported, and the exit status
            text = f"{name}: {traceback.format_exc()}"
            print("FAIL", text[-800:], flush=True)
            results["failures"].append(text)
        results["seconds"][name] = round(time.monotonic() - start, 2)
    if options.out:
        with open(options.out, "w") as file:
            json.dump(results, file, indent=1)
    seconds = sum(results["seconds"].values())
    count, failed = len(results["seconds"]), len(results["failures"])
    print(f"{count} cases, {failed} failures, {seconds:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
