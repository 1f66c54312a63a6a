"""Donated caches: updated where they lie, without a copy in the program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_arrays import addresses, copies, integers, random, same_bits, tensor

import xla_ops.jax as xj

_ROWS, _VALUES = random((2, 1, 8)), random((2, 1, 8), seed=1)
_SLOTS = integers(1, 6)


def _write_stacked(cache):
    return (xj.reshape_and_cache_flash(_ROWS, _VALUES, *cache, None, _SLOTS),)


def _write_pair(caches):
    return xj.reshape_and_cache_flash(_ROWS, _VALUES, *caches, _SLOTS)


def _write_old_layout(caches):
    return xj.reshape_and_cache(_ROWS, _VALUES, *caches, _SLOTS)


def _copy(caches):
    pairs = integers(0, 1, shape=(1, 2))
    keys, values = xj.copy_blocks([caches[0]], [caches[1]], pairs)
    return keys[0], values[0]


def _normalise(qkv):
    weight, table = jnp.ones(8), random((8, 8))
    args = (2, 1, 1, 8, 1e-6, weight, weight, table, True, integers(1, 2))
    return (xj.fused_qk_norm_rope(*qkv, *args),)


def _prepare(caches):
    weight, table = jnp.ones(8), random((8, 8))
    caches = caches if len(caches) == 2 else [*caches, None]
    args = (2, 1, 8, 1e-6, weight, weight, table, True, integers(1, 2))
    args = (random((2, 32)), *args, *caches, integers(3, 9))
    return xj.fused_qk_norm_rope_and_cache(*args)[1:]


def _penalise(logits):
    mask = jnp.ones((2, 32), bool)
    return (xj.apply_repetition_penalties_(*logits, mask, mask, jnp.ones(2)),)


_CASES = {
    "stacked": (_write_stacked, [(2, 3, 4, 1, 8)]),
    "pair": (_write_pair, [(3, 4, 1, 8)] * 2),
    "old_layout": (_write_old_layout, [(3, 1, 2, 4, 4), (3, 1, 8, 4)]),
    "copy_blocks": (_copy, [(3, 4, 1, 8)] * 2),
    "fused_qk_norm_rope": (_normalise, [(2, 32)]),
    "fused_qk_norm_rope_and_cache": (_prepare, [(3, 4, 1, 8)] * 2),
    "fused_qk_norm_rope_and_cache stacked": (_prepare, [(2, 3, 4, 1, 8)]),
    "apply_repetition_penalties_": (_penalise, [(2, 32)]),
}


@pytest.mark.parametrize("case", list(_CASES))
def test_donated_arrays_stay_where_they_are(case):
    update, shapes = _CASES[case]
    step = jax.jit(update, donate_argnums=0)
    arrays = tuple(random(shape, seed=i) for i, shape in enumerate(shapes))
    expected = update(arrays)
    text = step.lower(arrays).compile().as_text()
    assert "xla_ops." in text
    assert not copies(text)
    before = addresses(arrays)
    found = step(arrays)
    assert addresses(found) == before
    same_bits(tuple(found), tuple(map(tensor, expected)))


def test_an_array_that_is_not_donated_keeps_its_value():
    cache = random((2, 3, 4, 1, 8))
    before = np.asarray(cache).copy()
    (found,) = jax.jit(_write_stacked)((cache,))
    np.testing.assert_array_equal(cache, before)
    assert (found != cache).any()


def test_a_step_that_writes_and_reads_keeps_the_cache_in_place():
    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache, query, length):
        cache = xj.reshape_and_cache_flash(query, query, cache, None, length - 1)
        tables, starts = integers(0, 1, 2, shape=(1, 3)), integers(0, 1)
        return cache, xj.paged_attention(query, cache, length, tables, starts, 1, 0.5)

    cache, query = jnp.zeros((2, 3, 4, 1, 8)), random((1, 1, 8))
    text = step.lower(cache, query, integers(1)).compile().as_text()
    assert text.count('custom_call_target="xla_ops.') == 2
    assert not copies(text)
    before = addresses([cache])
    for length in range(1, 6):
        cache, out = step(cache, query, integers(length))
    assert addresses([cache]) == before
    np.testing.assert_allclose(out, query, rtol=1e-6)
    np.testing.assert_array_equal(cache[:, 1, 0, 0], jnp.stack([query[0, 0]] * 2))


def test_updates_inside_a_loop():
    """A cache that lax.scan or a while loop carries is updated in place there."""

    def body(i, cache):
        slots = jnp.full((1,), i, jnp.int32)
        return xj.reshape_and_cache_flash(_ROWS[:1], _VALUES[:1], cache, None, slots)

    step = jax.jit(lambda c: jax.lax.fori_loop(0, 5, body, c), donate_argnums=0)
    cache = jnp.zeros((2, 3, 4, 1, 8))
    assert not copies(step.lower(cache).compile().as_text())
    found = step(cache).reshape(2, 12, 8)
    np.testing.assert_array_equal(found[0, :5], jnp.repeat(_ROWS[0], 5, 0))
    assert not found[:, 5:].any()
