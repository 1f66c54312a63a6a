"""The references of paged_attention and flash_attn_varlen, and of their gradients
(ops/attention_reference.py and attention_backward_reference.py).

They run where XLA has no handler. So they have to mean what the handlers compute, for
any integers, and to be programs that do not grow with the batch.
"""

import math
import re

import pytest
import torch
import torch_xla
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from support import int32
from xla_ops.core import paged_cache
from xla_ops.core.op import OPS

ABSENT = {
    "cu_seqlens_k": None,
    "seqused_k": None,
    "block_table": None,
    "leftpad_k": None,
    "num_seqs": None,
    "alibi_slopes": None,
    "sinks": None,
    "k_scale": None,
    "v_scale": None,
}
ATTRIBUTES = {
    "scale": 0.25,
    "window_left": -1,
    "window_right": 0,
    "soft_cap": 0.0,
    "kv_cache_dtype": "auto",
    "num_splits": 1,
}


def arguments(query, key, value, cu_seqlens_q, geometry, **options):
    """The functional ops' arguments, in order."""
    options = {**ABSENT, **ATTRIBUTES, **options}
    return (query, key, value, cu_seqlens_q, *options.values(), geometry, False)


def name_of(args) -> str:
    return "flash_attn_varlen" if args[6] is None else "paged_attention"


def decode(num_seqs, num_tokens, heads=8, kv_heads=2, dim=16, page=4):
    """Sequences of up to 2 pages."""
    cache = torch.randn(2, 2 * num_seqs, page, kv_heads, dim)
    strides = [page * kv_heads * dim, kv_heads * dim, dim]
    return arguments(
        torch.randn(num_tokens, heads, dim),
        *cache.unbind(0),
        (torch.arange(num_seqs + 1) * num_tokens // num_seqs).int(),
        [2 * num_seqs, page, kv_heads, dim, *strides, 0, 0],
        seqused_k=torch.randint(1, 2 * page + 1, (num_seqs,), dtype=torch.int32),
        block_table=torch.randperm(2 * num_seqs).int().reshape(num_seqs, 2),
        num_seqs=int32(num_seqs),
    )


def prefill(num_seqs, num_tokens, heads=8, kv_heads=2, dim=16):
    starts = (torch.arange(num_seqs + 1) * num_tokens // num_seqs).int()
    return arguments(
        torch.randn(num_tokens, heads, dim),
        torch.randn(num_tokens, kv_heads, dim),
        torch.randn(num_tokens, kv_heads, dim),
        starts,
        [1, num_tokens, kv_heads, dim, 0, kv_heads * dim, dim, 0, 0],
        cu_seqlens_k=starts,
    )


@st.composite
def batches(draw):
    """Any integers at all, in small sizes."""

    def ints(count, low, high):
        values = st.integers(low, high)
        return int32(*draw(st.lists(values, min_size=count, max_size=count)))

    def perhaps(make):
        return make() if draw(st.booleans()) else None

    draw(st.random_module())
    seqs, tokens = draw(st.integers(0, 6)), draw(st.integers(0, 9))
    kv_heads, group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3]))
    dim, gap = 8, draw(st.sampled_from([0, 1, 8]))  # between heads
    heads = kv_heads * group
    paged = draw(st.booleans())
    blocks, page = (
        (draw(st.integers(0, 4)), 3) if paged else (1, draw(st.integers(0, 9)))
    )
    stride = dim + gap
    order = [kv_heads * stride, stride]  # NHD
    if paged and draw(st.booleans()):
        order = [stride, page * stride]  # HND
    size = blocks * page * kv_heads * stride + gap
    options = {
        "num_seqs": perhaps(lambda: ints(1, -1, seqs + 1)),
        "alibi_slopes": draw(
            st.sampled_from([None, torch.rand(heads), torch.rand(seqs, heads)])
        ),
        "sinks": perhaps(lambda: torch.randn(heads)),
        "window_left": draw(st.sampled_from([-1, 0, 2])),
        "window_right": draw(st.sampled_from([-1, 0, 2])),
        "soft_cap": draw(st.sampled_from([0.0, 3.0])),
        "kv_cache_dtype": draw(st.sampled_from(["auto", "fp8", "fp8_e5m2"])),
    }
    if paged:
        width = draw(st.integers(0, 3))
        options |= {
            "seqused_k": ints(seqs, -1, 3 * width + 2),
            "block_table": ints(seqs * width, -1, blocks).reshape(seqs, width),
        }
    else:
        options |= {
            "cu_seqlens_k": ints(seqs + 1, -2, page + 2),
            "seqused_k": perhaps(lambda: ints(seqs, -1, page + 2)),
            "leftpad_k": perhaps(lambda: ints(seqs, -1, 3)),
        }
    buffers = torch.randn(2, size)
    if options["kv_cache_dtype"] != "auto":
        buffers = buffers.to(paged_cache.FP8[options["kv_cache_dtype"]])
        if draw(st.booleans()):
            buffers = buffers.view(torch.uint8)
        scales = [None, torch.rand(1), torch.rand(seqs, kv_heads)]
        options |= {
            "k_scale": draw(st.sampled_from(scales)),
            "v_scale": draw(st.sampled_from(scales)),
        }
    block_stride = page * kv_heads * stride if paged else 0
    return arguments(
        torch.randn(tokens, heads, dim),
        *buffers.unbind(0),
        ints(seqs + 1, -2, tokens + 2),
        [blocks, page, kv_heads, dim, block_stride, *order, gap, 0],
        **options,
    )


@given(batches())
def test_means_what_the_handler_computes(args):
    op = OPS[name_of(args)]
    for got, wanted in zip(op.reference(*args), op(*args), strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5)


def gradient_of(args):
    """The op that differentiates a call, and its arguments: all that it can give."""
    name = name_of(args)
    *tensors, kv_cache_dtype, _, geometry, _ = args
    query, key, value, *rest = tensors
    is_paged, sinks = args[6] is not None, args[10]
    with torch.no_grad():
        out, lse = OPS[name](*args)
    grads = torch.randn_like(out), torch.randn_like(lse)
    wants_dkv = not is_paged and kv_cache_dtype == "auto"
    given = (grads[0], query, key, value, out, lse, grads[1], *rest)
    wants = (True, wants_dkv, sinks is not None)
    return OPS[f"{name}_backward"], (*given, kv_cache_dtype, geometry, False, *wants)


@given(batches())
def test_gradient_means_what_the_handler_computes(args):
    op, given = gradient_of(args)
    for got, wanted in zip(op.reference(*given), op(*given), strict=True):
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)
        assert torch.allclose(got, wanted, rtol=1e-4, atol=2e-5)


BATCHES = {"decode": decode, "prefill": prefill}


@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("num_seqs", [70, 256])
def test_many_sequences_on_xla(make, num_seqs):
    args = make(num_seqs, 300)
    op = OPS[name_of(args)]
    given = [t.to("xla") if isinstance(t, torch.Tensor) else t for t in args]
    got = op.reference(*given)
    for mine, wanted in zip(got, op(*args), strict=True):
        assert torch.allclose(mine.cpu(), wanted, rtol=1e-4, atol=1e-5)


def program_of(args, op=None) -> list[list[int]]:
    """The shape of each instruction of the reference's HLO."""
    given = [t.to("xla") if isinstance(t, torch.Tensor) else t for t in args]
    torch_xla.sync()
    results = (op or OPS[name_of(args)]).reference(*given)
    hlo = torch_xla._XLAC._get_xla_tensors_hlo(list(results))
    shapes = re.findall(r"^\s+\S+ = \(?\w+\[([\d,]*)\]", hlo, re.MULTILINE)
    return [[int(n) for n in shape.split(",") if n] for shape in shapes]


@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES)
def test_program_does_not_grow_with_the_batch(make):
    few, many = program_of(make(5, 40)), program_of(make(256, 1024))
    assert len(many) <= len(few) + 20  # a constant more here and there
    assert len(many) < 2500


@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES)
def test_program_of_the_gradient_does_not_grow_either(make):
    programs = []
    for sizes in ((5, 40), (128, 512)):
        op, given = gradient_of(make(*sizes))
        programs.append(program_of(given, op))
    few, many = programs
    assert len(many) <= len(few) + 20
    assert len(many) < 4000


@pytest.mark.parametrize("num_seqs, num_tokens", [(1, 512), (16, 512), (128, 128)])
def test_memory(num_seqs, num_tokens):
    """A few times the logits, or the pages of a part of the sequences."""
    heads, kv_heads, dim = 8, 2, 16
    args = prefill(num_seqs, num_tokens, heads, kv_heads, dim)
    largest = max(math.prod(shape) for shape in program_of(args))
    assert largest == num_tokens * heads * num_tokens

    args = decode(num_seqs, num_tokens, heads, kv_heads, dim, page=32)
    largest = max(math.prod(shape) for shape in program_of(args))
    logits = num_tokens * heads * 64
    pages = 2 * num_seqs * 64 * kv_heads * dim
    assert largest <= max(3 * logits, pages // 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_no_sequence_sees_anothers_values(bad):
    for args in (prefill(2, 6), decode(2, 6)):
        *head, value = args[:3]
        op = OPS[name_of(args)]
        wanted, _ = op.reference(*args)
        value = value.clone()
        paged = args[6] is not None
        value[args[6][1].long() if paged else slice(3, 6)] = bad
        got, _ = op.reference(*head, value, *args[3:])
        assert torch.equal(got[:3], wanted[:3])
        assert torch.equal(got[-1], torch.full_like(got[-1], bad)) or (
            math.isnan(bad) and got[-1].isnan().all()
        )


@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES)
def test_symbolic_tokens(make):
    """Traced once, it serves another number of tokens."""
    args = make(3, 7)
    op = OPS[name_of(args)]

    def attend(query):
        return op.reference(query, *args[1:])

    shapes = ShapeEnv()
    with FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True):
        graph = make_fx(attend, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
            args[0]
        )
    (query,) = (node for node in graph.graph.nodes if node.op == "placeholder")
    assert isinstance(query.meta["val"].shape[0], torch.SymInt)
    other = torch.randn(11, *args[0].shape[1:])
    for mine, wanted in zip(graph(other), attend(other), strict=True):
        assert torch.equal(mine, wanted)
