"""Sharded arrays: partitioned jit and shard_map, by the rule that an op declares."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax_arrays import addresses, copies, integers, random

import xla_ops.jax as xj

P = PartitionSpec
MESH = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))


def _put(array, *axes):
    return jax.device_put(array, NamedSharding(MESH, P(*axes)))


def _compiled(function, *args):
    """The program, in which nothing may be sent between devices."""
    text = jax.jit(function).lower(*args).compile().as_text()
    return text, re.findall(
        r"all-gather|all-reduce|all-to-all|collective-permute", text
    )


def _same(function, args, axes, expected_axes):
    sharded = [_put(a, *ax) for a, ax in zip(args, axes, strict=True)]
    _, moved = _compiled(function, *sharded)
    assert not moved
    found = jax.tree.leaves(jax.jit(function)(*sharded))
    expected = jax.tree.leaves(function(*args))
    for one, other, ax in zip(found, expected, expected_axes, strict=True):
        wanted = NamedSharding(MESH, P(*ax))
        assert one.sharding.is_equivalent_to(wanted, one.ndim), one.sharding
        np.testing.assert_array_equal(one, other)


def test_rows():
    x, w = random((4, 6, 16)), random((16,))
    axes = ("data", "model", None)
    _same(xj.rms_norm, (x, w), (axes, ()), (axes,))
    axes = (("data", "model"), None, None)
    _same(xj.fused_add_rms_norm, (x, x, w), (axes, axes, ()), (axes, axes))


def test_elements_and_halves():
    x = random((4, 16))
    _same(xj.gelu_new, (x,), (("data", "model"),), (("data", "model"),))
    _same(xj.silu_and_mul, (x,), (("data", None),), (("data", None),))
    # A pair is one unit of this op.
    axes = ("data", "model")
    _same(xj.swigluoai_and_mul, (x,), (axes,), (axes,))


def test_scales_of_rows():
    x = random((4, 3, 16))
    axes = ("data", None, None)
    results = (axes, ("data", None))
    _same(xj.dynamic_per_token_scaled_fp8_quant, (x,), (axes,), results)


def test_columns_of_a_product():
    x, w, b = random((4, 16)), random((6, 16)), random((6,))
    axes = (("data", None), ("model", None), ("model",))
    _same(xj.linear, (x, w, b), axes, (("data", "model"),))


def test_heads_in_elements():
    """A dimension of all heads' elements is split by whole heads."""
    positions, table = integers(0, 1, 2, 3), random((4, 8))
    query = random((4, 4 * 8))

    def rotate(positions, query):
        return xj.rotary_embedding(positions, query, query, 8, table)

    axes = ("data", "model")
    _same(rotate, (positions, query), (("data",), axes), (axes, axes))


@pytest.mark.parametrize("is_stacked", [True, False], ids=["stacked", "pair"])
def test_heads_of_a_cache(is_stacked):
    rows = random((3, 4, 8))
    shape = (2, 4, 4, 4, 8) if is_stacked else (4, 4, 4, 8)
    heads = (*(None,) * (len(shape) - 2), "model", None)
    slots = integers(0, 1, 2)

    def step(rows, *caches):
        if is_stacked:
            caches = (xj.reshape_and_cache_flash(rows, rows, *caches, None, slots),)
        else:
            caches = xj.reshape_and_cache_flash(rows, rows, *caches, slots)
        cache = caches[0] if is_stacked else caches
        tables, starts = integers(0, shape=(1, 1)), integers(0, 3)
        out = xj.paged_attention(rows, cache, integers(3), tables, starts, 1, 0.5)
        return *caches, out

    caches = [jnp.zeros(shape)] * (1 if is_stacked else 2)
    query_axes = (None, "model", None)
    all_axes = [heads] * len(caches)
    _same(step, (rows, *caches), (query_axes, *all_axes), (*all_axes, query_axes))
    # Donated, each device's shard stays in place.
    donated = jax.jit(step, donate_argnums=tuple(range(1, 1 + len(caches))))
    sharded = [_put(c + 0, *heads) for c in caches]
    before = addresses(sharded)
    text = donated.lower(_put(rows, *query_axes), *sharded).compile().as_text()
    assert not copies(text)
    *found, _ = donated(_put(rows, *query_axes), *sharded)
    assert addresses(found) == before


def test_what_may_not_be_split_is_gathered():
    x, w = random((4, 16)), random((16,))
    sharded = _put(x, None, "model")
    _, moved = _compiled(xj.rms_norm, sharded, w)
    assert moved
    np.testing.assert_array_equal(jax.jit(xj.rms_norm)(sharded, w), xj.rms_norm(x, w))


def test_pieces_that_would_not_be_whole_units():
    """Two heads over four devices: JAX gathers, and the result is right."""
    query, table = random((4, 2 * 8)), random((4, 8))
    positions = integers(0, 1, 2, 3)

    def rotate(query):
        return xj.rotary_embedding(positions, query, None, 8, table)[0]

    sharded = _put(query, None, ("data", "model"))
    np.testing.assert_array_equal(jax.jit(rotate)(sharded), rotate(query))


def test_a_result_that_is_told_how_to_lie():
    """Shardings go from results to operands too."""
    x, w = random((4, 16)), random((16,))
    rows = NamedSharding(MESH, P("data", None))
    step = jax.jit(lambda x: xj.rms_norm(x * 2, w), out_shardings=rows)
    found = step(x)
    assert found.sharding.is_equivalent_to(rows, 2)
    np.testing.assert_array_equal(found, xj.rms_norm(x * 2, w))


@pytest.mark.parametrize("at_once", [True, False], ids=["at_once", "jit"])
def test_shard_map(at_once):
    x, w = random((4, 16)), random((16,))
    step = jax.shard_map(
        lambda x: xj.rms_norm(x, w),
        mesh=MESH,
        in_specs=P("data", None),
        out_specs=P("data", None),
    )
    found = (step if at_once else jax.jit(step))(_put(x, "data", None))
    np.testing.assert_array_equal(found, xj.rms_norm(x, w))


def test_mesh_of_explicit_axes():
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=kinds)
    x, w = random((4, 16)), random((16,))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(x, NamedSharding(mesh, P("data", None)))
        whole = jax.device_put(w, NamedSharding(mesh, P()))
        found = jax.jit(xj.rms_norm)(sharded, whole)
    np.testing.assert_array_equal(found, xj.rms_norm(x, w))
