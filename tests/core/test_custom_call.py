"""The way into the graph: attributes, caching, errors at run time, encodings."""

import math

import pytest
import torch
import torch_xla
import torch_xla.core.xla_builder as xb
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
from hypothesis import given
from hypothesis import strategies as st

import xla_ops
from support import Path
from xla_ops.core import custom_call, handlers, hlo, op
from xla_ops.core.custom_call import CustomCall, OptionalOperand
from xla_ops.core.hlo import Spec

XLA_PATHS = pytest.mark.parametrize("name", ["lazy", "compiled"])


@XLA_PATHS
def test_attributes_that_differ_give_different_programs(name):
    x = torch.randn(3, 8)
    w = torch.ones(8)
    device = torch_xla.device()
    f = Path(name).function(
        lambda x, w: [xla_ops.rms_norm(x, w, e) for e in (1e-6, 1.0)]
    )
    results = f(x.to(device), w.to(device))
    for eps, out in zip((1e-6, 1.0), results, strict=True):
        wanted = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        assert torch.allclose(out.cpu(), wanted, atol=1e-5)


def test_attributes_are_part_of_the_computation_cache():
    spec = (Spec((2, 8), torch.float32), Spec((8,), torch.float32))
    texts = [
        hlo.encode_attributes({"a": v}) for v in (0.0, -0.0, 0, False, 1.0, 1, True)
    ]
    assert len(set(texts)) == len(texts)
    made = [
        custom_call._computation("t.t", spec, spec[:1], text, ((0, 0),))
        for text in texts
    ]
    assert len({id(c) for c in made}) == len(texts)
    again = custom_call._computation("t.t", spec, spec[:1], texts[0], ((0, 0),))
    assert again is made[0]


def test_zeros_of_both_signs_are_two_signatures():
    assert op._key(0.0) != op._key(-0.0)
    assert op._key(float("nan")) == op._key(float("nan"))


def test_an_operand_that_is_no_tensor_is_named():
    call = CustomCall("t.t", ("x", OptionalOperand("w", torch.int32)), ())
    assert call.bind({"x": torch.ones(2), "w": None}).operands[1] == ((0,), torch.int32)
    with pytest.raises(TypeError, match=r"t\.t: x must be a tensor, got NoneType"):
        call.bind({"x": None, "w": None})
    with pytest.raises(TypeError, match=r"t\.t: w must be a tensor, got float"):
        call.bind({"x": torch.ones(2), "w": 1.0})


def test_an_alias_of_no_operand_is_refused():
    with pytest.raises(ValueError, match=r"must name operands, got 'y'"):
        CustomCall("t.t", ("x",), (), aliases={0: "y"})


def test_a_remembered_signature_takes_each_call_s_tensors():
    """Also after a call whose first two arguments are one tensor."""
    device = torch_xla.device()
    x, y, w = torch.randn(2, 24), torch.randn(2, 24), torch.ones(24)
    on_device = {t: t.to(device) for t in (x, y, w)}
    for a, b in ((x, x), (x, y), (y, x), (y, y)):
        _, total = xla_ops.fused_add_rms_norm(*(on_device[t] for t in (a, b, w)))
        assert torch.equal(total.cpu(), a + b)
    short = torch.ones(23, device=device)
    with pytest.raises(ValueError, match=r"weight must have shape \[24\], got \[23\]"):
        xla_ops.fused_add_rms_norm(on_device[x], on_device[y], short)


def test_signatures_are_forgotten_at_some_number(monkeypatch):
    monkeypatch.setattr(op, "_MAX_PLANS", 2)
    norm = op.OPS["rms_norm"]
    norm._plans.clear()
    for n in range(1, 4):
        x = torch.ones(n, 8, device=torch_xla.device())
        assert torch.allclose(xla_ops.rms_norm(x, x[0]).cpu(), torch.ones(n, 8))
    assert len(norm._plans) == 1
    norm._plans.update(dict.fromkeys(range(3)))  # as threads may, all at once
    xla_ops.rms_norm(x, x[0], 1e-3)
    assert len(norm._plans) == 1


def test_an_absent_operand_is_no_parameter():
    """It is a constant of the call's own module, and another signature."""
    spec = Spec((2, 8), torch.float32)
    absent = Spec((0,), torch.int32)
    texts = [
        xb.get_computation_hlo(
            custom_call._computation("t.t", operands, (spec,), "{}", (), missing)
        )
        for operands, missing in (((spec, absent), (1,)), ((spec, absent), ()))
    ]
    assert [text.count(" parameter(") for text in texts] == [1, 2]
    assert "s32[0]{0} constant({})" in texts[0]
    assert all('custom_call_target="t.t"' in text for text in texts)


def test_repeated_calls_compile_once():
    x, w = torch.randn(3, 24), torch.ones(24)
    for _ in range(2):
        Path("lazy").run(xla_ops.rms_norm, x, w)
    before = met.counter_value("UncachedCompile")
    for _ in range(3):
        Path("lazy").run(xla_ops.rms_norm, x, w)
    assert met.counter_value("UncachedCompile") == before


# A call that Python's checks would refuse, so that the handler has to.
_library = torch.library.Library("xla_ops_test", "DEF")
_library.define("refused(Tensor x, Tensor w) -> Tensor")
torch.library.register_fake(
    "xla_ops_test::refused", lambda x, w: torch.empty_like(x), lib=_library
)


def norm(x, w, attributes):
    call = CustomCall("xla_ops.rms_norm", ("x", "w"), (Spec.of(x),), attributes)
    return call.bind({"x": x, "w": w})


def _refused(x, w):
    assert handlers.available(handlers.xla_platform(), "xla_ops.rms_norm")
    return custom_call.call_in_graph(norm(x, w, {"eps": 1e-6}))[0]


_library.impl("refused", _refused, "XLA")
MESSAGE = "rms_norm: weight must have shape [8], got [7]"


def good():
    x = torch.ones(2, 8, device=torch_xla.device())
    return xla_ops.rms_norm(x, x[0]).cpu()


def drain():
    """torch_xla reports a failed program to each waiter once."""
    for _ in range(4):
        try:
            xm.wait_device_ops()
            good()
        except RuntimeError as error:
            if MESSAGE not in str(error):
                raise


@XLA_PATHS
def test_a_handlers_error_reaches_the_caller_and_later_calls_go_on(name):
    device = torch_xla.device()
    x, w = torch.ones(4, 8, device=device), torch.ones(7, device=device)
    torch_xla.sync()
    f = Path(name).function(lambda x, w: torch.ops.xla_ops_test.refused(x, w) + 1)
    for _ in range(2):
        with pytest.raises(RuntimeError) as error:
            f(x, w).cpu()
        assert MESSAGE in str(error.value)
        drain()
        assert torch.allclose(good(), torch.ones(2, 8))
    assert torch.equal(x.cpu(), torch.ones(4, 8))


def test_the_handler_refuses_wrong_attributes():
    x, w = torch.ones(2, 8), torch.ones(8)
    for attributes in ({}, {"eps": 1}, {"eps": 1e-6, "other": 2}):
        with pytest.raises((ValueError, RuntimeError)):
            custom_call.call_directly(norm(x, w, attributes))


def test_without_handlers_the_reference_serves_and_says_so_once(monkeypatch, recwarn):
    monkeypatch.setattr(handlers, "_platforms", {})
    monkeypatch.setattr(handlers, "_told", set())
    x, w = torch.randn(2, 40), torch.ones(40)
    for _ in range(2):
        out, _ = Path("lazy").run(xla_ops.rms_norm, x, w)
    assert torch.allclose(
        out, torch.nn.functional.rms_norm(x, (40,), w, 1e-6), atol=1e-5
    )
    told = [w for w in recwarn if "the slow plain torch reference" in str(w.message)]
    assert len(told) == 1
    assert "xla_ops.rms_norm" in str(told[0].message)
    assert "doctor" in str(told[0].message)


@given(value=st.floats(width=32, allow_nan=False))
def test_float_attributes_keep_every_bit(value):
    text = hlo.encode_attributes({"x": value})
    bits = int(text.removeprefix("{x = 0x").removesuffix(" : f32}"), 16)
    back = torch.tensor([bits]).to(torch.uint32).view(torch.float32).item()
    assert back == value and math.copysign(1, back) == math.copysign(1, value)


def test_strings_are_escaped():
    text = hlo.encode_attributes({"s": 'a"b\\c\n\u00e9'})
    assert text == '{s = "a\\22b\\5Cc\\0A\\C3\\A9"}'


def test_other_attribute_types_are_refused():
    with pytest.raises(TypeError, match="attribute must be bool, int, float or str"):
        hlo.encode_attributes({"x": None})


@pytest.mark.parametrize(
    "schema, number",
    [
        ("(Tensor x, Tensor? donor) -> Tensor", 1),
        ("(Tensor x, Tensor? donor_x, Tensor? donor_1) -> (Tensor, Tensor)", 2),
        ("(Tensor donor_sites, Tensor donor) -> Tensor", 0),
        ("(Tensor? donor_mask, Tensor x) -> Tensor", 0),
    ],
)
def test_donors_are_the_last_arguments_that_may_be_none(schema, number):
    assert op.num_donors(schema) == number
