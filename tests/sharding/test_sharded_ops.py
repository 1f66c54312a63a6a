"""Each op, split in each dimension of each operand: right without a word between
devices, or refused by name."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch_xla.distributed import spmd as xs

import xla_ops
from sharded import compiled, put, run, tiles_of
from support import int32
from xla_ops.core.op import OPS

OP = torch.ops.xla_ops
TOKENS, HEADS, KV_HEADS, DIM = 8, 8, 4, 16


def floats(*shape):
    return torch.randn(*shape)


def positions():
    return torch.randint(0, 32, (TOKENS,))


def attention(**more):
    """flash_attn_varlen of two sequences."""
    starts = torch.tensor([0, 3, TOKENS], dtype=torch.int32)

    def call(q, k, v, starts, *extra):
        named = dict(zip(more, extra, strict=True))
        return xla_ops.flash_attn_varlen(
            q, k, v, starts, starts, 5, 5, is_causal=True, **named
        )

    q, k, v = (floats(TOKENS, n, DIM) for n in (HEADS, KV_HEADS, KV_HEADS))
    return call, [q, k, v, starts, *more.values()]


def attention_gradient():
    """Of flash_attn_varlen, all that it has."""
    starts = torch.tensor([0, 3, TOKENS], dtype=torch.int32)
    q, k, v = (floats(TOKENS, n, DIM) for n in (HEADS, KV_HEADS, KV_HEADS))
    sinks = floats(HEADS)
    with torch.no_grad():
        out, lse = xla_ops.flash_attn_varlen(q, k, v, starts, starts, 5, 5, sinks=sinks)
    geometry = [1, TOKENS, KV_HEADS, DIM, 0, KV_HEADS * DIM, DIM, 0, 0]

    def call(grad_out, q, k, v, out, lse, grad_lse, starts, sinks):
        return OP.flash_attn_varlen_backward(
            *(grad_out, q, k, v, out, lse, grad_lse, starts, starts),
            *(None, None, None, None, None, sinks, None, None),
            *(DIM**-0.5, -1, -1, 0.0, "auto", geometry, False, True, True, True),
        )

    grads = floats(TOKENS, HEADS, DIM), floats(HEADS, TOKENS)
    return call, [grads[0], q, k, v, out, lse, grads[1], starts, sinks]


def prepare(qkv, key_cache, value_cache, *rest):
    """fused_qk_norm_rope_and_cache of whole caches of four pages of four tokens."""
    geometry = [4, 4, KV_HEADS, DIM, 4 * KV_HEADS * DIM, KV_HEADS * DIM, DIM, 0, 0]
    return OP.fused_qk_norm_rope_and_cache_both(
        *(qkv, key_cache, value_cache, *rest, None, None, HEADS, KV_HEADS, DIM),
        *(1e-6, True, "auto", geometry, False, None, None),
    )


def prepare_and_attend(qkv, kv_cache, *rest):
    """fused_qk_norm_rope_and_paged_attention of a stacked cache of such pages."""
    *prepared, lens, tables, starts, count = rest
    size = 4 * 4 * KV_HEADS * DIM
    geometry = [4, 4, KV_HEADS, DIM, size // 4, KV_HEADS * DIM, DIM, 0, size]
    return OP.fused_qk_norm_rope_and_paged_attention_stacked(
        *(qkv, kv_cache, *prepared, None, None, lens, tables, starts, count),
        *(None, None, HEADS, KV_HEADS, DIM, 1e-6, True, "auto", geometry),
        *(0.25, -1, 0.0, False, None),
    )


# name -> (function of tensors, tensors), the (operand, dimension)s that may be split
# and, for each, how the results are: which dimension of each; None: whole.
def cases():
    rows = (floats(TOKENS, 32), floats(32))
    per_token = {(0, 0): (0, 0)}
    columns = {(0, 0): (0,), (0, 1): (1,)}
    one = torch.tensor([0.5])
    q, k = floats(TOKENS, HEADS * DIM), floats(TOKENS, KV_HEADS * DIM)
    table = floats(32, DIM)
    heads = {(0, 1): (1, 0), (1, 1): (1, 0), (2, 1): (1, 0)}
    lse = floats(HEADS, TOKENS)
    outs = floats(TOKENS, HEADS, DIM)
    merged = {(0, 0): (0, 1), (0, 1): (1, 0), (1, 0): (1, 0), (1, 1): (0, 1)}
    mask = torch.rand(TOKENS, 32) < 0.3
    logits = {(i, d): (d,) for i in range(3) for d in range(2)}
    return {
        "rms_norm": (xla_ops.rms_norm, rows, {(0, 0): (0,)}),
        "rms_norm of 3 dimensions": (
            xla_ops.rms_norm,
            (floats(4, 8, 32), floats(32)),
            {(0, 0): (0,), (0, 1): (1,)},
        ),
        "rms_norm_backward": (
            # As many parts as there are rows: each is one row's.
            lambda *a: OP.rms_norm_backward(*a, 1e-6, [TOKENS]),
            (rows[0], floats(TOKENS, 32), rows[1], floats(TOKENS, 32)),
            {(i, 0): (0, 0) for i in (0, 1, 3)},
        ),
        "rms_norm_backward of 3 dimensions": (
            lambda g, x, w: OP.rms_norm_backward(g, x, w, None, 1e-6, [4, 8]),
            (floats(4, 8, 32), floats(4, 8, 32), floats(32)),
            {(i, d): (d, d) for i in range(2) for d in range(2)},
        ),
        "rms_norm_backward of input": (
            lambda g, x, w: OP.rms_norm_backward_input(g, x, w, None, 1e-6),
            (rows[0], floats(TOKENS, 32), rows[1]),
            {(0, 0): (0,), (1, 0): (0,)},
        ),
        "fused_add_rms_norm": (
            lambda x, r, w: OP.fused_add_rms_norm_functional(x, r, w, 1e-6),
            (rows[0], floats(TOKENS, 32), rows[1]),
            {(0, 0): (0, 0), (1, 0): (0, 0)},
        ),
        "rms_norm_static_fp8_quant": (
            lambda *a: OP.rms_norm_static_fp8_quant(*a, 1e-6).float(),
            (*rows, one),
            {(0, 0): (0,)},
        ),
        "fused_add_rms_norm_static_fp8_quant": (
            lambda *a: OP.fused_add_rms_norm_static_fp8_quant(*a, 1e-6)[1],
            (rows[0], floats(TOKENS, 32), rows[1], one),
            {(0, 0): (0,), (1, 0): (0,)},
        ),
        "rms_norm_dynamic_per_token_quant": (
            lambda x, w: OP.rms_norm_dynamic_per_token_quant(
                x, w, torch.int8, 1e-6, None
            ),
            rows,
            per_token,
        ),
        "fused_add_rms_norm_dynamic_per_token_quant": (
            lambda x, r, w: OP.fused_add_rms_norm_dynamic_per_token_quant(
                x, r, w, torch.int8, 1e-6, None
            ),
            (floats(4, 2, 32), floats(4, 2, 32), rows[1]),
            {(0, 0): (0, 0, 0), (1, 0): (0, 0, 0)},
        ),
        "static_scaled_fp8_quant": (
            lambda x, s: OP.static_scaled_fp8_quant(x, s).float(),
            (rows[0], one),
            columns,
        ),
        "dynamic_scaled_fp8_quant": (OP.dynamic_scaled_fp8_quant, rows[:1], {}),
        "dynamic_per_token_scaled_fp8_quant": (
            lambda x: OP.dynamic_per_token_scaled_fp8_quant(x, None)[1],
            rows[:1],
            {(0, 0): (0,)},
        ),
        "static_scaled_int8_quant": (
            lambda x, s: OP.static_scaled_int8_quant(x, s, None),
            (rows[0], one),
            columns,
        ),
        "dynamic_scaled_int8_quant": (
            OP.dynamic_scaled_int8_quant,
            rows[:1],
            per_token,
        ),
        "dynamic_scaled_int8_azp_quant": (
            OP.dynamic_scaled_int8_azp_quant,
            rows[:1],
            {(0, 0): (0, 0, 0)},
        ),
        "silu_and_mul": (xla_ops.silu_and_mul, rows[:1], {(0, 0): (0,)}),
        "mul_and_silu": (xla_ops.mul_and_silu, rows[:1], {(0, 0): (0,)}),
        "gelu_and_mul": (xla_ops.gelu_and_mul, rows[:1], {(0, 0): (0,)}),
        "gelu_tanh_and_mul": (xla_ops.gelu_tanh_and_mul, rows[:1], {(0, 0): (0,)}),
        "silu_and_mul_quant": (
            lambda x, s: OP.silu_and_mul_quant(x, s).float(),
            (rows[0], one),
            {(0, 0): (0,)},
        ),
        "fatrelu_and_mul": (
            lambda x: xla_ops.fatrelu_and_mul(x, 0.5),
            rows[:1],
            {(0, 0): (0,)},
        ),
        "swigluoai_and_mul": (xla_ops.swigluoai_and_mul, rows[:1], columns),
        "activation_backward": (
            lambda g, x: OP.activation_backward(g, x, "silu_and_mul", 0, 0, 0),
            (floats(TOKENS, 16), rows[0]),
            {(0, 0): (0,), (1, 0): (0,)},
        ),
        "activation_backward of pairs": (
            lambda g, x: OP.activation_backward(g, x, "swigluoai_and_mul", 0, 1, 7),
            (floats(TOKENS, 16), rows[0]),
            {(i, d): (d,) for i in range(2) for d in range(2)},
        ),
        "activation_backward without a gate": (
            lambda g, x: OP.activation_backward(g, x, "gelu_new", 0, 0, 0),
            (floats(TOKENS, 32), rows[0]),
            {(i, d): (d,) for i in range(2) for d in range(2)},
        ),
        "gelu_new": (xla_ops.gelu_new, rows[:1], columns),
        "gelu_fast": (xla_ops.gelu_fast, rows[:1], columns),
        "gelu_quick": (xla_ops.gelu_quick, rows[:1], columns),
        "rotary_embedding": (
            lambda p, q, k, c: xla_ops.rotary_embedding(p, q, k, DIM, c),
            (positions(), q, k, table),
            {
                (0, 0): (0, 0),
                (1, 0): (0, 0),
                (1, 1): (1, 1),
                (2, 0): (0, 0),
                (2, 1): (1, 1),
            },
        ),
        "rotary_embedding of heads": (
            lambda p, q, c: xla_ops.rotary_embedding(p, q, None, DIM, c)[0],
            (positions(), q.view(TOKENS, HEADS, DIM), table),
            {(0, 0): (0,), (1, 0): (0,), (1, 1): (1,)},
        ),
        "merge_attn_states": (
            xla_ops.merge_attn_states,
            (outs, lse, floats(TOKENS, HEADS, DIM), lse + 0.5),
            merged | {(i + 2, d): how for (i, d), how in merged.items()},
        ),
        "merge_attn_states_backward": (
            OP.merge_attn_states_backward,
            (outs, lse, floats(TOKENS, HEADS, DIM), lse + 1, outs + 1, lse + 0.5),
            {(i + n, d): how * 2 for n in (0, 2, 4) for (i, d), how in merged.items()},
        ),
        "grouped_matmul": (
            xla_ops.grouped_matmul,
            (floats(8, 32), floats(4, 16, 32), torch.tensor([0, 2, 4, 6, 8]).int()),
            {(1, 1): (1,)},
        ),
        "grouped_matmul_backward_weight": (
            OP.grouped_matmul_backward_weight,
            (floats(8, 16), floats(8, 32), torch.tensor([0, 2, 4, 6, 8]).int()),
            {(0, 1): (1,)},
        ),
        "linear": (
            xla_ops.linear,
            (floats(TOKENS, 32), floats(16, 32), floats(16)),
            {(0, 0): (0,), (1, 0): (1,), (2, 0): (1,)},
        ),
        "convert_fp8": (
            lambda x: OP.convert_fp8_functional(x, 0.5, "fp8", torch.uint8),
            rows[:1],
            columns,
        ),
        "apply_repetition_penalties_": (
            lambda *a: OP.apply_repetition_penalties_functional(*a, None),
            (rows[0], mask, ~mask, torch.rand(TOKENS) + 0.5),
            logits | {(3, 0): (0,)},
        ),
        "fused_qk_norm_rope": (
            lambda qkv, wq, wk, c, p: OP.fused_qk_norm_rope_functional(
                qkv, HEADS, KV_HEADS, KV_HEADS, DIM, 1e-6, wq, wk, c, True, p, None
            ),
            (
                floats(TOKENS, (HEADS + 2 * KV_HEADS) * DIM),
                floats(DIM),
                floats(DIM),
                table,
                positions(),
            ),
            {(0, 0): (0,), (4, 0): (0,)},
        ),
        # Nothing of it: a row has all heads, and each device sees all tokens.
        "fused_qk_norm_rope_and_cache": (
            prepare,
            (
                floats(TOKENS, (HEADS + 2 * KV_HEADS) * DIM),
                *(floats(4, 4, KV_HEADS, DIM), floats(4, 4, KV_HEADS, DIM)),
                *(floats(DIM), floats(DIM), table, positions(), torch.arange(TOKENS)),
            ),
            {},
        ),
        "fused_qk_norm_rope_and_paged_attention": (
            prepare_and_attend,
            (
                floats(TOKENS, (HEADS + 2 * KV_HEADS) * DIM),
                floats(2, 4, 4, KV_HEADS, DIM),
                *(floats(DIM), floats(DIM), table, positions(), torch.arange(TOKENS)),
                *(int32(TOKENS), int32([0, 1, 2, 3]), int32(0, TOKENS), int32(1)),
            ),
            {},
        ),
        "flash_attn_varlen": (*attention(), heads),
        "flash_attn_varlen differentiated": (
            *attention_gradient(),
            dict.fromkeys(
                [*((i, 1) for i in range(5)), (5, 0), (6, 0), (8, 0)], (1, 1, 1, 0)
            ),
        ),
        "flash_attn_varlen with sinks": (
            *attention(sinks=floats(HEADS)),
            heads | {(4, 0): (1, 0)},
        ),
        "flash_attn_varlen with slopes": (
            *attention(alibi_slopes=torch.rand(2, HEADS)),
            heads | {(4, 1): (1, 0)},
        ),
    }


NAMES = list(cases())

# Tested by test_sharded_caches.py, their keys and values being in caches.
_WITH_CACHES = {
    "paged_attention",
    "paged_attention_backward",
    "copy_blocks_one",
    "swap_blocks_functional",
    "fused_qk_norm_rope_and_cache_stacked",
    *(
        f"reshape_and_cache{f}_{n}"
        for f in ("", "_flash")
        for n in ("both", "one", "stacked")
    ),
}


def test_every_op_says_what_may_be_split():
    """And every one is tried here."""
    assert not [name for name, op in OPS.items() if op.splits is None]
    tried = {op.public_name for name, op in OPS.items() if name not in _WITH_CACHES}
    tried |= {
        "dynamic_scaled_int8_azp_quant",
        "fused_add_rms_norm_dynamic_per_token_quant",
    }
    assert tried == {name.partition(" ")[0] for name in NAMES}


def split(shape_len, dim):
    return tuple("tp" if i == dim else None for i in range(shape_len))


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


def close(result, wanted):
    if wanted.dtype in (torch.int8, torch.uint8, torch.int32):
        assert torch.equal(result, wanted)
    else:
        torch.testing.assert_close(result, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_each_dimension(name, mesh, hlo_dump):
    """A split that is allowed gives one device's values, split as the results should
    be, and no collective; each other one an error that names operand and dimension."""
    function, tensors, allowed = cases()[name]
    expected = as_tuple(function(*tensors))
    for i, t in enumerate(tensors):
        for dim in range(t.dim()):
            given = [put(x) for x in tensors]
            given[i] = put(t, mesh, split(t.dim(), dim))
            if (i, dim) not in allowed:
                with pytest.raises(ValueError, match=f"must .*dimension {dim}.*got"):
                    function(*given)
                continue
            with compiled(hlo_dump) as programs:
                results = as_tuple(function(*given))
            assert len(programs.texts) == 1
            assert not programs.collectives
            for result, wanted, place in zip(
                results, expected, allowed[i, dim], strict=True
            ):
                assert tiles_of(result) == [
                    4 if d == place else 1 for d in range(wanted.dim())
                ]
                close(result.cpu(), wanted)


@hypothesis.given(
    name=st.sampled_from([n for n in NAMES if len(cases()[n][2]) > 1]),
    data=st.data(),
    how=st.sampled_from(["lazy", "openxla", "xla_ops", "replay"]),
    seed=st.random_module(),
)
@hypothesis.settings(
    max_examples=40,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_two_axes(grid, name, data, how, seed):
    """Two operands or dimensions at once, over a grid: right, or refused by name."""
    function, tensors, allowed = cases()[name]
    expected = as_tuple(function(*tensors))
    specs = [[None] * t.dim() for t in tensors]
    for axis in ("dp", "tp"):
        i, dim = data.draw(st.sampled_from(sorted(allowed)))
        if specs[i][dim] is None:
            specs[i][dim] = axis
    given = [
        put(t, grid, tuple(spec) if any(spec) else None)
        for t, spec in zip(tensors, specs, strict=True)
    ]
    torch._dynamo.reset()
    try:
        results = as_tuple(run(how, function)(*given))
    except Exception as error:  # noqa: BLE001 - dynamo wraps what the op raises
        text = str(error)
        assert "must be split" in text
        assert "got" in text
        return
    for result, wanted in zip(results, expected, strict=True):
        close(result.cpu(), wanted)


@pytest.mark.parametrize(
    "heads, kv_heads, split_operand, named",
    [(6, 6, 0, "query|q"), (8, 2, 0, "key|k"), (4, 1, 0, "key|k"), (8, 2, 1, "key|k")],
)
def test_heads_that_cannot_be_shared_out(heads, kv_heads, split_operand, named, mesh):
    q, k = floats(TOKENS, heads, DIM), floats(TOKENS, kv_heads, DIM)
    starts = put(torch.tensor([0, TOKENS]).int())
    given = [q, k, k]
    given = [
        put(t, mesh, (None, "tp", None)) if i == split_operand else put(t)
        for i, t in enumerate(given)
    ]
    message = f"({named}) must have in dimension 1 a number of heads that 4 divides"
    with pytest.raises(ValueError, match=message):
        xla_ops.flash_attn_varlen(*given, starts, starts, TOKENS, TOKENS)


def test_manual_mode_is_left_alone(mesh):
    """Between enable_ and disable_manual_sharding, operands are shards already."""
    from torch_xla.distributed import spmd as xs

    x, w = floats(TOKENS, 32), floats(32)
    shard = xs.enable_manual_sharding(put(x), ("tp", None), mesh=mesh).global_tensor
    weight = xs.enable_manual_sharding(put(w), (None,), mesh=mesh).global_tensor
    result = xla_ops.rms_norm(shard, weight)
    assert result.shape == (TOKENS // 4, 32)
    whole = xs.disable_manual_sharding(result, ("tp", None), x.shape, mesh=mesh)
    close(whole.global_tensor.cpu(), xla_ops.rms_norm(x, w))


def test_what_mark_sharding_returns_is_refused(mesh):
    """It is not the tensor; and a KV cache of it could not be written."""
    from torch_xla.distributed import spmd as xs

    x = xs.mark_sharding(put(floats(TOKENS, 32)), mesh, ("tp", None))
    message = "input must be the tensor that was given to xs.mark_sharding"
    with pytest.raises(ValueError, match=f"rms_norm: {message}"):
        xla_ops.rms_norm(x, put(floats(32)))
    xla_ops.rms_norm(x.global_tensor, put(floats(32)))
    spec = (None, None, "tp", None)
    caches = [xs.mark_sharding(put(floats(4, 4, 4, 8)), mesh, spec) for _ in "kv"]
    rows, slots = put(floats(2, 4, 8)), put(torch.tensor([0, 5]))
    message = "reshape_and_cache_flash: key_cache must be the tensor that was given"
    with pytest.raises(ValueError, match=message):
        xla_ops.reshape_and_cache_flash(rows, rows, *caches, slots)


def test_operands_split_in_two_ways(mesh, grid):
    x = put(floats(TOKENS, 32), mesh, ("tp", None))
    r = put(floats(TOKENS, 32), grid, ("dp", None))
    with pytest.raises(
        ValueError, match="residual must be split in tokens as input is"
    ):
        xla_ops.fused_add_rms_norm(x, r, put(floats(32)))


def test_what_is_computed_from_sharded_tensors_must_say_it(mesh, hlo_dump):
    """By `sharding`, or by an operand beside it; a value from whole ones need not."""
    x, w = floats(TOKENS, 32), floats(32)
    rows, weight = put(x, mesh, ("tp", None)), put(w)
    message = "rms_norm: input must say how it is split: .*sharding.*tokens"
    with pytest.raises(ValueError, match=message):
        xla_ops.rms_norm(rows * 2, weight)
    with (
        compiled(hlo_dump) as programs,
        xla_ops.sharding(mesh, tokens="tp"),
    ):
        result = xla_ops.rms_norm(rows * 2, weight)
    assert tiles_of(result) == [4, 1]
    assert not programs.collectives
    close(result.cpu(), xla_ops.rms_norm(x * 2, w))
    again = xla_ops.rms_norm(result, weight)  # results say it
    assert tiles_of(again) == [4, 1]
    beside = xla_ops.fused_add_rms_norm(rows * 2, rows, weight)[0]
    assert tiles_of(beside) == [4, 1]
    whole = xla_ops.rms_norm(put(x) * 2, weight)
    close(whole.cpu(), xla_ops.rms_norm(x * 2, w))


def test_what_is_computed_from_a_value_that_was_split_on_the_way(mesh):
    """As inputs do: a lazy tensor that is marked, a result that `sharding` split."""
    x, weight = floats(TOKENS, 32), put(floats(32))
    marked = put(x) * 2
    xs.mark_sharding(marked, mesh, ("tp", None))
    with xla_ops.sharding(mesh, tokens="tp"):
        result = xla_ops.rms_norm(put(x), weight)
    assert tiles_of(result) == [4, 1]
    for value in (marked, result):
        with pytest.raises(ValueError, match="input must say how it is split"):
            xla_ops.rms_norm(value + 1, weight)
    # Replicated over all devices, by whatever words.
    grid = xs.Mesh(list(range(4)), (1, 4), ("dp", "tp"))
    whole = put(x) * 2
    xs.mark_sharding(whole, grid, ("dp", None))
    close(
        xla_ops.rms_norm(whole + 1, weight).cpu(),
        xla_ops.rms_norm(x * 2 + 1, weight.cpu()),
    )


def test_a_cached_decision_does_not_hide_a_value_that_says_nothing(mesh):
    """The same shapes and shardings, of data first and then of a computed value."""
    outs, lse = floats(TOKENS, HEADS, DIM), floats(HEADS, TOKENS)
    split_outs = put(outs, mesh, (None, "tp", None))
    xla_ops.merge_attn_states(split_outs, put(lse), put(outs), put(lse))
    with pytest.raises(ValueError, match="suffix_output must say how it is split"):
        xla_ops.merge_attn_states(split_outs, put(lse), split_outs * 2, put(lse))


@pytest.mark.parametrize(
    "given, message",
    [
        ({"heads": "dp"}, "heads must be one of .*'tp'.*, got 'dp'"),
        ({"heads": 3}, "heads must be one of .*, got 3"),
    ],
)
def test_axes_that_are_not_there(given, message, mesh):
    with pytest.raises(ValueError, match=message), xla_ops.sharding(mesh, **given):
        pass


def test_sharding_needs_a_mesh():
    with pytest.raises(ValueError, match="mesh must be given"), xla_ops.sharding():
        pass


def test_declared_against_the_rule(mesh):
    """What cannot be split raises where `sharding` says that it is."""
    x = put(floats(TOKENS, 32), mesh, ("tp", None)) * 2
    with (
        xla_ops.sharding(mesh, columns="tp"),
        pytest.raises(ValueError, match="input must be whole in dimension 1 .columns"),
    ):
        xla_ops.silu_and_mul(x)
    with (
        xla_ops.sharding(mesh, tokens=None),
        pytest.raises(ValueError, match="input must be split in tokens as sharding"),
    ):
        xla_ops.rms_norm(put(floats(TOKENS, 32), mesh, ("tp", None)), put(floats(32)))
