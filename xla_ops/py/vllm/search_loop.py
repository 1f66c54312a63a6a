"""The search for a filter's threshold, as an HLO loop.

Unrolled, XLA would compile its 32 steps each, and compute in every step the ones before
it again. The loop's count is static, so that XLA:GPU runs it without asking the device.

Tested by tests/engine/test_sampling.py.
"""

from __future__ import annotations

import torch_xla.core.xla_builder as xb
import torch_xla.core.xla_op_registry as xor

_BITS = 32
_MINUS_INF_KEY = 0x007FFFFF  # as in sampling


def _float_of(key: xb.Op) -> xb.Op:
    """The float32 of each s64 rank among all bit patterns: sampling._float_of."""
    signed = key.max(key.scalar_like(_MINUS_INF_KEY)) - key.scalar_like(1 << 31)
    flipped = signed ^ key.scalar_like(0x7FFFFFFF)
    bits = (signed >= key.zeros_like()).select(signed, flipped)
    is_normal = (bits & key.scalar_like(0x7F800000)) != key.zeros_like()
    bits = is_normal.select(bits, key.zeros_like())
    return bits.cast(xb.Type.S32).bitcast(xb.Type.F32)


def _add(a: xb.Op, b: xb.Op) -> xb.Op:
    return a + b


def _going_on(step: xb.Op, *_: xb.Op) -> xb.Op:
    return step < step.scalar_like(_BITS)


def _body(
    step: xb.Op,
    bit: xb.Op,
    key: xb.Op,
    t: xb.Op,
    z: xb.Op,
    counting: xb.Op,
    top: xb.Op,
    target: xb.Op,
) -> xb.Op:
    def across(x: xb.Op) -> xb.Op:
        return x.broadcast_in_dim(z.shape().sizes, [0])

    weight = (z - across(top)).exp()
    weight = (across(counting) > z.zeros_like()).select(z.ones_like(), weight)
    weight = (z >= across(t)).select(weight, z.zeros_like())
    zero = xb.Op.scalar(z.builder(), 0, dtype=xb.Type.F32)
    total = weight.reduce(zero, _add, [1])
    key = (total >= target).select(key + _across(bit, key), key)
    step = step + step.scalar_like(1)
    bit = bit / bit.scalar_like(2)
    t = _float_of(key + _across(bit, key))
    return xb.Op.tuple((step, bit, key, t, z, counting, top, target))


def _across(scalar: xb.Op, like: xb.Op) -> xb.Op:
    return scalar.broadcast_in_dim(like.shape().sizes, [])


def _search(z: xb.Op, counting: xb.Op, top: xb.Op, target: xb.Op) -> xb.Op:
    builder = z.builder()
    step = xb.Op.scalar(builder, 0, dtype=xb.Type.S32)
    bit = xb.Op.scalar(builder, 1 << (_BITS - 1), dtype=xb.Type.S64)
    key = target.zeros_like().cast(xb.Type.S64)
    t = _float_of(key + _across(bit, key))
    state = (step, bit, key, t, z, counting, top, target)
    result = xb.Op.mkwhile(state, _going_on, _body)
    return _float_of(result.get_tuple_element(2))


# [L, V] and three times [L], all float32 -> [L] float32: see sampling._search.
SEARCH = xor.register("sampler_search", _search)
