"""The attention cases of check_kernels.py, and their reference.

A case draws a batch (query and KV length of each sequence), lays its keys out
in pages or contiguously, fills every row that no query may see with NaN, and
compares out and lse with a float64 reference that runs on the device itself.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

import kernel_calls
from batch import Batch
from kernel_cases import BF16, DTYPES, F16, F32, poison

FP8 = {
    "fp8_e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "fp8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "fp8": np.dtype(ml_dtypes.float8_e4m3fn),  # in a buffer of uint8
}
I32_MAX = np.iinfo(np.int32).max
# Half a rounding of the weights and half of the result, of a row's norm.
ROW_ERROR = {F32: 5e-6, F16: 2e-3, BF16: 2e-2}
# Half the distance of the smallest numbers of fp16: rows that are nearly all their
# sink's are made of those.
F16_STEP = 2.0**-25


def _bucket(x, least):
    """A size of few, so that few programs are compiled: powers of 4, then of 2."""
    size = least
    while size < x:
        size *= 4 if size < 1024 else 2
    return size


@jax.jit
def _reference(q, k, v, lens, seen, options):
    """Padded sequences: q [B, L_q, H_kv, G, D], k and v [B, L_k, H_kv, D].

    lens [B, 2] are the true lengths; seen [B, L_k] says which tokens exist.
    """
    k = k.astype(jnp.float64)
    v = v.astype(jnp.float64)
    logits = jnp.einsum("bqhgd,bkhd->bhgqk", q.astype(jnp.float64), k)
    logits *= options["scale"] * options["k_scale"][:, :, None, None, None]
    cap = options["soft_cap"]
    capped = cap * jnp.tanh(logits / jnp.where(cap > 0, cap, 1))
    logits = jnp.where(cap > 0, capped, logits)
    j = jnp.arange(k.shape[1])[None, None]
    i = jnp.arange(q.shape[1])[None, :, None]
    p = i + (lens[:, 1] - lens[:, 0])[:, None, None]
    distance = jnp.abs(p - j)[:, None, None]
    logits -= options["slopes"][..., None, None] * distance
    visible = (j >= p - options["left"]) & (j <= p + options["right"])
    visible &= seen[:, None] & (j < lens[:, 1][:, None, None])
    visible = visible[:, None, None]
    logits = jnp.where(visible, logits, -jnp.inf)
    sinks = options["sinks"][None, ..., None, None]
    top = jnp.maximum(logits.max(-1, keepdims=True), sinks)
    weights = jnp.exp(logits - jnp.where(jnp.isinf(top), 0, top))
    total = weights.sum(-1, keepdims=True)
    sink = jnp.exp(sinks - jnp.where(jnp.isinf(top), 0, top))
    empty = ~visible.any(-1, keepdims=True)
    lse = jnp.where(empty, jnp.inf, jnp.log(total + sink) + top)
    weights = jnp.where(empty, 0, weights / (total + sink))
    out = jnp.einsum("bhgqk,bkhd->bqhgd", weights, v)
    return out * options["v_scale"][:, None, :, None, None], lse[..., 0]


def reference(query, sequences, options, kv_heads):
    """out and lse of the batch, in float64.

    Args:
        sequences: of each: first query row, rows, keys and values
            [L_k, H_kv, D] and which of their tokens exist, k_scale and v_scale
            [H_kv], ALiBi slopes [H].
    """
    tokens, heads, head_dim = query.shape
    group = heads // kv_heads
    out = np.zeros((tokens, heads, head_dim))
    lse = np.full((heads, tokens), np.inf)
    grouped = {}
    for s in sequences:
        if s["rows"] == 0 or len(s["keys"]) == 0:
            continue
        rows = 1 if s["rows"] == 1 else _bucket(s["rows"], 16)
        shape = rows, _bucket(len(s["keys"]), 64)
        grouped.setdefault(shape, []).append(s)
    for (rows, length), members in grouped.items():
        # As many at once as fit into about 1 GB of logits.
        size = max(1, min(64, (1 << 27) // (rows * length * heads)))
        for at in range(0, len(members), size):
            batch = members[at : at + size]
            count = min(size, _bucket(len(batch), 4))
            q = np.zeros((count, rows, kv_heads, group, head_dim), query.dtype)
            k = np.zeros((count, length, kv_heads, head_dim), batch[0]["keys"].dtype)
            v = np.zeros_like(k)
            seen = np.zeros((count, length), bool)
            lens = np.zeros((count, 2), np.int64)
            per_seq = {
                "k_scale": np.ones((count, kv_heads)),
                "v_scale": np.ones((count, kv_heads)),
                "slopes": np.zeros((count, kv_heads, group)),
            }
            for i, s in enumerate(batch):
                first = s["first"]
                n = len(s["keys"])
                q[i, : s["rows"]] = query[first : first + s["rows"]].reshape(
                    s["rows"], kv_heads, group, head_dim
                )
                k[i, :n], v[i, :n], seen[i, :n] = s["keys"], s["values"], s["seen"]
                lens[i] = s["rows"], n
                for name, values in per_seq.items():
                    values[i] = s[name].reshape(values[i].shape)
            shared = options | {"sinks": options["sinks"].reshape(kv_heads, group)}
            o, e = _reference(q, k, v, lens, seen, shared | per_seq)
            o, e = np.asarray(o), np.asarray(e).reshape(count, heads, rows)
            for i, s in enumerate(batch):
                at_rows = slice(s["first"], s["first"] + s["rows"])
                out[at_rows] = o[i, : s["rows"]].reshape(-1, heads, head_dim)
                lse[:, at_rows] = e[i, :, : s["rows"]]
    return out, lse


def _running(values, limit):
    return np.minimum(np.maximum.accumulate(np.maximum(values, 0)), limit)


def batch_of(case):
    query_lens, kv_lens = zip(*case["seqs"], strict=True) if case["seqs"] else ((), ())
    return Batch(query_lens, kv_lens, *case["heads"])


def batch_inputs(rng, case, batch):
    """The integer operands, padded as a bucketed graph pads them."""
    padding = case.get("pad_seqs", 0)
    max_seqs = batch.num_seqs + padding
    starts = np.array(batch.query_starts) + case.get("lead_tokens", 0)
    ends = [starts[-1]] * padding
    inputs = {"cu_seqlens_q": np.array([*starts, *ends], np.int32)}
    tokens = int(starts[-1]) + case.get("pad_tokens", 0)
    if case.get("num_seqs", True):
        inputs["num_seqs"] = np.array([batch.num_seqs], np.int32)
    lengths = [*batch.kv_lens, *[0] * padding]
    if not case.get("contiguous"):
        page = case.get("page", 16)
        pages = batch.num_pages(page)
        most = max(pages, default=0 if padding else 1)
        max_blocks = most + case.get("pad_blocks", 1)
        num_blocks = sum(pages) + case.get("spare_blocks", 3)
        table = np.full((max_seqs, max_blocks), -1, np.int32)
        order = rng.permutation(num_blocks)[::-1].tolist()
        for row, blocks in zip(table, batch.deal(order, page), strict=False):
            row[: len(blocks)] = blocks
        if case.get("bad_blocks"):
            table[rng.random(table.shape) < 0.2] = num_blocks
            table[rng.random(table.shape) < 0.1] = I32_MAX
        inputs |= {"block_table": table, "seqused_k": np.array(lengths, np.int32)}
        extent = num_blocks, page
    else:
        # Rows that no sequence reads lie before, between and behind.
        gap = case.get("kv_gap", 0)
        pads = [gap] * max_seqs if case.get("leftpad") else [0] * max_seqs
        ends = np.cumsum(np.array(lengths, np.int64) + pads + gap) + gap
        inputs["cu_seqlens_k"] = np.array([gap, *ends], np.int32)
        if case.get("leftpad"):
            inputs["leftpad_k"] = np.array(pads, np.int32)
        if gap:
            inputs["seqused_k"] = np.array(
                [k + p for k, p in zip(lengths, pads, strict=True)], np.int32
            )
        extent = 1, int(ends[-1] if max_seqs else gap) + case.get("spare_rows", 5)
    for name, value in case.get("override", {}).items():
        inputs[name] = np.asarray(value, np.int32).reshape(inputs[name].shape)
    return inputs, tokens, extent


def sequences_of(inputs, tokens, extent, caches, used):
    """Where each sequence's rows and keys are, by the contract's clamps.

    Marks in `used` [num_blocks, page_size] what some sequence may read.
    """
    max_seqs = len(inputs["cu_seqlens_q"]) - 1
    starts = _running(inputs["cu_seqlens_q"], tokens)
    num_seqs = max_seqs
    if "num_seqs" in inputs:
        num_seqs = min(max(int(inputs["num_seqs"][0]), 0), max_seqs)
    num_blocks, page = extent
    for s in range(num_seqs):
        if "block_table" in inputs:
            table = inputs["block_table"][s]
            length = min(max(int(inputs["seqused_k"][s]), 0), len(table) * page)
            blocks = table[np.arange(length) // page]
            offsets = np.arange(length) % page
        else:
            rows = _running(inputs["cu_seqlens_k"], page)
            length = int(rows[s + 1] - rows[s])
            if "seqused_k" in inputs:
                length = min(max(int(inputs["seqused_k"][s]), 0), page - int(rows[s]))
            pad = 0
            if "leftpad_k" in inputs:
                pad = min(max(int(inputs["leftpad_k"][s]), 0), length)
            blocks = np.zeros(length - pad, np.int64)
            offsets = rows[s] + np.arange(pad, length)
        seen = (blocks >= 0) & (blocks < num_blocks)
        blocks = np.where(seen, blocks, 0)
        if len(blocks) and num_blocks:
            used[blocks[seen], offsets[seen]] = True
            keys, values = (cache[blocks, offsets] for cache in caches)
        else:
            seen = np.zeros(len(blocks), bool)
            keys, values = (
                np.zeros((len(blocks), *c.shape[2:]), c.dtype) for c in caches
            )
        yield {
            "index": s,
            "first": int(starts[s]),
            "rows": int(starts[s + 1] - starts[s]),
            "keys": keys,
            "values": values,
            "seen": seen,
        }


def _scales(rng, case, max_seqs, kv_heads):
    """k_scale and v_scale as operands, and as [max_num_seqs, num_kv_heads]."""
    shape = (max_seqs, kv_heads) if case.get("scales") == "heads" else (1,)
    operands, full = {}, {}
    for name in ("k_scale", "v_scale"):
        values = rng.uniform(0.3, 1.7, shape).astype(np.float32)
        if case.get("kv") and case.get("scales"):
            operands[name] = values
            full[name] = np.broadcast_to(values, (max_seqs, kv_heads))
        else:
            full[name] = np.ones((max_seqs, kv_heads))
    return operands, full


def check_attention(rng, **case):
    dtype = case["dtype"]
    batch = batch_of(case)
    heads, kv_heads, head_dim = case["heads"]
    layout = case.get("layout", "NHD")
    inputs, tokens, extent = batch_inputs(rng, case, batch)
    max_seqs = len(inputs["cu_seqlens_q"]) - 1
    logical = (*extent, kv_heads, head_dim)
    shape, geometry = kernel_calls.geometry(layout, *logical)
    count = 2 if layout in ("NHD", "HND") else 1
    kv_cache_dtype = case.get("kv", "auto")
    kv_dtype = FP8.get(kv_cache_dtype, dtype)
    buffers = [rng.standard_normal(shape).astype(kv_dtype) for _ in range(count)]
    query = rng.standard_normal((tokens, heads, head_dim)).astype(dtype)
    query *= np.asarray(case.get("query_size", 1.0), dtype)

    operands, scales = _scales(rng, case, max_seqs, kv_heads)
    slopes = np.zeros((max_seqs, heads))
    if case.get("alibi"):
        rows = (max_seqs, heads) if case["alibi"] == "seqs" else (heads,)
        operands["alibi_slopes"] = rng.uniform(0, 0.3, rows).astype(np.float32)
        slopes[:] = operands["alibi_slopes"]
    sinks = np.full(heads, -np.inf)
    if case.get("sinks"):
        operands["sinks"] = (rng.standard_normal(heads) * 3).astype(np.float32)
        operands["sinks"][:1] = 200.0  # outweighs everything
        sinks = operands["sinks"].astype(np.float64)
    left, right = case.get("window", (-1, 0))
    settings = {
        "scale": case.get("scale", batch.scale),
        "soft_cap": case.get("soft_cap", 0.0),
        "window_left": left,
        "window_right": right,
    }

    caches = kernel_calls.logical_caches(buffers, layout, logical)
    used = np.zeros(extent, bool)
    sequences = list(sequences_of(inputs, tokens, extent, caches, used))
    for s in sequences:
        for name, values in scales.items():
            s[name] = values[s["index"]]
        s["slopes"] = slopes[s["index"]]
    want, want_lse = reference(
        query,
        sequences,
        {
            "scale": np.float64(np.float32(settings["scale"])),
            "soft_cap": np.float64(settings["soft_cap"]),
            "left": np.int64(left if left >= 0 else 1 << 40),
            "right": np.int64(right if right >= 0 else 1 << 40),
            "sinks": sinks,
        },
        kv_heads,
    )
    # What no query may see must not matter: make it NaN.
    for cache in caches:
        cache[~used] = np.nan
    if kv_cache_dtype == "fp8":
        buffers = [b.view(np.uint8) for b in buffers]
    poison(query.shape, dtype)
    run = jax.jit(
        lambda q, c, i: kernel_calls.attention(
            q,
            c[0],
            c[-1],
            **i,
            geometry=geometry,
            kv_cache_dtype=kv_cache_dtype,
            num_splits=case.get("splits", 1),
            **settings,
        )
    )
    got, got_lse = run(query, buffers, inputs | operands)
    return compare(case, np.asarray(got), np.asarray(got_lse), want, want_lse)


def compare(case, got, got_lse, want, want_lse):
    got = got.astype(np.float64)
    empty = np.isposinf(want_lse)
    assert (got[empty.T] == 0).all(), "rows that see nothing must be zero"
    assert np.isposinf(got_lse[empty]).all(), "lse of rows that see nothing"
    size = np.linalg.norm(want, axis=-1)
    error = np.linalg.norm(got - want, axis=-1)
    if case["dtype"] == F16:
        error = np.maximum(error - F16_STEP * want.shape[-1] ** 0.5, 0)
    # A row that its sink leaves nothing of has no relative error.
    error = np.where(size > 1e-30, error / np.maximum(size, 1e-30), error)
    error = np.nan_to_num(error, nan=np.inf)
    worst = float(error.max(initial=0))
    limit = ROW_ERROR[case["dtype"]] * case.get("slack", 1)
    assert worst <= limit, (
        f"a row's relative error is {worst:.2e} > {limit:.2e}; {(error > limit).sum()}"
        f" rows' are, of {error.size}, the first at token and head "
        f"{np.argwhere(error > limit)[0].tolist()}"
    )
    lse_error = np.abs(got_lse[~empty] - want_lse[~empty])
    lse_error /= np.maximum(1, np.abs(want_lse[~empty]))
    worst_lse = float(np.nan_to_num(lse_error, nan=np.inf).max(initial=0))
    assert worst_lse <= 2e-5 * case.get("slack", 1), f"lse is off by {worst_lse:.2e}"
    return {"worst": worst, "worst_lse": worst_lse}


# Query length and KV length of each sequence.
DECODE = [(1, 1), (1, 17), (1, 64), (1, 65), (1, 300), (1, 1023)]
PREFILL = [(5, 5), (64, 64), (1, 40), (130, 130), (33, 97), (200, 517), (3, 1000)]
# Query rows without enough keys, sequences without rows or tokens.
ODD = [(9, 4), (0, 50), (70, 1), (4, 0), (16, 16), (0, 0), (1, 200)]
# For the Hopper kernel: hundreds of rows, ends that are no tile's.
LONG = [(257, 257), (1, 300), (300, 731), (128, 128), (513, 90), (400, 1100)]
MIXED = [(1, 1 + i % 90) for i in range(150)] + [(700, 1333)] + [(1, 7)] * 60
# What two kernels share on Hopper: decodes, prefills, and lengths of neither.
SHUFFLED = [(1, 1 + i * 37 % 900) for i in range(40)] + [(300, 1333), (0, 90), (5, 700)]
SHUFFLED += [(0, 0), (17, 40), (200, 200), (4, 0), (2, 77), (1, 3000), (4, 50)]
SHUFFLED = [SHUFFLED[i * 17 % len(SHUFFLED)] for i in range(len(SHUFFLED))]
WINDOWS = ((-1, -1), (0, 0), (49, 0), (700, 5), (-1, 30), (64, -1), (3, 200))


def _cases(**values):
    return check_attention, values


def basic(quick, dtype):
    for heads in ((4, 2, 40), (3, 3, 64), (8, 1, 128)):
        yield _cases(dtype=dtype, heads=heads, seqs=DECODE[:5], page=5)
        yield _cases(dtype=dtype, heads=heads, seqs=DECODE[2:], layout="odd")
        yield _cases(dtype=dtype, heads=heads, seqs=PREFILL[:5], page=5, splits=3)
    # No sequence, no page in the table, no block in the cache, no token.
    heads = (4, 2, 64)
    yield _cases(dtype=dtype, heads=heads, seqs=[], pad_tokens=5)
    yield _cases(dtype=dtype, heads=heads, seqs=[(2, 0)], pad_blocks=0, splits=2)
    yield _cases(dtype=dtype, heads=heads, seqs=[(9, 0)], spare_blocks=0)
    yield _cases(dtype=dtype, heads=heads, seqs=[(0, 30)])
    yield _cases(
        dtype=dtype,
        heads=heads,
        seqs=[(3, 50), (5, 20), (70, 64), (1, 33)],
        pad_tokens=9,
        lead_tokens=3,
        bad_blocks=True,
        override={"seqused_k": [9999, -5, 64, 33], "num_seqs": 9},
        slack=2,
    )
    if quick:
        return
    for heads in ((4, 2, 8), (6, 2, 72), (8, 8, 96), (5, 1, 112), (32, 4, 128)):
        for page, layout in ((16, "NHD"), (1, "HND"), (128, "stacked")):
            for seqs in (DECODE, PREFILL, DECODE + PREFILL):
                yield _cases(
                    dtype=dtype, heads=heads, seqs=seqs, page=page, layout=layout
                )
    for heads in ((5, 1, 256), (7, 1, 192), (8, 2, 80)):
        yield _cases(dtype=dtype, heads=heads, seqs=DECODE + PREFILL)
        yield _cases(dtype=dtype, heads=heads, seqs=DECODE, splits=2)
    heads = (8, 2, 128)
    both = PREFILL[:4] + DECODE
    for seqs in (DECODE, both):
        values = {"dtype": dtype, "heads": heads, "seqs": seqs}
        yield _cases(**values, layout="interleaved", pad_seqs=200, pad_tokens=77)
        yield _cases(**values, splits=64, pad_blocks=500)
        yield _cases(**values, splits=7, num_seqs=False)
        yield _cases(**values, scale=-0.3, slack=3)
        yield _cases(**values, scale=3.0, slack=3)
        yield _cases(**values, bad_blocks=True, splits=3, slack=2)
    yield _cases(dtype=dtype, heads=heads, seqs=ODD, pad_tokens=40, lead_tokens=70)
    yield _cases(dtype=dtype, heads=heads, seqs=ODD, pad_tokens=300, splits=5)
    # Prefix sums in disorder.
    for starts in ([-7, 5, 3, 40, 9999], [30, 20, 60, 60, 61], [0, 0, 0, 0, 0]):
        yield _cases(
            dtype=dtype,
            heads=heads,
            seqs=[(10, 90), (20, 64), (30, 31), (1, 128)],
            override={"cu_seqlens_q": starts},
            pad_tokens=5,
        )
    for count in (0, -3, 2, 77):
        yield _cases(
            dtype=dtype,
            heads=heads,
            seqs=[(10, 90), (20, 64), (30, 31)],
            override={"num_seqs": count},
        )
    yield _cases(dtype=dtype, heads=(2, 1, 64), seqs=[(1, 40)] * 700, pad_seqs=99)
    yield _cases(dtype=dtype, heads=(2, 1, 128), seqs=[(2, 9000), (300, 3000)])


def features(quick, dtype):
    heads = (8, 2, 128)
    both = PREFILL[:4] + DECODE
    for seqs in (DECODE,) if quick else (DECODE, both, ODD):
        values = {"dtype": dtype, "heads": heads, "seqs": seqs}
        for i, window in enumerate(WINDOWS):
            yield _cases(**values, window=window, splits=1 + i % 3)
        yield _cases(**values, window=(50, 0), soft_cap=2.0)
        yield _cases(**values, soft_cap=30.0, splits=2, page=33)
        for splits in (1, 3):
            yield _cases(**values, sinks=True, splits=splits)
            yield _cases(**values, alibi="heads", splits=splits)
            yield _cases(**values, alibi="seqs", window=(-1, -1), splits=splits)
        yield _cases(**values, sinks=True, alibi="seqs", soft_cap=20.0, window=(99, 3))
        yield _cases(**values, sinks=True, pad_tokens=9, lead_tokens=5, pad_seqs=3)


def contiguous(quick, dtype):
    heads = (8, 2, 64)
    for seqs in (DECODE,) if quick else (DECODE, PREFILL, ODD, PREFILL[:4] + DECODE):
        values = {"dtype": dtype, "heads": heads, "seqs": seqs, "contiguous": True}
        yield _cases(**values)
        yield _cases(**values, num_seqs=False, splits=3)
        yield _cases(**values, kv_gap=7)
        yield _cases(**values, kv_gap=3, leftpad=True, pad_seqs=2, layout="odd")
        yield _cases(**values, kv_gap=2, leftpad=True, window=(-1, -1), splits=2)
        yield _cases(**values, alibi="heads", sinks=True, window=(40, 9), soft_cap=9.0)
    if quick:
        return
    values = {"dtype": dtype, "seqs": [(10, 90), (20, 64), (30, 31)]}
    values |= {"contiguous": True, "heads": (4, 4, 128)}
    for rows in ([-7, 95, 60, 9999], [50, 20, 60, 61], [0, 0, 0, 0]):
        yield _cases(**values, override={"cu_seqlens_k": rows})
        yield _cases(**values, kv_gap=4, override={"cu_seqlens_k": rows})
    used = {"seqused_k": [500, -4, 20], "leftpad_k": [3, 9, 25]}
    yield _cases(**values, kv_gap=4, leftpad=True, override=used)
    yield _cases(dtype=dtype, contiguous=True, heads=(32, 8, 128), seqs=PREFILL)
    yield _cases(dtype=dtype, contiguous=True, heads=(4, 1, 256), seqs=PREFILL)


def fp8(quick, dtype):
    for kv in FP8:
        values = {"dtype": dtype, "kv": kv}
        for heads in ((8, 2, 128), (4, 4, 64)):
            yield _cases(**values, heads=heads, seqs=DECODE, scales="one")
            yield _cases(**values, heads=heads, seqs=PREFILL[:5], scales="heads")
        if quick:
            continue
        heads = (8, 2, 128)
        both = PREFILL[:4] + DECODE
        for seqs in (DECODE, both):
            some = values | {"heads": heads, "seqs": seqs, "scales": "heads"}
            yield _cases(**some, splits=3, pad_seqs=2)
            yield _cases(**some, layout="HND", page=128)
            yield _cases(**some, layout="odd")
            yield _cases(**some, contiguous=True, kv_gap=3, leftpad=True)
            yield _cases(**some, window=(99, 2), soft_cap=8.0, alibi="seqs", sinks=True)
            yield _cases(**some, bad_blocks=True, page=5, slack=2)
        for heads in ((4, 1, 256), (8, 1, 96), (6, 2, 72), (4, 2, 40), (7, 1, 192)):
            yield _cases(**values, heads=heads, seqs=both, scales="one")
            yield _cases(**values, heads=heads, seqs=DECODE, splits=2)
        # Enough tiles for the larger ones.
        for heads in ((64, 32, 128), (32, 32, 64)):
            yield _cases(**values, heads=heads, seqs=LONG, scales="heads")
        # Queries beyond fp16's range, and below it.
        if dtype != F16:
            for size in (1e6, 1e-9):
                some = {"query_size": size, "scale": 0.09 / size, "seqs": both}
                yield _cases(**values, heads=(8, 2, 128), slack=2, **some)


def prefill(quick, dtype, contiguous, page=16):
    """Calls that the Hopper kernel takes where the page allows it."""
    keys = {"contiguous": True} if contiguous else {"page": page}
    shapes = [(8, 2, 128), (4, 4, 64)]
    if not quick:
        shapes += [(5, 1, 96), (7, 1, 112), (8, 1, 192), (4, 1, 256), (8, 8, 128)]
        shapes += [(2, 2, 80), (14, 2, 40)]
    for heads in shapes:
        values = {"dtype": dtype, "heads": heads} | keys
        yield _cases(**values, seqs=LONG)
        yield _cases(**values, seqs=LONG, splits=3, lead_tokens=131)
        yield _cases(**values, seqs=MIXED, pad_tokens=5)
        yield _cases(**values, seqs=MIXED, pad_tokens=5, splits=4, lead_tokens=3)
    # Enough tiles for the larger ones of mma.sync.
    for heads in ((32, 32, 128), (64, 32, 64)):
        values = {"dtype": dtype, "heads": heads, "seqs": LONG} | keys
        for window in ((-1, 0),) if quick else WINDOWS:
            yield _cases(**values, window=window)
        if not quick:
            yield _cases(**values, sinks=True, alibi="seqs", soft_cap=9.0, splits=2)
            yield _cases(**values, pad_tokens=300, lead_tokens=129, pad_seqs=3)
            if not contiguous:
                yield _cases(**values, bad_blocks=True, slack=2)
    heads = (8, 2, 128)
    for seqs in (LONG[:1],) if quick else (LONG, MIXED, SHUFFLED):
        values = {"dtype": dtype, "heads": heads, "seqs": seqs} | keys
        for window in WINDOWS:
            yield _cases(**values, window=window)
        yield _cases(**values, sinks=True, splits=2)
        yield _cases(**values, soft_cap=20.0)
        yield _cases(**values, alibi="seqs", window=(-1, -1))
        yield _cases(
            **values, sinks=True, alibi="heads", soft_cap=9.0, window=(200, 40)
        )
        yield _cases(**values, pad_tokens=300, lead_tokens=129, pad_seqs=70)
        if contiguous:
            yield _cases(**values, kv_gap=5)
            yield _cases(**values, kv_gap=9, leftpad=True, num_seqs=False)
        else:
            yield _cases(**values, bad_blocks=True, slack=2)
            yield _cases(**values, layout="HND")
            yield _cases(**values, layout="stacked")
            yield _cases(**values, layout="interleaved", num_seqs=False)
            yield _cases(**values, override={"num_seqs": 3})
    if not quick:
        for heads in ((32, 8, 128), (16, 4, 64)):
            yield _cases(dtype=dtype, heads=heads, seqs=[(2048, 2048)], **keys)
        chunk = {"heads": (8, 1, 128), "seqs": [(512, 20000)], "dtype": dtype}
        for splits in (1, 7, 64):
            yield _cases(**chunk, **keys, splits=splits)
        yield _cases(dtype=dtype, heads=(4, 1, 128), seqs=[(300, 9000)], **keys)


def groups():
    """Name: generator of (check, case), given `quick`."""
    named = {}
    for dtype in DTYPES:
        for function in (basic, features, contiguous, fp8):
            name = f"attention_{function.__name__}_{dtype.name}"
            named[name] = functools.partial(function, dtype=dtype)
    for dtype in (F16, BF16):
        options = {"dtype": dtype, "contiguous": True}
        named[f"attention_prefill_contiguous_{dtype.name}"] = functools.partial(
            prefill, **options
        )
        # A page of 8 tokens is too short for the Hopper kernel.
        for page in (8, 16, 32, 128):
            named[f"attention_prefill_page{page}_{dtype.name}"] = functools.partial(
                prefill, dtype=dtype, contiguous=False, page=page
            )
    return named
