"""Inputs of a compiled function that are views, made outside of it, of one tensor.

Torch makes such inputs anew of their tensor where the function updates one, at offsets
that XLA tensors do not report: without an error the others would be read elsewhere.
"""

import pytest
import torch
import torch_xla

import xla_ops
from support import Path, addresses
from xla_ops.core import in_place

BACKENDS = pytest.mark.parametrize("name", ["compiled", "dispatched"])
IDS, SLOTS = torch.tensor([1, 2]), torch.tensor([0, 5])
OPS = torch.ops.xla_ops


def to_heads(qkv, q_weight, k_weight, cos_sin_cache):
    xla_ops.fused_qk_norm_rope(
        *(qkv, 2, 1, 1, 8, 1e-6, q_weight, k_weight, cos_sin_cache, True),
        IDS.to(qkv.device),
    )


def to_cache(qkv, cos_sin_cache, key_cache, value_cache):
    xla_ops.fused_qk_norm_rope_and_cache(
        *(qkv, 2, 1, 8, 1e-6, None, None, cos_sin_cache, True),
        *(IDS.to(qkv.device), key_cache, value_cache, SLOTS.to(qkv.device)),
    )


def write(key, key_cache, value_cache):
    slots = SLOTS.to(key.device)
    xla_ops.reshape_and_cache_flash(key, key, key_cache, value_cache, slots)


def rotate(query, key, cos_sin_cache):
    OPS.rotary_embedding(IDS.to(query.device), query, key, 8, cos_sin_cache, True)


def normalise(result, input, weight):
    OPS.rms_norm(result, input, weight, 1e-6)


def add_and_normalise(input, residual, weight):
    OPS.fused_add_rms_norm(input, residual, weight, 1e-6)


def penalise(logits, repetition_penalties):
    mask = logits > 0
    xla_ops.apply_repetition_penalties_(logits, mask, mask, repetition_penalties)


SHAPES = {
    to_heads: ((2, 32), (8,), (8,), (9, 8)),
    to_cache: ((2, 32), (9, 8), (4, 4, 1, 8), (4, 4, 1, 8)),
    write: ((2, 1, 8), (4, 4, 1, 8), (4, 4, 1, 8)),
    rotate: ((2, 16), (2, 8), (9, 8)),
    normalise: ((2, 16), (2, 16), (16,)),
    add_and_normalise: ((2, 16), (2, 16), (16,)),
    penalise: ((2, 16), (2,)),
}
# Which arguments are parts of one tensor, and the one that the error names.
PARTS = [
    (to_heads, (0, 1), "q_weight"),
    (to_heads, (0, 3), "cos_sin_cache"),
    (to_cache, (0, 2), "qkv"),
    (to_cache, (0, 3), "qkv"),
    (to_cache, (2, 3), "value_cache"),
    (to_cache, (1, 2), "cos_sin_cache"),
    (write, (0, 1), "key"),
    (write, (1, 2), "value_cache"),
    (rotate, (0, 1), "key"),
    (rotate, (1, 2), "cos_sin_cache"),
    (normalise, (0, 1), "input"),
    (normalise, (0, 2), "weight"),
    (add_and_normalise, (0, 1), "residual"),
    (penalise, (0, 1), "repetition_penalties"),
]


def arguments(op, parts, arena):
    """Each a tensor of its own, but for those that are parts of `arena`."""
    generator, start, made = torch.Generator().manual_seed(1), 8, []
    for i, shape in enumerate(SHAPES[op]):
        size = torch.Size(shape).numel()
        if i in parts:
            made.append(arena[start : start + size].view(shape))
            start += size + 8
        else:
            made.append(torch.randn(shape, generator=generator).to(arena.device))
    return made


@BACKENDS
@pytest.mark.parametrize("op, parts, argument", PARTS)
def test_parts_of_one_tensor_are_refused(name, op, parts, argument):
    arena = torch.randn(400)
    path = Path(name)
    given = path.put(arena)
    with pytest.raises(Exception) as error:
        path.function(op)(*arguments(op, parts, given))
    assert f": {argument} must not be a view, made outside the comp" in str(error.value)
    assert torch.equal(given.cpu(), arena)


@pytest.mark.parametrize("op, parts, argument", PARTS)
def test_parts_of_one_tensor_lazily(op, parts, argument):
    wanted = torch.randn(400)
    arena = Path("lazy").put(wanted)
    for tensor in (wanted, arena):
        op(*arguments(op, parts, tensor))
    torch.testing.assert_close(arena.cpu(), wanted)


@BACKENDS
def test_a_part_that_other_operations_read(name):
    def step(cache, part, key):
        write(key, *cache.unbind(0))
        return part.sum()

    path = Path(name)
    cache, key = path.put([torch.randn(2, 4, 4, 1, 8), torch.randn(2, 1, 8)])
    text = "reshape_and_cache_flash: an input must not be a view, made outside the comp"
    with pytest.raises(Exception, match=text):
        path.function(step)(cache, cache[1], key)


@BACKENDS
def test_a_part_that_our_op_reads_where_torch_updates(name):
    def step(x, part):
        x.add_(1)
        return xla_ops.paged_attention(
            *(torch.ones(1, 1, 8, device=x.device), part),
            *(torch.tensor(n, dtype=torch.int32, device=x.device) for n in batch),
            0.2,
        )

    batch = ([3], [[0]], [0, 1], [1])
    path = Path(name)
    x = path.put(torch.randn(3, 2, 2, 4, 1, 8))
    text = "paged_attention: kv_cache must not be a view, made outside the comp"
    with pytest.raises(Exception, match=text):
        path.function(step)(x, x[1])


def test_torchs_own_updates():
    """Of openxla they give wrong values."""

    def step(x, part):
        x.add_(1)
        return part * 2

    x = Path("lazy").put(torch.randn(3, 4))
    with pytest.raises(Exception, match="xla_ops: an input must not be a view, made o"):
        torch.compile(step, backend="xla_ops")(x, x[1])


@BACKENDS
def test_a_function_that_is_differentiated(name):
    """Whose graph AOTAutograd traces in another way."""

    def step(cache, part, key, weight):
        write(key, *cache.unbind(0))
        return part.sum() * weight

    path = Path(name)
    shapes = ((2, 4, 4, 1, 8), (2, 1, 8), (3,))
    cache, key, weight = path.put([torch.randn(shape) for shape in shapes])
    weight.requires_grad_()
    text = "must not be a view, made outside the comp"
    with torch.enable_grad(), pytest.raises(Exception, match=text):
        path.function(step)(cache, cache[1], key, weight)


@BACKENDS
def test_a_part_that_a_functional_op_reads(name):
    def step(x, part, weight):
        x.add_(1)
        return xla_ops.rms_norm(part, weight, 1e-6)

    path = Path(name)
    x, weight = path.put([torch.randn(3, 8), torch.ones(8)])
    text = "rms_norm: input must not be a view, made outside the comp"
    with pytest.raises(Exception, match=text):
        path.function(step)(x, x[1:2], weight)


@pytest.mark.parametrize("is_differentiated", [False, True])
def test_views_of_other_values_are_let_be(is_differentiated):
    """Functionalization makes those anew too, by the same operation."""

    def step(x, weight):
        whole = x + 1
        view = whole.as_strided((2, 2), (2, 1), 1)
        whole.add_(1)
        return view * weight

    given = torch.randn(2, 3), torch.ones(2)
    x, weight = Path("lazy").put([t.clone() for t in given])
    weight.requires_grad_(is_differentiated)
    with torch.set_grad_enabled(is_differentiated):
        got = torch.compile(step, backend="xla_ops")(x, weight)
    assert torch.equal(got.detach().cpu(), step(*given))


@BACKENDS
def test_a_lone_part_is_copied_with_a_warning(name):
    path = Path(name)
    wanted = torch.randn(2, 4, 4, 1, 8), torch.randn(2, 4, 4, 1, 8)
    first, second, key = path.put([*wanted, torch.ones(2, 1, 8)])
    in_place._tell_of_outer_views.cache_clear()
    step = path.function(write)
    with pytest.warns(UserWarning, match="copies the whole tensor that it is a view"):
        step(key, first[1], second[0])
    write(torch.ones(2, 1, 8), wanted[0][1], wanted[1][0])
    assert torch.equal(first.cpu(), wanted[0])
    assert torch.equal(second.cpu(), wanted[1])


def test_views_taken_inside_in_inference_mode():
    """Of tensors made outside, for operations of any kind; openxla cannot take them."""

    def step(cache, x, weight, key):
        before = cache[0, 1].sum()
        write(key, *cache.unbind(0))
        OPS.rms_norm(x[0], x[1] + cache[1, 2, 0, 0].sum(), weight, 1e-6)
        return before, cache[1, 0, 0] + 0

    wanted = [torch.randn(s) for s in ((2, 4, 4, 1, 8), (3, 16), (16,), (2, 1, 8))]
    given = Path("lazy").put([t.clone() for t in wanted])
    before = addresses(given[:1])
    run = torch.compile(step, backend="xla_ops", fullgraph=True)
    for _ in range(3):
        expected = step(*wanted)
        with torch.inference_mode():
            results = run(*given)
            assert addresses(given[:1]) == before
            torch_xla.sync()
        for got, want in zip((*results, *given), (*expected, *wanted), strict=True):
            torch.testing.assert_close(got.cpu(), want)
