"""Numbers that are not Python's, as arguments of every public function."""

import re
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch

import xla_ops
from support import Path, int32
from xla_ops.core import scalars

EAGER = ["cpu", "lazy"]


class Number(NamedTuple):
    """An argument that is a number: a call that has it, and a value of Python's."""

    call: object
    argument: str
    value: object

    def __str__(self):
        return f"{self.call.__name__}.{self.argument}"


def rows():
    return torch.linspace(-2, 3, 48).reshape(3, 16)


def rms_norm(path, **given):
    return xla_ops.rms_norm(*path.put((rows(), torch.ones(16))), **given)


def fused_add_rms_norm(path, **given):
    x, w = path.put((rows(), torch.ones(16)))
    return xla_ops.fused_add_rms_norm(x, x, w, **given)


def rms_norm_static_fp8_quant(path, **given):
    args = path.put((rows(), torch.ones(16), torch.ones(1)))
    return xla_ops.rms_norm_static_fp8_quant(*args, **given)


def fused_add_rms_norm_static_fp8_quant(path, **given):
    args = path.put((rows(), rows(), torch.ones(16), torch.ones(1)))
    return xla_ops.fused_add_rms_norm_static_fp8_quant(*args, **given)


def rms_norm_dynamic_per_token_quant(path, **given):
    x, w = path.put((rows(), torch.ones(16)))
    return xla_ops.rms_norm_dynamic_per_token_quant(x, w, torch.int8, **given)


def dynamic_scaled_int8_quant(path, **given):
    return xla_ops.dynamic_scaled_int8_quant(path.put(rows()), **given)


def rotary_embedding(path, **given):
    given = {"head_size": 16, "is_neox": True} | given
    names = ("positions", "query", "key", "cos_sin_cache")
    heads = rows()
    tensors = path.put((torch.arange(3), heads, heads, heads[:, :8].contiguous()))
    return xla_ops.rotary_embedding(**dict(zip(names, tensors, strict=True)), **given)


def fatrelu_and_mul(path, **given):
    return xla_ops.fatrelu_and_mul(path.put(rows()), **given)


def swigluoai_and_mul(path, **given):
    return xla_ops.swigluoai_and_mul(path.put(rows()), **given)


def convert_fp8(path, **given):
    return xla_ops.convert_fp8(path.put(rows()), **given)


def fused_qk_norm_rope(path, **given):
    sizes = {"num_heads_q": 1, "num_heads_k": 1, "num_heads_v": 0, "head_dim": 8}
    # A size that is given is a larger one, and fits tensors of its own.
    columns = 24 if sizes.keys() & given.keys() else 16
    dim = 12 if "head_dim" in given else 8
    given = sizes | {"eps": 1e-6, "is_neox": True} | given
    qkv, weight, table, ids = path.put(
        (
            torch.linspace(-2, 3, 3 * columns).reshape(3, columns),
            torch.linspace(1, 2, dim),
            rows()[:, :dim].contiguous(),
            torch.arange(3),
        )
    )
    xla_ops.fused_qk_norm_rope(
        qkv,
        q_weight=weight,
        k_weight=weight,
        cos_sin_cache=table,
        position_ids=ids,
        **given,
    )
    return qkv


def fused_qk_norm_rope_and_cache(path, **given):
    sizes = {"num_heads": 1, "num_kv_heads": 1, "head_dim": 8}
    # As above: two heads of queries, two of keys and values, or heads of 12.
    columns = {"num_heads": 32, "num_kv_heads": 40, "head_dim": 36}
    changed = [name for name in sizes if name in given]
    columns = columns[changed[0]] if changed else 24
    dim = 12 if "head_dim" in given else 8
    kv_heads = 2 if "num_kv_heads" in given else 1
    cache = torch.zeros(2, 2, 2, kv_heads, dim)
    qkv, weight, table, ids, cache = path.put(
        (
            torch.linspace(-2, 3, 3 * columns).reshape(3, columns),
            torch.linspace(1, 2, dim),
            rows()[:, :dim].contiguous(),
            torch.arange(3),
            cache,
        )
    )
    query = xla_ops.fused_qk_norm_rope_and_cache(
        qkv,
        q_weight=weight,
        k_weight=weight,
        cos_sin_cache=table,
        position_ids=ids,
        key_cache=cache[0],
        value_cache=cache[1],
        slot_mapping=ids,
        **sizes | {"eps": 1e-6, "is_neox": True} | given,
    )
    return query, cache


def heads():
    return torch.linspace(-1, 1, 9 * 2 * 8).reshape(9, 2, 8)


def flash_attn_varlen(path, **given):
    given = {"max_seqlen_q": 9, "max_seqlen_k": 9} | given
    q, ends = path.put((heads(), int32(0, 9)))
    return xla_ops.flash_attn_varlen(q, q, q, ends, ends, **given)


def paged_attention(path, **given):
    given = {"scale": 0.5} | given
    cache = torch.linspace(-1, 1, 2 * 3 * 4 * 16).reshape(2, 3, 4, 2, 8)
    ints = (int32(9), int32([0, 1, 2]), int32(0, 9), int32(1))
    return xla_ops.paged_attention(*path.put((heads(), cache, *ints)), **given)


INTS = [
    Number(flash_attn_varlen, "max_seqlen_q", 9),
    Number(flash_attn_varlen, "max_seqlen_k", 9),
    Number(flash_attn_varlen, "window_left", 2),
    Number(flash_attn_varlen, "window_right", 1),
    Number(paged_attention, "sliding_window", 3),
    Number(rotary_embedding, "head_size", 8),
    Number(fused_qk_norm_rope, "num_heads_q", 2),
    Number(fused_qk_norm_rope, "num_heads_k", 2),
    Number(fused_qk_norm_rope, "num_heads_v", 1),
    Number(fused_qk_norm_rope, "head_dim", 12),
    Number(fused_qk_norm_rope_and_cache, "num_heads", 2),
    Number(fused_qk_norm_rope_and_cache, "num_kv_heads", 2),
    Number(fused_qk_norm_rope_and_cache, "head_dim", 12),
]
FLOATS = [
    Number(rms_norm, "eps", 0.5),
    Number(fused_add_rms_norm, "eps", 0.5),
    Number(rms_norm_static_fp8_quant, "eps", 0.5),
    Number(fused_add_rms_norm_static_fp8_quant, "eps", 0.5),
    Number(rms_norm_dynamic_per_token_quant, "eps", 0.5),
    Number(fatrelu_and_mul, "threshold", 0.5),
    Number(swigluoai_and_mul, "alpha", 0.5),
    Number(swigluoai_and_mul, "limit", 0.5),
    Number(convert_fp8, "scale", 0.5),
    Number(fused_qk_norm_rope, "eps", 0.5),
    Number(fused_qk_norm_rope_and_cache, "eps", 0.5),
    Number(flash_attn_varlen, "softmax_scale", 0.25),
    Number(flash_attn_varlen, "softcap", 2.0),
    Number(paged_attention, "scale", 0.25),
    Number(paged_attention, "soft_cap", 2.0),
]
FLAGS = [
    Number(flash_attn_varlen, "is_causal", True),
    Number(paged_attention, "return_lse", True),
    Number(rotary_embedding, "is_neox", False),
    Number(fused_qk_norm_rope, "is_neox", False),
    Number(fused_qk_norm_rope_and_cache, "is_neox", False),
    Number(dynamic_scaled_int8_quant, "symmetric", False),
]
# What a value may be given as; a float may be an int too.
AS_INT = [np.int64, np.int32, np.uint8, np.array, torch.tensor]
AS_FLOAT = [np.float64, np.float32, np.float16, np.array, torch.tensor]
AS_FLAG = [int, np.bool_, np.int64, np.array, torch.tensor]
LEGAL = [
    (number, kind)
    for numbers, kinds in ((INTS, AS_INT), (FLOATS, AS_FLOAT), (FLAGS, AS_FLAG))
    for number in numbers
    for kind in kinds
]
ILLEGAL = [
    *((n, v) for n in INTS for v in (True, np.True_, 9.0, np.float32(9), "9", None)),
    *((n, torch.tensor(v)) for n in INTS for v in (9.5, [9], True)),
    *((n, v) for n in FLOATS for v in (True, np.True_, "0.5", 1j, [0.5])),
    *((n, torch.tensor(v)) for n in FLOATS for v in ([0.5], True)),
    *((n, v) for n in FLAGS for v in (2, "yes", 1.0, None)),
    *((n, torch.tensor(v)) for n in FLAGS for v in ([True], 1.0)),
]
KINDS = {"an int": INTS, "a float": FLOATS, "a bool": FLAGS}
# None means something to these.
ILLEGAL = [
    (n, v) for n, v in ILLEGAL if v is not None or n.argument != "sliding_window"
]


def kind_of(number: Number) -> str:
    return next(kind for kind, numbers in KINDS.items() if number in numbers)


def assert_same(got, wanted):
    for a, b in zip(
        torch.utils._pytree.tree_leaves(got),
        torch.utils._pytree.tree_leaves(wanted),
        strict=True,
    ):
        a, b = (t.cpu().float() for t in (a, b))
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("number, kind", LEGAL, ids=str)
def test_taken_as_pythons(name, number, kind):
    path = Path(name)
    wanted = number.call(path, **{number.argument: number.value})
    assert_same(number.call(path, **{number.argument: kind(number.value)}), wanted)


@pytest.mark.parametrize(
    "number", [n for n in INTS + FLOATS + FLAGS if n.call is not paged_attention]
)
def test_the_value_matters(number):
    """The tests above would not see an argument that is dropped."""
    if number.argument.startswith("max_seqlen"):
        return  # bounds, which change no value
    without = {} if number.argument != "is_neox" else {"is_neox": True}
    got = number.call(Path("cpu"), **{number.argument: number.value})
    default = number.call(Path("cpu"), **without)
    with pytest.raises((AssertionError, ValueError)):
        assert_same(got, default)


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("number, value", ILLEGAL, ids=str)
def test_refused_by_name(name, number, value):
    rule = f"{number.call.__name__}: {number.argument} must be {kind_of(number)}, got "
    with pytest.raises(TypeError, match=re.escape(rule)):
        number.call(Path(name), **{number.argument: value})


@pytest.mark.parametrize("number", INTS + FLOATS, ids=str)
def test_integers_that_do_not_fit(number):
    """torch's own error names no rule, and float() raises OverflowError."""
    rule = "an int of at most 63 bits, got one of" if number in INTS else "a float, got"
    if number in FLOATS:
        rule += " an int of"
    text = rf"{number.call.__name__}: {number.argument} must be {rule} 2001"
    with pytest.raises(TypeError, match=text):
        number.call(Path("cpu"), **{number.argument: 2**2000})


def write(op, **given):
    rows, slots = torch.ones(2, 1, 4), torch.tensor([0, 1])
    shapes = {
        "reshape_and_cache": [(3, 1, 2, 2, 2), (3, 1, 4, 2)],
        "reshape_and_cache_flash": [(3, 2, 1, 4), (3, 2, 1, 4)],
    }
    caches = [torch.zeros(shape) for shape in shapes[op]]
    getattr(xla_ops, op)(rows, rows, *caches, slots, **given)


NO_TENSORS = [
    *(
        (partial(write, op), f"{op}: {name} must be a tensor or None, got float")
        for op in ("reshape_and_cache", "reshape_and_cache_flash")
        for name in ("k_scale", "v_scale")
    ),
    *(
        (
            partial(call, Path("cpu")),
            f"{call.__name__}: {name} must be a tensor or None, got float",
        )
        for call in (flash_attn_varlen, paged_attention)
        for name in ("alibi_slopes", "sinks", "k_scale", "v_scale")
    ),
]


@pytest.mark.parametrize("call, text", NO_TENSORS)
def test_what_is_no_tensor(call, text):
    argument = text.split()[1]
    with pytest.raises(TypeError, match=text):
        call(**{argument: 1.0})


@pytest.mark.parametrize("value", [None, 8, ["fp8"]])
@pytest.mark.parametrize(
    "call, op",
    [
        (partial(write, "reshape_and_cache"), "reshape_and_cache"),
        (partial(write, "reshape_and_cache_flash"), "reshape_and_cache_flash"),
        (partial(convert_fp8, Path("cpu")), "convert_fp8"),
        (partial(flash_attn_varlen, Path("cpu")), "flash_attn_varlen"),
        (partial(paged_attention, Path("cpu")), "paged_attention"),
    ],
)
def test_what_is_no_string(call, op, value):
    text = f"{op}: kv_cache_dtype must be a str, got {type(value).__name__}"
    with pytest.raises(TypeError, match=text):
        call(kv_cache_dtype=value)


@pytest.mark.parametrize("caches", [None, 3, torch.zeros(2, 3, 4)])
def test_caches_that_are_no_list(caches):
    """The blocks of a tensor would be taken for caches."""
    got = type(caches).__name__
    text = f"copy_blocks: key_caches must be a list, got {got}"
    with pytest.raises(TypeError, match=text):
        xla_ops.copy_blocks(caches, caches, torch.tensor([[0, 1]]))
    if not isinstance(caches, torch.Tensor):
        text = f"paged_attention: kv_cache must be a tensor or two in a list, got {got}"
        ints = (int32(9), int32([0, 1, 2]), int32(0, 9), int32(1))
        with pytest.raises(TypeError, match=text):
            xla_ops.paged_attention(heads(), caches, *ints, 0.5)


@pytest.mark.parametrize("number", INTS + FLOATS + FLAGS, ids=str)
def test_a_tensor_of_a_device_is_not_waited_for(number):
    path = Path("lazy")
    value = torch.tensor(number.value).to(path.device)
    rule = (
        rf"{number.call.__name__}: {number.argument} must be {kind_of(number)}, got a"
        r" tensor on xla:0; pass \.item\(\) of it"
    )
    with pytest.raises(TypeError, match=rule):
        number.call(path, **{number.argument: value})
    with torch.no_grad():
        number.call(path, **{number.argument: value.item()})


def compiled(fullgraph, backend="openxla"):
    path = Path("lazy")
    q, ends = path.put((heads(), int32(0, 9)))

    def attend(longest, scale):
        return xla_ops.flash_attn_varlen(
            *(q, q, q, ends, ends), longest, longest, softmax_scale=scale
        )

    return torch.compile(attend, backend=backend, fullgraph=fullgraph), attend


@pytest.mark.parametrize("backend", ["openxla", "xla_ops"])
@pytest.mark.parametrize(
    "longest, scale, argument",
    [
        (np.int64(9), 0.25, "max_seqlen_q must be an int"),
        (torch.tensor(9), 0.25, "max_seqlen_q must be an int"),
        (9, np.float32(0.25), "softmax_scale must be a float"),
        (9, torch.tensor(0.25), "softmax_scale must be a float"),
    ],
    ids=str,
)
def test_compiled(backend, longest, scale, argument):
    """Dynamo does not know the value: an error by name, or a break that gets it."""
    step, plain = compiled(True, backend)
    with pytest.raises(torch._dynamo.exc.Unsupported) as error:
        step(longest, scale)
    assert f"flash_attn_varlen: {argument}, got " in str(error.value)
    assert "whose value torch.compile does not know" in str(error.value)
    step, plain = compiled(False, backend)
    assert_same(step(longest, scale), plain(9, 0.25))


@pytest.mark.parametrize("backend", ["openxla", "xla_ops"])
def test_compiled_pythons_numbers(backend):
    """Sizes, and flags as ints, are known where they are traced."""
    path = Path("lazy")
    q, ends = path.put((heads(), int32(0, 9)))

    def attend(q, ends):
        return xla_ops.flash_attn_varlen(
            *(q, q, q, ends, ends), q.shape[0], len(q), is_causal=1, softcap=3
        )

    step = torch.compile(attend, backend=backend, fullgraph=True)
    assert_same(step(q, ends), attend(q, ends))
    with pytest.raises(torch._dynamo.exc.Unsupported) as error:
        compiled(True, backend)[0](9.0, 0.25)
    assert "max_seqlen_q must be an int, got float" in str(error.value)
    assert "does not know" not in str(error.value)


@pytest.mark.parametrize("name", EAGER)
@pytest.mark.parametrize("kind", AS_INT)
def test_through_torch_ops(name, kind):
    """torch's own schema takes the same numbers, where nothing is compiled."""
    q, ends = Path(name).put((heads(), int32(0, 9)))
    op = torch.ops.xla.flash_attn_varlen_op
    wanted = op(q, q, q, ends, ends, 9, 9)
    assert_same(op(q, q, q, ends, ends, kind(9), kind(9)), wanted)


def test_symbols_pass():
    """A symbol stays one: converting it would tie the graph to its value."""

    def sizes(t):
        n = t.shape[0]
        return scalars.integer("op", "n", n) + scalars.number("op", "n", n) + t

    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(sizes, backend=counter, fullgraph=True, dynamic=True)
    for n in (3, 7, 50):
        assert torch.equal(compiled(torch.ones(n)), torch.ones(n) + 2 * n)
    assert counter.frame_count == 1
