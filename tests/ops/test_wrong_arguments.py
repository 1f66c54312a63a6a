"""Whatever a public function is given, it computes or raises one error in its words."""

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

import xla_ops
from legal_calls import caches, legal_calls
from support import Path
from xla_ops import ops

PATHS = pytest.mark.parametrize("name", ["cpu", "lazy"])
ERROR = re.compile(r"(\w+): \S+ must |xla_ops\.(\w+): has no gradient: ")
# Torch's own of every update in place, ours too.
LEAF = "a leaf Variable that requires grad is being used in an in-place operation."

# By which kinds of tensors for which torch has dispatch keys of their own.
SPARSE = {
    "sparse": lambda t: t.to_sparse(),
    "CSR": lambda t: t.reshape(1, -1).to_sparse_csr(),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "nested": lambda t: torch.nested.nested_tensor([t, t]),
}
DTYPES = [
    *(torch.float32, torch.float16, torch.float64, torch.float8_e5m2, torch.bool),
    *(torch.int8, torch.uint8, torch.int32, torch.int64, torch.complex64),
]
TENSORS = [
    lambda t: t.unsqueeze(0),
    lambda t: t.flatten(),
    lambda t: t[0],
    lambda t: t.reshape(-1)[0],
    lambda t: torch.cat([t, t]),
    lambda t: t[..., :-1],
    lambda t: t[:0],
    lambda t: t.T,
    lambda t: t.to("meta"),
    lambda t: torch.nn.Parameter(t, requires_grad=t.is_floating_point()),
    lambda t: t.numpy(),
    *(lambda t, dtype=dtype: t.to(dtype) for dtype in DTYPES),
    *SPARSE.values(),
]
VALUES = [
    *(None, True, 0, -1, 3, 2**31, 2**63, 2**200, 10**400, 1.5, -0.0, 1e39, 1e-50, 1j),
    *(math.nan, math.inf, -math.inf, "", "fp8", "nope", b"fp8", [1], torch.float32),
    *(np.float16(0.5), np.int64(3), np.uint64(2**63), np.bool_(True), np.array([1, 2])),
    *(torch.tensor(2), torch.tensor([1, 2]), torch.tensor(1.0, device="meta"), float),
]


def outcome(path, name, arguments) -> str | None:
    """Calls a function; returns its error, of which it checks the words."""
    try:
        getattr(xla_ops, name)(**arguments)
        path.wait()
        return None
    except (ValueError, TypeError, RuntimeError) as raised:
        error = raised
    if str(error) == LEAF:
        return LEAF
    match = ERROR.match(str(error))
    assert match, f"{type(error).__name__}: {error}"
    assert name in match.groups(), error
    return str(error)


def put(path, value):
    """On XLA where it can be there at all."""
    if isinstance(value, list):
        return [put(path, v) for v in value]
    if not isinstance(value, torch.Tensor) or value.is_meta or value.is_quantized:
        return value
    is_dense = value.layout is torch.strided and not value.is_nested
    if not is_dense or not path.is_xla:
        return value
    return value.detach().to(path.device).requires_grad_(value.requires_grad)


def test_all_functions_have_a_legal_call():
    assert legal_calls().keys() == {*ops.__all__, "straight_through"}


@PATHS
@pytest.mark.parametrize("name_of_function", legal_calls())
def test_legal_calls(name, name_of_function):
    path = Path(name)
    arguments = legal_calls()[name_of_function]
    arguments = {a: put(path, v) for a, v in arguments.items()}
    assert outcome(path, name_of_function, arguments) is None


@PATHS
@settings(max_examples=400)
@given(data=st.data(), name_of_function=st.sampled_from(sorted(legal_calls())))
def test_random_arguments(name, data, name_of_function):
    path = Path(name)
    torch.manual_seed(0)
    arguments = legal_calls()[name_of_function]
    argument = data.draw(st.sampled_from(sorted(arguments)), "argument")
    given_ = arguments[argument]
    if isinstance(given_, torch.Tensor) and data.draw(st.booleans(), "is a tensor"):
        try:
            change = data.draw(st.sampled_from(range(len(TENSORS))), "change")
            arguments[argument] = TENSORS[change](given_)
        except (RuntimeError, IndexError):
            return  # there is no such tensor
    else:
        arguments[argument] = data.draw(st.sampled_from(VALUES), "value")
    with torch.set_grad_enabled(data.draw(st.booleans(), "gradients")):
        outcome(path, name_of_function, {a: put(path, v) for a, v in arguments.items()})


@pytest.mark.parametrize("kind", SPARSE)
@pytest.mark.parametrize("name", legal_calls())
def test_tensors_that_are_not_dense(name, kind):
    change = SPARSE[kind]
    for argument, value in legal_calls()[name].items():
        if isinstance(value, torch.Tensor):
            wrong = change(value)
        elif isinstance(value, list):
            wrong = [*value[:-1], change(value[-1])]
        else:
            continue
        arguments = {**legal_calls()[name], argument: wrong}
        error = str(outcome(Path("cpu"), name, arguments))
        error = error.replace("[0]", "")  # the first one of a list
        assert f"{name}: {argument} must be a dense tensor, got " in error


# Of which the values are not what lies in memory.
UNLIKE_MEMORY = {
    "a negated view": lambda t: torch._neg_view(-t),
    "zeros without memory": lambda t: torch._efficientzerotensor(
        t.shape, dtype=t.dtype
    ),
}


@pytest.mark.parametrize("kind", UNLIKE_MEMORY)
@pytest.mark.parametrize("name", legal_calls())
def test_tensors_unlike_their_memory(name, kind):
    def call(argument, change):
        torch.manual_seed(0)
        arguments = legal_calls()[name]
        arguments[argument] = change(arguments[argument])
        results = getattr(xla_ops, name)(**arguments)
        leaves = pytree.tree_leaves((results, arguments))
        return [t.double() for t in leaves if isinstance(t, torch.Tensor)]

    for argument, value in legal_calls()[name].items():
        if not isinstance(value, torch.Tensor) or value.dtype is torch.bool:
            continue
        change = UNLIKE_MEMORY[kind]
        if argument in IN_PLACE.get(name, ()):
            text = f"^{name}: {argument} must hold its values in memory, got {kind};"
            with pytest.raises(ValueError, match=text):
                call(argument, change)
            continue
        wanted = call(argument, lambda t, change=change: change(t).clone())
        for a, b in zip(call(argument, change), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@PATHS
@pytest.mark.parametrize("name_of_function", legal_calls())
def test_no_tangent_of_forward_mode_is_lost(name, name_of_function):
    """A tensor with a tangent is a view of one without, in which an op might read."""
    path = Path(name)

    def dual(t):
        return forward_ad.make_dual(t, torch.ones_like(t))

    for argument, value in legal_calls()[name_of_function].items():
        leaves = [t for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]
        if not any(t.is_floating_point() for t in leaves):
            continue
        given_ = legal_calls()[name_of_function]
        given_ = {a: put(path, v) for a, v in given_.items()}
        with forward_ad.dual_level():
            given_[argument] = pytree.tree_map_only(
                torch.Tensor, dual, given_[argument]
            )
            error = outcome(path, name_of_function, given_)
        text = f"xla_ops.{name_of_function}: has no gradient: {argument}"
        assert (error or "").startswith(text), (argument, error)
        assert "has a tangent (forward mode)" in error


CACHES = ("key_cache", "value_cache")
IN_PLACE = {
    "apply_repetition_penalties_": ("logits",),
    "fused_qk_norm_rope": ("qkv",),
    "fused_qk_norm_rope_and_cache": CACHES,
    "fused_qk_norm_rope_and_paged_attention": CACHES,
    "reshape_and_cache": CACHES,
    "reshape_and_cache_flash": CACHES,
    "swap_blocks": ("dst",),
}


@pytest.mark.parametrize("kind", SPARSE)
def test_tensors_that_are_not_dense_by_vllms_names(kind):
    out, x, weight = torch.ones(2, 16), torch.ones(2, 16), torch.ones(16)
    change = SPARSE[kind]
    text = "must be a dense tensor, got "
    rms_norm = torch.ops.xla_ops.rms_norm.out
    for i, name in enumerate(("result", "input", "weight")):
        args = [out, x, weight, 1e-6]
        args[i] = change(args[i])
        with pytest.raises(ValueError, match=f"^rms_norm: {name} {text}"):
            rms_norm(*args)
    write = torch.ops.xla_ops.reshape_and_cache_flash
    rows, slots, one = torch.ones(2, 2, 16), torch.tensor([0, 1]), torch.ones(1)
    for i, name in enumerate(("key", "value", "key_cache", "value_cache")):
        args = [rows, rows, *caches(), slots, "auto", one, one]
        args[i] = change(args[i])
        with pytest.raises(
            ValueError, match=f"^reshape_and_cache_flash: {name} {text}"
        ):
            write(*args)


@PATHS
def test_numbers_that_are_infinite_as_float32(name):
    path = Path(name)
    x = path.put(torch.linspace(-5, 5, 32).reshape(2, 16))
    wanted = xla_ops.swigluoai_and_mul(x, 1.702, 1e38)
    for limit in (1e39, 2**200):
        assert torch.equal(xla_ops.swigluoai_and_mul(x, 1.702, limit), wanted)
