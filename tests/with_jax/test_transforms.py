"""grad and vmap of xla_ops.jax: by the gradient and the rule that an op declares."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax_arrays import integers, random

import xla_ops.jax as xj
from xla_ops.core import autocast, sharding
from xla_ops.core.custom_call import CustomCall
from xla_ops.core.gradients import Gradient
from xla_ops.core.hlo import Spec
from xla_ops.core.op import Op
from xla_ops.jax import fronts

_asked: list[tuple] = []


def _product(name, gradient):
    """y = input @ weight.T, by linear's handler."""

    def lower(input, weight, bias):
        shape = (input.shape[0], weight.shape[0])
        return CustomCall(
            "xla_ops.linear",
            ("input", "weight", "bias"),
            (Spec(shape, input.dtype),),
            {"plan": 0},
        )

    return Op(
        name,
        "(Tensor input, Tensor weight, Tensor bias) -> Tensor",
        lower,
        lambda input, weight, bias: input @ weight.t() + bias,
        autocast=autocast.unchanged,
        splits=sharding.Rule(
            {"input": "tokens !depth", "weight": "columns !depth", "bias": "columns"},
            ("tokens columns",),
        ),
        gradient=gradient,
    )


def _compute(backward):
    """That of input by the op itself, that of weight by plain operations."""
    (grad,), args = backward.grads, backward.args
    _asked.append(backward.wanted)
    weight = args["weight"]
    zeros = weight.new_zeros(weight.shape[1])
    return {
        "input": _differentiable(grad, weight.t(), zeros),
        "weight": grad.t() @ args["input"],
    }


_differentiable = _product(
    "test_jax_product", Gradient(_compute, keeps=("input", "weight"))
)
_product_of = fronts.functional(_differentiable)
_INPUT, _WEIGHT, _BIAS = random((3, 8)), random((5, 8), seed=1), random((5,), seed=2)


def _plain(x, w, b):
    return x @ w.T + b


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["at_once", "jit"])
def test_gradient_that_is_declared(transform):
    _asked.clear()

    def loss(product, x, w):
        return (product(x, w, _BIAS) ** 2).sum()

    grad = functools.partial(jax.grad, argnums=(0, 1))
    found = transform(grad(functools.partial(loss, _product_of)))(_INPUT, _WEIGHT)
    expected = grad(functools.partial(loss, _plain))(_INPUT, _WEIGHT)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    assert _asked == [("input", "weight")]


def test_only_wanted_gradients_are_asked_for():
    _asked.clear()
    jax.grad(lambda x: _product_of(x, _WEIGHT, _BIAS).sum())(_INPUT)
    assert _asked == [("input",)]


def test_gradient_that_the_op_leaves_out():
    with pytest.raises(RuntimeError) as caught:
        jax.grad(lambda b: _product_of(_INPUT, _WEIGHT, b).sum())(_BIAS)
    assert str(caught.value) == (
        "xla_ops.test_jax_product: has no gradient: bias requires one; pass"
        " jax.lax.stop_gradient(bias)"
    )


def test_vmap_of_grad_and_grad_of_vmap():
    xs = random((4, 3, 8), seed=3)

    def loss(product, x):
        return (product(x, _WEIGHT, _BIAS) ** 2).sum()

    def both(product):
        one = jax.grad(functools.partial(loss, product))
        of_all = jax.grad(
            lambda xs: jax.vmap(functools.partial(loss, product))(xs).sum()
        )
        return jax.vmap(one)(xs), of_all(xs)

    for found, expected in zip(both(_product_of), both(_plain), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_gradient_of_a_weight_for_each_of_a_batch():
    """Its backward sums over tokens, in parts that follow from one example's shape."""
    xs, w = random((4, 3, 8)), random((8,), seed=1)
    of_weight = jax.grad(lambda w, x: (xj.rms_norm(x, w) ** 2).sum())
    found = jax.vmap(of_weight, (None, 0))(w, xs)
    expected = jnp.stack([of_weight(w, x) for x in xs])
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_an_op_without_gradient_raises_at_the_backward():
    cache, slots = jnp.zeros((2, 1, 4, 1, 8)), integers(1)

    def loss(rows):
        written = xj.reshape_and_cache_flash(rows, rows, cache, None, slots)
        return written.sum()

    rows = jnp.ones((1, 1, 8))
    value, backward = jax.vjp(loss, rows)
    assert value == 16
    with pytest.raises(RuntimeError) as caught:
        backward(jnp.ones(()))
    assert str(caught.value) == (
        "xla_ops.reshape_and_cache_flash: has no gradient: key requires one; pass"
        " jax.lax.stop_gradient(key)"
    )
    assert not jax.grad(lambda r: loss(jax.lax.stop_gradient(r)))(rows).any()


def _num_calls(function, *args):
    return jax.jit(function).lower(*args).as_text().count("xla_ops.")


def _same(function, *args, axes=0):
    found = jax.vmap(function, axes)(*args)
    axes = axes if isinstance(axes, tuple) else (axes,) * len(args)
    each = [
        function(*(a if ax is None else jnp.take(a, i, ax) for a, ax in pairs))
        for pairs in [list(zip(args, axes, strict=True))]
        for i in range(4)
    ]
    for one, other in zip(
        jax.tree.leaves(found),
        jax.tree.leaves(jax.tree.map(lambda *x: jnp.stack(x), *each)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    return _num_calls(jax.vmap(function, axes), *args)


def test_a_batch_of_rows_is_more_rows():
    xs, w = random((4, 3, 8)), random((8,))
    rows = random((4, 8))
    assert _same(lambda x: xj.rms_norm(x, w), xs) == 1
    assert _same(lambda x: xj.rms_norm(x, w), rows) == 1
    assert _same(lambda x: xj.rms_norm(x, w), random((3, 8, 4)), axes=2) == 1
    assert _same(lambda x: xj.fused_add_rms_norm(x, xs[0], w), xs) == 1
    assert _same(lambda x: xj.static_scaled_fp8_quant(x, w[:1]), xs) == 1
    assert _same(xj.dynamic_per_token_scaled_fp8_quant, xs) == 1
    assert _same(lambda x: xj.linear(x, random((5, 8))), xs) == 1


def test_a_batch_of_tokens_is_more_tokens():
    positions, table = integers(0, 3, 1), random((4, 8), seed=1)
    queries = random((4, 3, 2, 8))

    def rotate(positions, query):
        return xj.rotary_embedding(positions, query, query, 8, table)

    assert _same(lambda q: rotate(positions, q), queries) == 1
    more = jnp.stack([positions, positions + 1, positions - 1, positions])
    assert _same(rotate, more, queries) == 1


def test_other_batches_are_calls_one_after_the_other():
    xs, ws = random((4, 3, 8)), random((4, 8))
    assert _same(xj.rms_norm, xs, ws) == 1  # in a loop
    heads, lse = random((4, 3, 2, 8)), random((4, 2, 3))
    _same(lambda h, s: xj.merge_attn_states(h, s, heads[0], lse[0]), heads, lse)
    # A row alone has one scale, which a batch of rows has not.
    _same(xj.dynamic_per_token_scaled_fp8_quant, xs[:, 0])
    _same(xj.dynamic_scaled_fp8_quant, xs)


def test_vmap_twice():
    xs, w = random((4, 2, 3, 8)), random((8,))
    found = jax.vmap(jax.vmap(lambda x: xj.rms_norm(x, w)))(xs)
    np.testing.assert_array_equal(found, xj.rms_norm(xs, w))


def test_a_batch_of_nothing():
    xs, w = jnp.zeros((0, 3, 8)), random((8,))
    assert jax.vmap(lambda x: xj.rms_norm(x, w))(xs).shape == (0, 3, 8)
    ws = jnp.zeros((0, 8))
    assert jax.jit(jax.vmap(xj.rms_norm))(xs, ws).shape == (0, 3, 8)
    grad = jax.vmap(jax.grad(lambda x: xj.rms_norm(x, w).sum()))(xs)
    assert grad.shape == (0, 3, 8)
    cache = jnp.zeros((2, 2, 4, 1, 8))
    write = jax.vmap(xj.reshape_and_cache_flash, in_axes=(0, 0, None, None, None))
    rows = jnp.zeros((0, 2, 1, 8))
    found = write(rows, rows, cache, None, jnp.array([0, 1]))
    assert found.shape == (0, *cache.shape)
