"""xla_ops.ops.fused_qk_norm_rope_and_paged_attention: to the bit the two ops."""

import doctest
import importlib

import pytest
import torch
import torch_xla
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from support import addresses, copies_of, int32, programs_with
from xla_ops.core.op import OPS

NAME = "fused_qk_norm_rope_and_paged_attention"
module = importlib.import_module(f"xla_ops.ops.{NAME}")
joint = module.fused_qk_norm_rope_and_paged_attention
PAGE, BLOCKS = 4, 12
FP8 = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def apart(*args, **features):
    """The two ops, one after the other."""
    *write, context_lens, block_tables, starts, num_seqs, scale, window, cap = args
    fp8 = {n: features[n] for n in ("kv_cache_dtype", "k_scale", "v_scale")}
    query = xla_ops.fused_qk_norm_rope_and_cache(*write, **fp8)
    batch = (context_lens, block_tables, starts, num_seqs)
    return xla_ops.paged_attention(
        query, [*write[10:12]], *batch, scale, window, cap, **features
    )


def case(
    new=(1, 3, 1),
    lengths=(6, 3, 9),
    heads=4,
    kv_heads=2,
    dim=16,
    dtype=torch.float32,
    *,
    padding=0,
    weights=True,
    is_neox=True,
    cache_dtype="auto",
    window=None,
    cap=None,
    alibi=False,
    sinks=False,
    hnd=False,
    seed=0,
):
    """Tensors by name, and the rest of the arguments, of sequences of `lengths` tokens,
    the last `new` of which are; rows of padding go nowhere."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    rows, seqs = sum(new), len(new)
    blocks = torch.randperm(BLOCKS, generator=generator).tolist()
    tables = [[blocks.pop() for _ in range(-(-n // PAGE))] for n in lengths]
    positions, slots = [], []
    for count, length, table in zip(new, lengths, tables, strict=True):
        for position in range(length - count, length):
            positions.append(position)
            slots.append(table[position // PAGE] * PAGE + position % PAGE)
    width = max(map(len, tables), default=1)
    tables = [table + [-1] * (width - len(table)) for table in tables]
    shape = (BLOCKS, kv_heads, PAGE, dim) if hnd else (BLOCKS, PAGE, kv_heads, dim)
    kv = random(2, *shape)
    if cache_dtype != "auto":
        kv = kv.to(FP8[cache_dtype]).view(torch.uint8)
    starts = [sum(new[:i]) for i in range(seqs + 1)]
    tensors = {
        "qkv": random(rows + padding, (heads + 2 * kv_heads) * dim),
        "q_weight": random(dim) if weights else None,
        "k_weight": random(dim) if weights else None,
        "table": random(max(lengths, default=1), dim),
        "positions": torch.tensor(positions + [0] * padding),
        "kv": kv,
        "slots": torch.tensor(slots + [-1] * padding),
        "context_lens": int32(*lengths),
        "block_tables": int32(*tables).reshape(seqs, width),
        "starts": int32(*starts),
        "num_seqs": int32(seqs),
        "alibi_slopes": random(heads).float() if alibi else None,
        "sinks": random(heads) if sinks else None,
        "k_scale": torch.tensor([0.5]) if cache_dtype != "auto" else None,
        "v_scale": torch.tensor([2.0]) if cache_dtype != "auto" else None,
    }
    sizes = (heads, kv_heads, dim, 1e-5)
    return tensors, sizes, is_neox, (dim**-0.5, window, cap), cache_dtype, hnd


def call(op, made, tensors):
    _, sizes, is_neox, how, cache_dtype, hnd = made
    kv = tensors["kv"].transpose(2, 3) if hnd else tensors["kv"]
    names = ("context_lens", "block_tables", "starts", "num_seqs")
    return op(
        *(tensors["qkv"], *sizes, tensors["q_weight"], tensors["k_weight"]),
        *(tensors["table"], is_neox, tensors["positions"], *kv.unbind(0)),
        *(tensors["slots"], *(tensors[n] for n in names), *how),
        **{n: tensors[n] for n in ("alibi_slopes", "sinks", "k_scale", "v_scale")},
        kv_cache_dtype=cache_dtype,
    )


def on(device, tensors):
    """Copies: an update changes none that it was made of."""
    return {n: t if t is None else t.clone().to(device) for n, t in tensors.items()}


def check(made, device):
    """Holds the call to the two, results and cache, on the same device."""
    found = []
    for op in (apart, joint):
        tensors = on(device, made[0])
        out = call(op, made, tensors).cpu()
        found.append((out, tensors["kv"].cpu()))
    (want, wanted), (got, cached) = found
    assert got.dtype == made[0]["qkv"].dtype
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(cached.view(torch.uint8), wanted.view(torch.uint8))


CASES = {
    "plain": {},
    "no norm": {"weights": False},
    "pairs": {"is_neox": False},
    "half": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16, "dim": 24},
    "fp8": {"cache_dtype": "fp8", "dtype": torch.bfloat16},
    "fp8_e5m2": {"cache_dtype": "fp8_e5m2"},
    "window": {"window": 3},
    "cap": {"cap": 0.5},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True, "dtype": torch.bfloat16},
    "padding": {"padding": 3},
    "no sequence": {"new": (), "lengths": (), "padding": 2},
    "hnd": {"hnd": True},
}


@pytest.fixture
def one_call(monkeypatch):
    """Counts the calls that are one."""
    calls = []
    once = module.update
    monkeypatch.setattr(module, "update", lambda *a: calls.append(1) or once(*a))
    return calls


@pytest.mark.parametrize("device", ["cpu", "xla"])
@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_it_is_the_two(device, changes, one_call):
    device = torch_xla.device() if device == "xla" else device
    check(case(**changes), device)
    assert bool(one_call) == (device != "cpu")


@st.composite
def random_cases(draw):
    lengths = draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    new = [draw(st.integers(1, n)) for n in lengths]
    kv_heads = draw(st.integers(1, 3))
    return {
        "new": tuple(new),
        "lengths": tuple(lengths),
        "heads": kv_heads * draw(st.integers(1, 3)),
        "kv_heads": kv_heads,
        "dim": draw(st.sampled_from([8, 16, 40])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16])),
        "padding": draw(st.integers(0, 2)),
        "weights": draw(st.booleans()),
        "is_neox": draw(st.booleans()),
        "cache_dtype": draw(st.sampled_from(["auto", *FP8])),
        "window": draw(st.sampled_from([None, 1, 3, 100])),
        "cap": draw(st.sampled_from([None, 0.5])),
        "alibi": draw(st.booleans()),
        "sinks": draw(st.booleans()),
        "hnd": draw(st.booleans()),
        "seed": draw(st.integers(0, 99)),
    }


@given(random_cases())
@settings(max_examples=60, deadline=None)
def test_any_batch(changes):
    check(case(**changes), torch_xla.device())


@pytest.mark.parametrize("backend", ["openxla", "xla_ops"])
def test_compiled(backend, one_call):
    made = case()
    expected = on("cpu", made[0])
    out = call(apart, made, expected)
    tensors = on(torch_xla.device(), made[0])
    compiled = torch.compile(
        lambda **t: call(joint, made, t), backend=backend, fullgraph=True
    )
    got = compiled(**tensors)
    torch.testing.assert_close(got.cpu(), out)
    torch.testing.assert_close(tensors["kv"].cpu(), expected["kv"])
    assert one_call


def test_in_place_without_a_copy(hlo_dump):
    made = case(dim=104)  # a size that no other test has
    tensors = on(torch_xla.device(), made[0])
    cache = tensors["kv"]
    before = addresses([cache])
    for _ in range(2):
        call(joint, made, tensors)
        assert addresses([cache]) == before
    programs = programs_with(cache.shape, hlo_dump)
    assert programs
    for program in programs:
        assert NAME in program
        assert copies_of(cache.shape, program) == []


def test_caches_of_two_buffers_take_two_calls(one_call):
    made = case()
    tensors = dict(made[0])
    both = [t.clone() for t in tensors["kv"].unbind(0)]
    expected = on("cpu", tensors)
    out = call(apart, made, expected)

    def separate(*args, **features):
        args = list(args)
        args[10:12] = both
        return joint(*args, **features)

    assert torch.equal(call(separate, made, tensors), out)
    assert torch.equal(torch.stack(both), expected["kv"])
    assert not one_call


def test_an_int_counts_sequences(one_call):
    made = case()
    out = call(apart, made, on(torch_xla.device(), made[0])).cpu()
    tensors = on(torch_xla.device(), made[0])
    got = call(joint, made, {**tensors, "num_seqs": 3})
    assert torch.equal(got.cpu(), out)
    assert one_call


WRONG = {
    "qkv": (lambda t: t[:, 1:], "qkv must have shape"),
    "positions": (lambda t: t.float(), "position_ids must be"),
    "slots": (lambda t: t.int(), "slot_mapping must be"),
    "context_lens": (lambda t: t.long(), "context_lens must be"),
    "block_tables": (lambda t: t[:1], "block_tables must have shape"),
    "num_seqs": (lambda t: t.repeat(2), "num_seqs must have 1"),
    "sinks": (lambda t: torch.ones(3), "sinks must have shape"),
    "head_dim": (12, "qkv must have a head_dim that is a multiple of 8"),
    "qkv of": (lambda t: [1.0], "qkv must be a tensor"),
}


@pytest.mark.parametrize("device", ["cpu", "xla"])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(device, name):
    device = torch_xla.device() if device == "xla" else device
    change, message = WRONG[name]
    made = case(dim=change if name == "head_dim" else 16)
    tensors = on(device, made[0])
    key = name.split()[0]
    if key in tensors:
        value = change(made[0][key])
        tensors[key] = value.to(device) if isinstance(value, torch.Tensor) else value
    kv = tensors["kv"].cpu()
    with pytest.raises((ValueError, TypeError)) as error:
        call(joint, made, tensors)
    assert str(error.value).startswith(f"{NAME}: {message}")
    assert torch.equal(tensors["kv"].cpu(), kv)


def test_no_gradient():
    made = case()
    tensors = on(torch_xla.device(), made[0])
    tensors["qkv"].requires_grad_()
    text = f"{NAME}: has no gradient: qkv requires one"
    with torch.enable_grad(), pytest.raises(RuntimeError, match=text):
        call(joint, made, tensors)


def test_the_example():
    scope = {joint.__name__: joint, "torch": torch}
    example = doctest.DocTestParser().get_doctest(joint.__doc__, scope, NAME, None, 0)
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


def test_it_is_declared():
    assert OPS[f"{NAME}_stacked"].num_donors == 1
