"""Every function of xla_ops.jax against the one of xla_ops, bit by bit.

The latter runs the same handlers on tensors of the CPU, past XLA.
"""

import pickle
import subprocess
import sys

import every_call
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax_arrays import integers, random, same_bits, tensor

import xla_ops
import xla_ops.jax as xj

_FLOATS = ("float32", "float16", "bfloat16")


def _rows(dtype):
    return random((2, 3, 16), dtype)


def _scale(value=0.25):
    return jnp.full((1,), value, jnp.float32)


def _cases(dtype):
    """Name of a function -> calls: its arguments, by position and by name."""
    x, w = _rows(dtype), random((16,), dtype, 1)
    residual = random((2, 3, 16), dtype, 2)
    heads, keys = random((5, 4, 8), dtype, 3), random((5, 2, 8), dtype, 4)
    table = random((8, 8), dtype, 5)
    positions = integers(0, 3, 1, -1, 7)
    starts = integers(0, 2, 5)
    pages = random((2, 4, 4, 2, 8), dtype, 6)
    tables = integers(0, 1, 3, 2, shape=(2, 2))
    lengths = integers(3, 7)
    lse = random((4, 5), "float32", 7)
    codes = random((2, 6, 8)).astype(jnp.float8_e4m3fn)
    one = ({}, (x,))
    return {
        "rms_norm": [({}, (x, w)), ({"eps": 0.5}, (x, w))],
        "fused_add_rms_norm": [({}, (x, residual, w))],
        "silu_and_mul": [one],
        "mul_and_silu": [one],
        "gelu_and_mul": [one],
        "gelu_tanh_and_mul": [one],
        "gelu_new": [one],
        "gelu_fast": [one],
        "gelu_quick": [one],
        "silu_and_mul_quant": [({}, (x, _scale()))],
        "fatrelu_and_mul": [({}, (x, 0.25))],
        "swigluoai_and_mul": [({"alpha": 1.5}, (x,))],
        "static_scaled_fp8_quant": [({}, (x, _scale()))],
        "dynamic_scaled_fp8_quant": [one],
        "dynamic_per_token_scaled_fp8_quant": [one, ({}, (x, _scale(1.0)))],
        "static_scaled_int8_quant": [
            ({}, (x, _scale())),
            ({"azp": integers(3)}, (x, _scale())),
        ],
        "dynamic_scaled_int8_quant": [one, ({"symmetric": False}, (x,))],
        "rms_norm_static_fp8_quant": [({}, (x, w, _scale()))],
        "fused_add_rms_norm_static_fp8_quant": [({}, (x, residual, w, _scale()))],
        "rms_norm_dynamic_per_token_quant": [
            ({}, (x, w, jnp.dtype("int8"))),
            ({"residual": residual}, (x, w, jnp.dtype("float8_e4m3fn"))),
        ],
        "convert_fp8": [
            ({}, (x, 0.5)),
            ({"dtype": jnp.dtype(dtype)}, (codes, 0.5)),
        ],
        "rotary_embedding": [
            ({}, (positions, heads, keys, 8, table)),
            ({"is_neox": False}, (positions, heads.reshape(5, 32), None, 8, table)),
        ],
        "linear": [
            ({}, (x[0], random((6, 16), dtype))),
            ({}, (x[0], random((6, 16), dtype), random((6,), dtype))),
        ],
        "grouped_matmul": [
            ({}, (x[0], random((2, 6, 16), dtype), integers(0, 1, 3))),
        ],
        "merge_attn_states": [({}, (heads, lse, heads[::-1], lse[::-1]))],
        "flash_attn_varlen": [
            ({"is_causal": True}, (heads, keys, keys, starts, starts, 3, 3)),
            (
                {"block_table": tables, "seqused_k": lengths, "softcap": 5.0},
                (heads, pages[0], pages[1], starts, None, 3, 8),
            ),
        ],
        "paged_attention": [
            ({}, (heads, pages, lengths, tables, starts, integers(2), 0.5)),
            (
                {"return_lse": True, "sinks": random((4,), dtype)},
                (heads, (pages[0], pages[1]), lengths, tables, starts, 2, 0.5, 4),
            ),
        ],
    }


def _converted(value):
    """An argument for torch."""
    if isinstance(value, jnp.dtype):
        return getattr(torch, value.name)
    return tensor(value)


@pytest.mark.parametrize("jitted", [False, True], ids=["at_once", "jit"])
@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize("name", list(_cases("float32")))
def test_pure_functions(name, dtype, jitted):
    for named, args in _cases(dtype)[name]:
        function = getattr(xj, name)
        is_array = [isinstance(a, jax.Array | tuple) for a in args]
        arrays = [a for a, b in zip(args, is_array, strict=True) if b]

        def call(*arrays, function=function, is_array=is_array, args=args, named=named):
            rest = iter(arrays)
            pairs = zip(args, is_array, strict=True)
            return function(*(next(rest) if b else a for a, b in pairs), **named)

        found = (jax.jit(call) if jitted else call)(*arrays)
        named = {key: _converted(value) for key, value in named.items()}
        expected = getattr(xla_ops, name)(*map(_converted, args), **named)
        same_bits(found, expected)


def _updates(dtype):
    rows, values = random((3, 2, 8), dtype), random((3, 2, 8), dtype, 1)
    slots = integers(2, -1, 9)
    keys, pages = (random((3, 4, 2, 8), dtype, seed) for seed in (2, 3))
    eight = jnp.zeros((3, 4, 2, 8), jnp.uint8)
    old_keys = random((3, 2, 2, 4, 4), dtype, 4)
    old_values = random((3, 2, 8, 4), dtype, 5)
    logits = random((2, 9), dtype)
    qkv = random((3, 4 * 8), dtype)
    weights, places = random((2, 8), dtype), integers(1, 0, 7)
    table, sizes, pair = random((8, 8), dtype), (2, 1, 8, 1e-6), (keys, pages)
    pair = tuple(cache[:, :, :1] for cache in pair)
    return {
        "reshape_and_cache_flash": [
            ({}, (rows, values, keys, pages, slots)),
            (
                {"kv_cache_dtype": "fp8", "k_scale": _scale(), "v_scale": _scale(2.0)},
                (rows, values, eight, eight + 1, slots),
            ),
        ],
        "reshape_and_cache": [({}, (rows, values, old_keys, old_values, slots))],
        "copy_blocks": [
            ({}, ([keys], [pages], integers(0, 1, 1, 2, -1, 0, shape=(3, 2)))),
        ],
        "swap_blocks": [({}, (keys, pages, integers(0, 2, 1, 1, shape=(2, 2))))],
        "fused_qk_norm_rope": [
            (
                {},
                (qkv, 2, 1, 1, 8, 1e-6, *weights, random((8, 8), dtype), True, places),
            )
        ],
        "fused_qk_norm_rope_and_cache": [
            ({}, (qkv, *sizes, *weights, table, True, places, *pair, slots)),
            (
                {"kv_cache_dtype": "fp8", "k_scale": _scale(), "v_scale": _scale(2.0)},
                (
                    *(qkv, *sizes, None, None, table, False, places),
                    *(eight[:, :, :1], eight[:, :, 1:], slots),
                ),
            ),
        ],
        "fused_qk_norm_rope_and_paged_attention": [
            (
                {"sinks": jnp.ones(2)},
                (
                    *(qkv, *sizes, *weights, table, True, places, *pair, slots),
                    *(integers(3, 4), integers(0, 1, 2, 0, shape=(2, 2))),
                    *(integers(0, 1, 3), integers(2), 0.5, 3),
                ),
            )
        ],
        "apply_repetition_penalties_": [
            ({}, (logits, logits > 0, logits < -1, jnp.asarray([1.5, 2.0], dtype))),
        ],
    }


# What each returns, behind what the function of tensors returns: the arguments that
# that writes.
_WRITTEN = {
    "reshape_and_cache_flash": (2, 3),
    "reshape_and_cache": (2, 3),
    "copy_blocks": (0, 1),
    "swap_blocks": (1,),
    "fused_qk_norm_rope": (0,),
    "fused_qk_norm_rope_and_cache": (10, 11),
    "fused_qk_norm_rope_and_paged_attention": (10, 11),
    "apply_repetition_penalties_": (0,),
}


@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize("name", list(_WRITTEN))
def test_functions_that_update(name, dtype):
    for named, args in _updates(dtype)[name]:
        found = getattr(xj, name)(*args, **named)
        tensors = [_wide(name, i, tensor(a)) for i, a in enumerate(args)]
        named = {key: tensor(value) for key, value in named.items()}
        result = getattr(xla_ops, name)(*tensors, **named)
        expected = tuple(
            tuple(t) if isinstance(t, list) else t
            for t in (tensors[i] for i in _WRITTEN[name])
        )
        assert (result is None) == (not name.startswith("fused_qk_norm_rope_and"))
        expected = expected if result is None else (result, *expected)
        same_bits(found, expected if len(expected) > 1 else expected[0])


def _wide(name, index, value):
    """Slots and pairs of blocks, int32 for JAX, are int64 for torch."""
    is_index = (name, index) in {
        ("reshape_and_cache_flash", 4),
        ("fused_qk_norm_rope_and_cache", 12),
        ("fused_qk_norm_rope_and_paged_attention", 12),
        ("reshape_and_cache", 4),
        ("copy_blocks", 2),
        ("swap_blocks", 2),
    }
    return value.long() if is_index else value


def test_every_function_is_compared():
    functions = set(xla_ops.ops.__all__)
    assert set(_cases("float32")) | set(_WRITTEN) == functions
    assert functions <= set(xj.__all__)


def test_stacked_cache():
    rows, values = random((3, 2, 8)), random((3, 2, 8), seed=1)
    cache, slots = random((2, 3, 4, 2, 8), seed=2), integers(2, -1, 9)
    found = xj.reshape_and_cache_flash(rows, values, cache, None, slots)
    expected = tensor(cache)
    xla_ops.reshape_and_cache_flash(
        tensor(rows), tensor(values), *expected.unbind(0), tensor(slots).long()
    )
    same_bits(found, expected)


@pytest.mark.parametrize("shape", [(3, 2, 4, 2, 8), (1, 3, 4, 2, 8), (3, 4, 2, 8), ()])
def test_a_stacked_cache_has_two_parts(shape):
    """Of more, as where pages hold keys and values, two alone would be written."""
    rows, slots = random((2, 2, 8), "float32"), integers(0, 5)
    rule = r"key_cache must be an array of shape \[2, \.\.\.\], keys and values, where"
    with pytest.raises(ValueError, match=f"reshape_and_cache_flash: {rule}"):
        xj.reshape_and_cache_flash(rows, rows, jnp.zeros(shape), None, slots)
    with pytest.raises(ValueError, match=f"{rule} value_cache is None, got int"):
        xj.reshape_and_cache_flash(rows, rows, 3, None, slots)


def test_int64_where_jax_has_it():
    rows = random((2, 1, 8))
    caches = jnp.zeros((2, 1, 4, 1, 8))
    narrow = xj.reshape_and_cache_flash(rows, rows, caches, None, integers(0, 3))
    with _x64():
        slots = jnp.array([0, 3])
        assert slots.dtype == jnp.int64
        wide = xj.reshape_and_cache_flash(rows, rows, caches, None, slots)
    same_bits(wide, tensor(narrow))


def test_integers_of_numpy_that_jax_would_wrap_around():
    """2**32 + 5 became slot 5, without a word."""
    rows, cache = random((2, 1, 8)), jnp.zeros((2, 2, 4, 1, 8))
    for far in (2**32 + 5, -(2**32) + 5):
        text = f"slot_mapping must fit int32 where jax_enable_x64 is off, got {far}"
        with pytest.raises(ValueError, match=f"^reshape_and_cache_flash: {text}$"):
            xj.reshape_and_cache_flash(rows, rows, cache, None, np.array([0, far]))
        with _x64():
            found = xj.reshape_and_cache_flash(
                rows, rows, cache, None, np.array([0, far])
            )
        assert not found[:, 1].any()
    near = xj.reshape_and_cache_flash(rows, rows, cache, None, np.array([0, 5]))
    assert near[:, 1, 1].any()


def test_dtypes_that_jax_alone_has():
    with pytest.raises(ValueError, match=r"^rms_norm: input must be .*, got key<fry>$"):
        xj.rms_norm(jax.random.key(0), jnp.ones(4))


def _x64():
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return jax.experimental.enable_x64()


def test_empty_calls():
    same_bits(xj.rms_norm(jnp.zeros((0, 4)), jnp.ones(4)), torch.zeros(0, 4))
    cache = random((2, 1, 4, 1, 8))
    rows = jnp.zeros((0, 1, 8))
    slots = jnp.zeros((0,), jnp.int32)
    same_bits(xj.reshape_and_cache_flash(rows, rows, cache, None, slots), tensor(cache))


def test_a_cache_without_heads():
    rows, cache = jnp.zeros((2, 0, 8)), jnp.zeros((2, 3, 4, 0, 8))
    found = xj.reshape_and_cache_flash(rows, rows, cache, None, integers(0, 1))
    same_bits(found, tensor(cache))


def test_functional_op_by_name():
    """Layouts that no function here has: keys and values interleaved by block."""
    rows, values = random((2, 1, 8)), random((2, 1, 8), seed=1)
    cache, slots = jnp.zeros((3, 2, 4, 1, 8)), jnp.array([0, 5], jnp.int32)
    page = 4 * 8
    geometry = [3, 4, 1, 8, 2 * page, 8, 8, 0, page]
    with _x64():
        found = xj.functional("reshape_and_cache_flash_stacked")(
            cache, rows, values, slots.astype("int64"), None, None, "auto", geometry,
            False,
        )  # fmt: skip
    expected = tensor(cache)
    xla_ops.reshape_and_cache_flash(
        tensor(rows), tensor(values), *expected.unbind(1), tensor(slots).long()
    )
    same_bits(found, expected)


@pytest.mark.parametrize(
    "call, error",
    [
        (
            lambda: xj.rms_norm(jnp.ones((2, 4)), jnp.ones(3)),
            "rms_norm: weight must have shape [4], got [3]",
        ),
        (
            lambda: xj.rms_norm(jnp.ones((2, 4), "int32"), jnp.ones(4)),
            "rms_norm: input must be float32, float16 or bfloat16, got int32",
        ),
        (
            lambda: xj.rms_norm(jnp.ones((2, 4), "uint32"), jnp.ones(4)),
            "rms_norm: input must be float32, float16 or bfloat16, got uint32",
        ),
        (
            lambda: xj.rms_norm([1.0, 2.0], jnp.ones(4)),
            "rms_norm: input must be a tensor, got list",
        ),
        (
            lambda: xj.rms_norm(jnp.ones((2, 4)), jnp.ones(4), jnp.ones(())),
            "rms_norm: eps must be a float, got an array of float32 and shape []"
            " (Array)",
        ),
        (
            lambda: jax.jit(xj.silu_and_mul)(jnp.ones((2, 3))),
            "silu_and_mul: input must have an even last dimension, got 3",
        ),
    ],
)
def test_errors_are_those_of_tensors(call, error):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert str(caught.value) == error


def test_attributes_tell_calls_apart():
    """1.0 and True, 0.0 and -0.0 are different attributes of one compiled function."""
    x = random((2, 8))
    first = xj.fatrelu_and_mul(x, 0.0)
    assert (xj.fatrelu_and_mul(x, 1.0) != first).any()
    same_bits(xj.fatrelu_and_mul(x, 0), tensor(first))


def test_a_function_keeps_its_documentation():
    assert "root mean square" in xj.rms_norm.__doc__
    assert xj.fused_qk_norm_rope.__doc__.splitlines()[2] == (
        "Returns the new qkv, and writes no argument. As it is of tensors:"
    )
    assert xj.fused_qk_norm_rope_and_cache.__doc__.splitlines()[2] == (
        "Returns the result, the new key_cache and the new value_cache, and writes no"
        " argument. As it is of tensors:"
    )


def test_tensors_are_refused():
    x, w = random((2, 16)), torch.ones(16)
    with pytest.raises(TypeError) as error:
        xj.rms_norm(x, w)
    text = "rms_norm: weight must be an array of JAX's, got Tensor"
    assert str(error.value) == text


def test_numbers_of_numpy():
    x, w = random((2, 16)), random((16,), seed=1)
    same_bits(xj.rms_norm(x, w, np.float32(0.5)), tensor(xj.rms_norm(x, w, 0.5)))
    scale = np.float16(0.5)
    same_bits(xj.fatrelu_and_mul(x, scale), tensor(xj.fatrelu_and_mul(x, 0.5)))


def test_every_function_works_without_torch(tmp_path):
    """And so do gradients, and what raises where there is none."""
    calls = {**_cases("float32"), **_updates("float32")}
    cases = [(name, args, named) for name in calls for named, args in calls[name]]
    given, found = tmp_path / "cases", tmp_path / "results"
    given.write_bytes(pickle.dumps(cases))
    subprocess.run([sys.executable, every_call.__file__, given, found], check=True)
    results = pickle.loads(found.read_bytes())
    for case, got in zip(cases, results, strict=True):
        expected = every_call.outcomes(*case)
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        for one, other in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
            assert type(one) is type(other)
            if isinstance(one, str):
                assert one == other
            else:
                same_bits(one, tensor(other))
