"""extend/torch_op.py: what is refused, where, and in which words."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch_xla

import torch_ops
from xla_ops.extend import torch_op

DEVICE = torch_xla.device()

OUTSIDE = torch_ops.load()


def ones(*shape, dtype=torch.float32):
    return torch.ones(*shape, dtype=dtype).to(DEVICE)


@pytest.mark.parametrize("name", ["aten::nothing", "aten::add.nothing", "nothing", ""])
def test_no_such_operator(name):
    with pytest.raises(ValueError) as error:
        torch_op(name)
    rule = "be an operator that torch has, whose library is loaded"
    assert str(error.value) == f"torch_op: name must {rule}, got {name!r}"


def test_operator_that_returns_a_number():
    text = "name must be an operator that returns tensors alone, got .* -> number"
    with pytest.raises(ValueError, match=text):
        torch_op("aten::_local_scalar_dense")


def test_operator_that_gives_nothing():
    text = "name must be an operator that returns a tensor or writes one, got fake_"
    with pytest.raises(ValueError, match=text):
        torch_op(f"{OUTSIDE}::nothing")


@pytest.mark.parametrize("name", ["t_", "resize_", "set_.source_Tensor"])
def test_operator_that_changes_what_a_tensor_is(name):
    """A buffer of XLA's has one shape, and no strides."""
    rule = "be an operator that leaves shapes and strides of what it writes alone"
    with pytest.raises(ValueError) as error:
        torch_op(f"aten::{name}")
    assert str(error.value) == f"torch_op: name must {rule}, got aten::{name}"


def test_output_that_torch_would_make_larger():
    add = torch_op("aten::add.out")
    text = r"aten::add.out: out must have shape \[2\], got \[0\]"
    with pytest.raises(ValueError, match=text):
        add(ones(2), ones(2), out=ones(0))
    assert add(ones(0, 3), ones(0, 3), out=ones(0, 3)).shape == (0, 3)


def test_result_that_xla_cannot_carry():
    text = "aten::view_as_complex: meta must return tensors of XLA's dtypes, got compl"
    with pytest.raises(ValueError, match=text):
        torch_op("aten::view_as_complex")(ones(2, 2))


def test_outputs_that_are_none():
    text = "outputs must name arguments that the operator writes, got self"
    with pytest.raises(ValueError, match=text):
        torch_op("aten::sub.out", outputs=("self",))


def test_arguments_of_other_types():
    overload = torch.ops.aten.sub.out
    for name, got in ((None, "NoneType"), (b"aten::sub", "bytes"), (overload, "OpOv")):
        with pytest.raises(TypeError, match=f"torch_op: name must be a str, got {got}"):
            torch_op(name)
    rule = "torch_op: outputs must be a sequence of names, got 'out'"
    with pytest.raises(ValueError, match=rule):
        torch_op("aten::sub.out", outputs="out")
    for option in ("meta", "autocast"):
        rule = f"torch_op: {option} must be a function, got 3"
        with pytest.raises(ValueError, match=rule):
            torch_op("aten::sub.out", **{option: 3})


def test_declared_again_with_other_options():
    assert torch_op("aten::mul.out") is torch_op("aten::mul.out")
    text = "name must be declared once, or with the same options again, got aten::mul"
    with pytest.raises(ValueError, match=text):
        torch_op("aten::mul.out", capturable=True)


def test_capturable_operator_that_returns_tensors_of_its_own():
    text = "capturable must be False for an operator that returns tensors of its own"
    with pytest.raises(ValueError, match=text):
        torch_op("aten::exp", capturable=True)


def test_operator_without_a_meta_kernel():
    f = torch_op(f"{OUTSIDE}::add_one")
    text = "meta must be given for an operator without a meta kernel, got none"
    with pytest.raises(ValueError, match=f"{OUTSIDE}::add_one: {text}"):
        f(ones(2))
    with pytest.raises(ValueError, match="aten::nonzero: meta must be given"):
        torch_op("aten::nonzero")(ones(2))


def test_meta_that_returns_too_much():
    f = torch_op("aten::neg", meta=lambda x: (x, x))
    with pytest.raises(ValueError, match="aten::neg: meta must return 1 values, got 2"):
        f(ones(2))


def test_tensors_of_two_devices():
    text = "aten::add.Tensor: other must be on an XLA device, as other arguments are"
    with pytest.raises(ValueError, match=f"{text}, got cpu"):
        torch_op("aten::add.Tensor")(ones(2), torch.ones(2))


def test_arguments_that_xla_cannot_carry():
    f = torch_op("aten::bernoulli")
    text = "generator must be None or of a type that XLA can carry, got Generator"
    with pytest.raises(TypeError, match=text):
        f(ones(2), generator=torch.Generator())
    with pytest.raises(ValueError, match="self must be one of bool, .*, got complex64"):
        torch_op("aten::abs")(ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="dtype must be a dtype of XLA, got complex64"):
        torch_op("aten::ones_like")(ones(2), dtype=torch.complex64)


def test_operator_without_a_kernel_for_the_device():
    f = torch_op(f"{OUTSIDE}::elsewhere", meta=torch.empty_like)
    text = "elsewhere: kernel must be there for CPU, got none"
    with pytest.raises(ValueError, match=text):
        f(ones(2))


def test_kernel_in_python():
    """It would wait for a lock that who waits for XLA may hold."""
    library = torch.library.Library("in_python", "DEF")
    library.define("f(Tensor x) -> Tensor")
    library.impl("f", lambda x: x + 1, "CPU")

    @torch.library.custom_op("in_python::g", mutates_args=())
    def g(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    for name in ("in_python::f", "in_python::g"):
        f = torch_op(name, meta=torch.empty_like)
        text = f"{name}: kernel must not be written in Python, got that of /.*[.]py:"
        with pytest.raises(ValueError, match=text):
            f(ones(2))
        assert f(torch.ones(2)).tolist() == [2, 2]


def test_element_that_would_be_written_twice():
    t = ones(2)
    text = r"self\[1\] must not share memory with self\[0\]"
    with pytest.raises(ValueError, match=text):
        torch_op("aten::_foreach_neg_")([t, t])


def run(f, *args) -> str:
    """The error of a program that fails."""
    result = f(*args)
    try:
        result.cpu()
    except RuntimeError as error:
        text = str(error)
    else:
        raise AssertionError("it did not fail")
    del result
    with contextlib.suppress(RuntimeError):  # torch_xla raises it once more
        torch_xla.sync(wait=True)
    return text


def test_an_operators_error_becomes_the_programs():
    f = torch_op("aten::embedding")
    text = run(f, ones(3, 2), torch.tensor([5]).to(DEVICE))
    assert "torch_op: aten::embedding failed: index out of range in self" in text
    assert f(ones(3, 2), torch.tensor([1]).to(DEVICE)).tolist() == [[1, 1]]


def test_kernel_that_does_not_return_what_meta_says():
    f = torch_op(f"{OUTSIDE}::first", meta=torch.empty_like)
    assert (
        f"torch_op: {OUTSIDE}::first failed: it returned Float of shape [1] where its"
        " meta kernel says Float of shape [3]"
    ) in run(f, ones(3))


def test_kernel_that_returns_another_number_of_tensors():
    f = torch_op(f"{OUTSIDE}::three", meta=lambda x: [torch.empty_like(x)] * 2)
    text = run(lambda x: f(x)[0], ones(3))
    assert "it returned 3 tensors where 2 were expected" in text


def test_kernel_that_changes_what_a_tensor_is():
    """By no tag that would have it refused; the user's tensor would not follow."""
    f = torch_op(f"{OUTSIDE}::shrink")
    text = run(lambda t: f(t) or t, ones(3))
    assert (
        f"torch_op: {OUTSIDE}::shrink failed: t must keep its memory, shape [3] and"
        " strides [1], got shape [1] and strides [1]"
    ) in text
    f = torch_op(f"{OUTSIDE}::turn")
    text = run(lambda t: f([ones(2, 2), t]) or t, ones(2, 3))
    assert (
        f"torch_op: {OUTSIDE}::turn failed: tensors[0] must keep its memory, shape"
        " [2, 2] and strides [2, 1], got shape [2, 2] and strides [1, 2]"
    ) in text
