"""Gradients by JAX against those by torch: the same backward calls, bit by bit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax_arrays import integers, random, same_bits, tensor

import xla_ops
import xla_ops.jax as xj


def _cases(dtype):
    """Name of a function -> its arguments, and which of them are differentiated."""
    x, w = random((3, 16), dtype), random((16,), dtype, 1)
    heads, keys = random((5, 4, 8), dtype, 3), random((5, 2, 8), dtype, 4)
    values = random((5, 2, 8), dtype, 5)
    lse = random((4, 5), "float32", 7)
    starts, positions = integers(0, 2, 5), integers(0, 3, 1, -1, 7)
    return {
        "rms_norm": ((x, w), (0, 1)),
        "fused_add_rms_norm": ((x, x[::-1], w), (0, 1, 2)),
        "silu_and_mul": ((x,), (0,)),
        "gelu_and_mul": ((x,), (0,)),
        "gelu_tanh_and_mul": ((x,), (0,)),
        "gelu_new": ((x,), (0,)),
        "swigluoai_and_mul": ((x,), (0,)),
        "rotary_embedding": (
            (positions, heads, keys, 8, random((8, 8), dtype, 6)),
            (1, 2),
        ),
        "grouped_matmul": (
            (x, random((2, 6, 16), dtype, 8), integers(0, 1, 3)),
            (0, 1),
        ),
        "merge_attn_states": ((heads, lse, heads[::-1], lse[::-1]), (0, 1, 2, 3)),
        "flash_attn_varlen": (
            (heads, keys, values, starts, starts, 3, 3, None, True),
            (0, 1, 2),
        ),
    }


def _weights(results):
    """Of a sum of the results: other ones for each element."""
    flat = jax.tree.leaves(results)
    return [random(r.shape, r.dtype, 20 + i) for i, r in enumerate(flat)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", list(_cases("float32")))
def test_gradients_are_torchs(name, dtype):
    args, wanted = _cases(dtype)[name]
    function = getattr(xj, name)
    weights = _weights(function(*args))

    def of_wanted(*some):
        given = list(args)
        for i, value in zip(wanted, some, strict=True):
            given[i] = value
        return jax.tree.leaves(function(*given))

    some = [args[i] for i in wanted]
    _, backward = jax.vjp(of_wanted, *some)
    found = backward(weights)

    tensors = list(map(tensor, args))
    for i in wanted:
        tensors[i].requires_grad_()
    with torch.enable_grad():
        results = getattr(xla_ops, name)(*tensors)
    results = results if isinstance(results, tuple) else (results,)
    expected = torch.autograd.grad(
        results, [tensors[i] for i in wanted], [tensor(weight) for weight in weights]
    )
    same_bits(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_op_in_place_is_differentiated(dtype):
    """The new value that it returns."""
    qkv, q_weight = random((5, 32), dtype), random((8,), dtype, 1)
    k_weight, table = random((8,), dtype, 2), random((8, 8), dtype, 3)
    weight, positions = random((5, 32), dtype, 4), integers(0, 3, 1, -1, 7)
    some = (qkv, q_weight, k_weight)

    def of_some(qkv, *weights):
        rest = (*weights, table, True, positions)
        return xj.fused_qk_norm_rope(qkv, 2, 1, 1, 8, 1e-5, *rest)

    _, backward = jax.vjp(of_some, *some)
    tensors = [tensor(t).requires_grad_() for t in some]
    with torch.enable_grad():
        result = tensors[0] * 1
        rest = (*tensors[1:], tensor(table), True, tensor(positions))
        xla_ops.fused_qk_norm_rope(result, 2, 1, 1, 8, 1e-5, *rest)
    expected = torch.autograd.grad(result, tensors, tensor(weight))
    found = backward(weight)
    same_bits(found[:1], expected[:1])
    for got, right in zip(found[1:], expected[1:], strict=True):  # sums over rows
        torch.testing.assert_close(tensor(got), right)


def test_products_are_differentiated_by_products():
    x, w, b = random((3, 8)), random((5, 8), seed=1), random((5,), seed=2)

    def loss(product, x, w, b):
        return (product(x, w, b) ** 2).sum()

    grads = [
        jax.grad(lambda *a, f=f: loss(f, *a), (0, 1, 2))(x, w, b)
        for f in (xj.linear, lambda x, w, b: x @ w.T + b)
    ]
    for found, expected in zip(*grads, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_backward_is_custom_calls_of_the_same_program():
    x, w = random((3, 16)), random((16,))
    step = jax.jit(jax.grad(lambda x: xj.silu_and_mul(xj.rms_norm(x, w)).sum()))
    text = step.lower(x).as_text()
    assert {"xla_ops.activation_backward", "xla_ops.rms_norm_backward_input"} <= set(
        re.findall(r"xla_ops\.\w+", text)
    )


def test_backward_of_a_batch():
    xs, w = random((4, 3, 16)), random((16,))

    def of_one(x):
        return jax.grad(lambda x: (xj.rms_norm(x, w) ** 2).sum())(x)

    expected = jnp.stack([of_one(x) for x in xs])
    np.testing.assert_allclose(jax.vmap(of_one)(xs), expected, rtol=1e-5, atol=1e-6)
