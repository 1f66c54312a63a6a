"""Calls of kernels that the checks of this folder share, by xla_ops.jax.

They need JAX and the wheel, or its unpacked content on sys.path, and no torch. Buffers,
geometries and numbers of splits are those of the functional ops, which public functions
choose themselves.
"""

import ctypes
import pathlib
import subprocess

import jax
import numpy as np

import xla_ops.jax as xj
from xla_ops.core import paths
from xla_ops.jax import registration
from xla_ops.ops import attention as attention_op


def use(lib_dir, platform="cuda"):
    """Registers the handlers of the op libraries in `lib_dir`, not those of the wheel.

    Args:
        platform: `cuda` or `cpu`.

    Returns:
        The architectures that each CUDA library with kernels was built for, by op.
    """
    paths.LIB = pathlib.Path(lib_dir).resolve()
    found = sorted(paths.LIB.glob(f"libxla_ops_*_{platform}.so"))
    if not found:
        raise FileNotFoundError(f"{lib_dir} must hold libxla_ops_*_{platform}.so")
    registration.register(platform)
    archs = {}
    for path in found if platform == "cuda" else ():
        op = path.stem.removeprefix("libxla_ops_").removesuffix(f"_{platform}")
        library = ctypes.CDLL(str(path))
        if hasattr(library, "xla_ops_cuda_archs"):  # else it brings no kernels
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


def geometry(layout, num_blocks, page_size, num_heads, head_dim):
    """Shape of the buffer and, as ops are told it, where the two caches lie in it.

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
    logical = (num_blocks, page_size, num_heads, head_dim)
    return shape, [*logical, *strides, key_offset, value_offset]


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
    key, value, caches, slots, scales, geometry, kv_cache_dtype="auto", debug=False
):
    """Writes both caches in place; returns the list of cache buffers.

    Args:
        caches: [key_cache, value_cache], or [kv_cache] that holds both.
        geometry: from the function of that name.
    """
    tail = (slots, *scales, kv_cache_dtype, geometry, debug)
    if len(caches) == 1:
        stacked = xj.functional("reshape_and_cache_flash_stacked")
        return [stacked(*caches, key, value, *tail)]
    return list(
        xj.functional("reshape_and_cache_flash_both")(key, value, *caches, *tail)
    )


def reshape_and_cache_flash_one(
    key, cache, slots, scale, geometry, kv_cache_dtype="auto"
):
    """Writes one cache."""
    one = xj.functional("reshape_and_cache_flash_one")
    return one(cache, key, slots, scale, kv_cache_dtype, geometry[:-1], False)


def fused_qk_norm_rope_and_cache(qkv, caches, *rest):
    """Returns the queries and the list of cache buffers, as above."""
    form = "stacked" if len(caches) == 1 else "both"
    op = xj.functional(f"fused_qk_norm_rope_and_cache_{form}")
    query, *caches = op(qkv, *caches, *rest)
    return query, caches


def attention(query, key, value, cu_seqlens_q, *, op="flash_attn_varlen", **arguments):
    """Attention as xla_ops/cc/ops/attention/attention.h defines it.

    Args:
        key, value: the buffers, perhaps one and the same.
        arguments: others of the functional op (ops/attention.py), where they are not
            absent or as below.

    Returns:
        out as query, and lse [num_heads, num_tokens] in float32.
    """
    defaults = {
        "window_left": -1,
        "window_right": 0,
        "soft_cap": 0.0,
        "kv_cache_dtype": "auto",
        "num_splits": 1,
        "debug": False,
    }
    given = defaults | arguments
    given |= {"query": query, "key": key, "value": value, "cu_seqlens_q": cu_seqlens_q}
    names = attention_op.Arguments._fields
    unknown = given.keys() - set(names)
    if unknown:
        raise TypeError(f"attention has no arguments {sorted(unknown)}")
    return xj.functional(op)(*(given.get(name) for name in names))


def paged_attention(
    query,
    caches,
    context_lens,
    block_tables,
    query_start_loc,
    num_seqs,
    geometry,
    scale,
    **options,
):
    """`xla_ops.paged_attention`, causal; returns out alone."""
    out, _ = attention(
        query,
        caches[0],
        caches[-1],
        query_start_loc,
        op="paged_attention",
        seqused_k=context_lens,
        block_table=block_tables,
        num_seqs=num_seqs,
        geometry=geometry,
        scale=scale,
        **options,
    )
    return out
