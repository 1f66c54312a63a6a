"""Calls the op libraries from JAX, without torch_xla or the wheel.

Kernels can so be checked and timed on any machine with JAX: the libraries are
plain XLA custom calls. Registration reads each library's own handler table, as
the runtime of this project does.
"""

import ctypes
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np


class _Handler(ctypes.Structure):
    """`XlaOpsHandler` of xla_ops/cc/core/registry.h."""

    _fields_ = [
        ("target", ctypes.c_char_p),
        ("platform", ctypes.c_char_p),
        ("instantiate", ctypes.c_void_p),
        ("prepare", ctypes.c_void_p),
        ("initialize", ctypes.c_void_p),
        ("execute", ctypes.c_void_p),
    ]


def register(lib_dir, platform="cuda"):
    """Registers every handler of the op libraries in `lib_dir`.

    Args:
        platform: `cuda` or `cpu`.

    Returns:
        The architectures that each CUDA library was built for, by op.
    """
    names = {"cuda": "CUDA", "cpu": "cpu"}  # as JAX spells them
    archs = {}
    found = sorted(pathlib.Path(lib_dir).glob(f"libxla_ops_*_{platform}.so"))
    if not found:
        raise FileNotFoundError(f"{lib_dir} must hold libxla_ops_*_{platform}.so")
    for path in found:
        op = path.stem.removeprefix("libxla_ops_").removesuffix(f"_{platform}")
        library = ctypes.CDLL(str(path))
        library.xla_ops_handlers.restype = ctypes.POINTER(_Handler)
        count = ctypes.c_size_t()
        handlers = library.xla_ops_handlers(ctypes.byref(count))
        for handler in handlers[: count.value]:
            stages = ("instantiate", "prepare", "initialize", "execute")
            bundle = {
                stage: jax.ffi.pycapsule(ctypes.c_void_p(getattr(handler, stage)))
                for stage in stages
                if getattr(handler, stage)
            }
            jax.ffi.register_ffi_target(
                handler.target.decode(), bundle, platform=names[platform]
            )
        if platform == "cuda":
            library.xla_ops_cuda_archs.restype = ctypes.c_char_p
            archs[op] = library.xla_ops_cuda_archs().decode()
    return archs


def describe_device():
    """What a results file has to say of where it came from."""
    device = jax.devices()[0]
    facts = {"device": device.device_kind, "jax": jax.__version__}
    if device.platform == "gpu":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        drivers = subprocess.run(query, capture_output=True, text=True, check=True)
        facts["driver"] = drivers.stdout.split("\n")[0].strip()
    return facts


def _integers(**values):
    return {name: np.int64(value) for name, value in values.items()}


def rms_norm(x, weight, eps=1e-6):
    call = jax.ffi.ffi_call("xla_ops.rms_norm", jax.ShapeDtypeStruct(x.shape, x.dtype))
    return call(x, weight, eps=np.float32(eps))


def geometry(layout, num_blocks, page_size, num_heads, head_dim):
    """Shape of the buffer and the attributes that find the two caches in it.

    Args:
        layout: `NHD`, `HND`, `stacked` ([2, ...], NHD), `interleaved`
            ([num_blocks, 2, ...], NHD) or `odd` (NHD caches inside one flat
            buffer, at offsets that are not aligned).
    """
    page = page_size * num_heads * head_dim
    shape = (num_blocks, page_size, num_heads, head_dim)
    strides = (page, num_heads * head_dim, head_dim)
    key_offset, value_offset = 0, 0
    if layout == "HND":
        shape = (num_blocks, num_heads, page_size, head_dim)
        strides = (page, head_dim, page_size * head_dim)
    elif layout == "stacked":
        shape = (2, *shape)
        value_offset = num_blocks * page
    elif layout == "interleaved":
        shape = (num_blocks, 2, page_size, num_heads, head_dim)
        strides = (2 * page, *strides[1:])
        value_offset = page
    elif layout == "odd":
        shape = (2 * num_blocks * page + 8,)
        key_offset, value_offset = 3, num_blocks * page + 8
    elif layout != "NHD":
        raise ValueError(f"layout must be a known one, got {layout}")
    attributes = _integers(
        num_blocks=num_blocks,
        page_size=page_size,
        block_stride=strides[0],
        page_stride=strides[1],
        head_stride=strides[2],
        key_offset=key_offset,
        value_offset=value_offset,
    )
    return shape, attributes


def logical_caches(buffers, layout, shape):
    """numpy views of K and V of shape [num_blocks, page_size, num_heads, head_dim]."""
    if layout == "stacked":
        return buffers[0][0], buffers[0][1]
    if layout == "interleaved":
        return buffers[0][:, 0], buffers[0][:, 1]
    if layout == "odd":
        size = int(np.prod(shape))
        starts = 3, size + 8
        return tuple(buffers[0][i : i + size].reshape(shape) for i in starts)
    if layout == "HND":
        return tuple(np.swapaxes(b, 1, 2) for b in buffers)
    return tuple(buffers)


def reshape_and_cache_flash(
    key,
    value,
    caches,
    slot_mapping,
    scales,
    attributes,
    kv_cache_dtype="auto",
    debug=False,
):
    """Writes both caches in place; returns the list of cache buffers.

    Args:
        caches: [key_cache, value_cache], or [kv_cache] that holds both.
    """
    target = "xla_ops.reshape_and_cache_flash"
    if len(caches) == 1:
        target += "_stacked"
    call = jax.ffi.ffi_call(
        target,
        tuple(jax.ShapeDtypeStruct(c.shape, c.dtype) for c in caches),
        input_output_aliases={2 + i: i for i in range(len(caches))},
    )
    return call(
        key,
        value,
        *caches,
        slot_mapping,
        *scales,
        kv_cache_dtype=kv_cache_dtype,
        debug=debug,
        **attributes,
    )


def reshape_and_cache_flash_one(
    key, cache, slot_mapping, scale, attributes, kv_cache_dtype="auto"
):
    """Writes one cache; the caller chose not to alias it, so it is copied."""
    call = jax.ffi.ffi_call(
        "xla_ops.reshape_and_cache_flash_one",
        jax.ShapeDtypeStruct(cache.shape, cache.dtype),
    )
    attributes = {k: v for k, v in attributes.items() if k != "value_offset"}
    return call(
        key,
        cache,
        slot_mapping,
        scale,
        kv_cache_dtype=kv_cache_dtype,
        debug=False,
        **attributes,
    )


ABSENT_TABLE = np.zeros(0, np.int32)
ABSENT_FLOATS = np.zeros(0, np.float32)


def attention(
    query,
    key,
    value,
    cu_seqlens_q,
    *,
    cu_seqlens_k=ABSENT_TABLE,
    seqused_k=ABSENT_TABLE,
    block_table=None,
    leftpad_k=ABSENT_TABLE,
    num_seqs=ABSENT_TABLE,
    alibi_slopes=ABSENT_FLOATS,
    sinks=ABSENT_FLOATS,
    k_scale=ABSENT_FLOATS,
    v_scale=ABSENT_FLOATS,
    num_kv_heads,
    attributes,
    scale,
    window_left=-1,
    window_right=0,
    soft_cap=0.0,
    kv_cache_dtype="auto",
    num_splits=1,
    debug=False,
    target="xla_ops.flash_attn_varlen",
):
    """Attention as xla_ops/cc/ops/attention/attention.h defines it.

    Args:
        key, value: the buffers, perhaps one and the same.
        block_table: None: the keys are contiguous.
        attributes: from `geometry`; contiguous keys are its single block.

    Returns:
        out as query, and lse [num_heads, num_tokens] in float32.
    """
    num_tokens, num_heads, head_dim = query.shape
    workspace = 128  # the scheduler's counter, then the splits' partial results
    if num_splits > 1:
        workspace += 4 * num_splits * num_tokens * num_heads * (head_dim + 2)
    call = jax.ffi.ffi_call(
        target,
        (
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct((num_heads, num_tokens), jnp.float32),
            jax.ShapeDtypeStruct((workspace,), jnp.uint8),
        ),
    )
    paged = block_table is not None
    out, lse, _ = call(
        query,
        key,
        value,
        cu_seqlens_q,
        cu_seqlens_k,
        seqused_k,
        block_table if paged else ABSENT_TABLE,
        leftpad_k,
        num_seqs,
        alibi_slopes,
        sinks,
        k_scale,
        v_scale,
        scale=np.float32(scale),
        soft_cap=np.float32(soft_cap),
        kv_cache_dtype=kv_cache_dtype,
        paged=paged,
        debug=debug,
        **_integers(
            window_left=window_left,
            window_right=window_right,
            num_splits=num_splits,
            num_kv_heads=num_kv_heads,
        ),
        **attributes,
    )
    return out, lse


def paged_attention(
    query,
    caches,
    context_lens,
    block_tables,
    query_start_loc,
    num_seqs,
    num_kv_heads,
    attributes,
    scale,
    sliding_window=0,
    **options,
):
    """`xla_ops.paged_attention`, causal; returns out alone."""
    out, _ = attention(
        query,
        caches[0],
        caches[-1],
        query_start_loc,
        seqused_k=context_lens,
        block_table=block_tables,
        num_seqs=num_seqs,
        num_kv_heads=num_kv_heads,
        attributes=attributes,
        scale=scale,
        window_left=sliding_window - 1,
        target="xla_ops.paged_attention",
        **options,
    )
    return out
