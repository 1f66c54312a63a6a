"""Rules that hold for every op, over all ops at once."""

import inspect
import os

import pytest
import torch
from torch.library import opcheck

import xla_ops
from support import Path, int32
from xla_ops.core import handlers
from xla_ops.core.custom_call import call_directly
from xla_ops.core.op import OPS, Op

GEOMETRY = [3, 4, 2, 16, 128, 32, 16, 0]
ROWS = torch.ones(5, 2, 16)
SLOTS = torch.arange(5)
CACHE = torch.zeros(3, 4, 2, 16)
ONE = torch.ones(1)
WRITE = ("auto", GEOMETRY)

NORM_AND_ROTATION = (
    *(torch.randn(16), torch.randn(16), torch.randn(4, 16), torch.arange(5), SLOTS),
    *(ONE, ONE, 2, 2, 16, 1e-5, True),
)
GATED = torch.randn(3, 16)
QUERY, KEYS = torch.randn(5, 4, 16), torch.randn(9, 2, 16)

# One legal call of each op.
SAMPLES = {
    "silu_and_mul": (GATED,),
    "mul_and_silu": (GATED,),
    "gelu_and_mul": (GATED,),
    "gelu_tanh_and_mul": (GATED,),
    "silu_and_mul_quant": (GATED, ONE / 8),
    "fatrelu_and_mul": (GATED, 0.5),
    "swigluoai_and_mul_functional": (GATED, 1.702, 7.0),
    "activation_backward": (GATED[:, :8], GATED, "gelu_and_mul", 0.0, 0.0, 0.0),
    "gelu_new": (GATED,),
    "gelu_fast": (GATED,),
    "gelu_quick": (GATED,),
    "fused_add_rms_norm_functional": (GATED, GATED + 1, torch.ones(16), 1e-6),
    "static_scaled_fp8_quant": (GATED, ONE / 8),
    "dynamic_scaled_fp8_quant": (GATED,),
    "dynamic_per_token_scaled_fp8_quant": (GATED, ONE),
    "rms_norm_static_fp8_quant": (GATED, torch.ones(16), ONE / 8, 1e-6),
    "fused_add_rms_norm_static_fp8_quant": (
        *(GATED, GATED + 1, torch.ones(16), ONE / 8),
        1e-6,
    ),
    "rms_norm_dynamic_per_token_quant": (
        *(GATED, torch.ones(16)),
        *(torch.float8_e4m3fn, 1e-6, ONE),
    ),
    "fused_add_rms_norm_dynamic_per_token_quant": (
        *(GATED, GATED + 1, torch.ones(16)),
        *(torch.int8, 1e-6, None),
    ),
    "static_scaled_int8_quant": (GATED, ONE / 8, int32(3)),
    "dynamic_scaled_int8_quant": (GATED,),
    "dynamic_scaled_int8_azp_quant": (GATED,),
    "rms_norm": (torch.randn(3, 16), torch.ones(16), 1e-6),
    "rms_norm_backward": (GATED, GATED + 1, torch.ones(16), GATED, 1e-6, [1]),
    "rms_norm_backward_input": (GATED, GATED + 1, torch.ones(16), None, 1e-6),
    "apply_repetition_penalties_functional": (
        *(GATED, GATED > 1, GATED < -1, torch.tensor([1.5, 0.5, 2.0]), None),
    ),
    "convert_fp8_functional": (GATED, 0.5, "fp8", torch.float8_e4m3fn),
    "copy_blocks_one": (
        *(torch.randn(3, 8, 16), torch.tensor([[0, 1], [1, 2]])),
        *([3, 1, 1, 128, 128, 0, 0, 0], False, None),
    ),
    "swap_blocks_functional": (
        *(torch.randn(3, 8, 16), torch.randn(5, 8, 16)),
        *(torch.tensor([[0, 1], [4, 2]]), [5, 3, 1, 1, 128, *[128, 0, 0, 0] * 2]),
        *(False, None),
    ),
    "grouped_matmul": (torch.randn(5, 16), torch.randn(3, 8, 16), int32(1, 2, 2, 4)),
    "grouped_matmul_backward_weight": (
        *(torch.randn(5, 8), torch.randn(5, 16), int32(1, 2, 2, 4)),
    ),
    "linear": (torch.randn(5, 16), torch.randn(7, 16), torch.randn(7)),
    "merge_attn_states": (
        *(torch.randn(3, 2, 8), torch.randn(2, 3)),
        *(torch.randn(3, 2, 8), torch.randn(2, 3)),
    ),
    "merge_attn_states_backward": (
        *(torch.randn(3, 2, 8), torch.randn(2, 3)),
        *(torch.randn(3, 2, 8), torch.randn(2, 3)),
        *(torch.randn(3, 2, 8), torch.randn(2, 3)),
    ),
    "rotary_embedding_both": (
        *(torch.arange(3)[None], torch.randn(1, 3, 64), torch.randn(1, 3, 32), 16),
        *(torch.randn(4, 8), True),
    ),
    "rotary_embedding_one": (
        *(torch.arange(3)[None], torch.randn(1, 3, 64), 16),
        *(torch.randn(4, 8), False),
    ),
    "fused_qk_norm_rope_functional": (
        *(torch.randn(3, 32), 2, 1, 1, 8, 1e-5, torch.randn(8), torch.randn(8)),
        *(torch.randn(4, 8), False, torch.arange(3), None),
    ),
    "fused_qk_norm_rope_and_cache_both": (
        *(torch.randn(5, 6 * 16), CACHE, CACHE.clone(), *NORM_AND_ROTATION),
        *("auto", [*GEOMETRY, 0], False, None, None),
    ),
    "fused_qk_norm_rope_and_cache_stacked": (
        *(torch.randn(5, 6 * 16), torch.zeros(2, 3, 4, 2, 16), *NORM_AND_ROTATION),
        *("auto", [*GEOMETRY, 384], False, None),
    ),
    "fused_qk_norm_rope_and_paged_attention_stacked": (
        *(torch.randn(5, 6 * 16), torch.zeros(2, 3, 4, 2, 16), *NORM_AND_ROTATION[:5]),
        *(None, None, int32(5), int32([0, 1]), int32(0, 5), int32(1), None, None),
        *(*NORM_AND_ROTATION[7:], "auto", [*GEOMETRY, 384], 0.25, -1, 0.0, False, None),
    ),
    "reshape_and_cache_flash_both": (
        *(ROWS, ROWS, CACHE, CACHE.clone(), SLOTS, ONE, ONE),
        *("auto", [*GEOMETRY, 0], False),
    ),
    "reshape_and_cache_flash_stacked": (
        *(torch.zeros(2, 3, 4, 2, 16), ROWS, ROWS, SLOTS, ONE, ONE),
        *("auto", [*GEOMETRY, 384], False, None),
    ),
    "reshape_and_cache_flash_one": (
        *(CACHE, ROWS, SLOTS, ONE),
        *("auto", GEOMETRY, False, None),
    ),
    "reshape_and_cache_both": (
        *(ROWS, ROWS, CACHE, CACHE.clone(), SLOTS, ONE, ONE),
        *("auto", [3, 4, 8, 128, 0, 128, 0], False),
    ),
    "reshape_and_cache_stacked": (
        *(torch.zeros(2, 3, 4, 2, 16), ROWS, ROWS, SLOTS, ONE, ONE),
        *("auto", [3, 4, 8, 128, 0, 128, 384], False, None),
    ),
    "reshape_and_cache_one": (
        *(CACHE, ROWS, SLOTS, ONE),
        *("auto", [3, 4, 8, 128, 0], False, None),
    ),
    "paged_attention": (
        *(torch.randn(5, 4, 16), CACHE, CACHE.clone()),
        *(int32(0, 5), None, int32(5), int32([0, 1]), None, int32(1)),
        *(None, None, None, None),
        *(0.25, 3, 0, 0.0, "auto", 1, [*GEOMETRY, 0], False),
    ),
    "flash_attn_varlen": (
        *(torch.randn(5, 4, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 16)),
        *(int32(0, 2, 5), int32(0, 4, 9), int32(4, 3), None, int32(1, 0), None),
        *(torch.ones(2, 4) / 8, torch.randn(4), None, None),
        *(0.25, -1, 0, 5.0, "auto", 2, [1, 9, 2, 16, 0, 32, 16, 0, 0], False),
    ),
    "paged_attention_backward": (
        *(torch.randn(5, 4, 16), QUERY, CACHE, CACHE.clone()),
        *(torch.randn(5, 4, 16), torch.randn(4, 5) + 3, None),
        *(int32(0, 5), None, int32(5), int32([0, 1]), None, int32(1)),
        *(None, torch.randn(4), None, None),
        *(0.25, 3, 0, 0.0, "auto", [*GEOMETRY, 0], False, True, False, True),
    ),
    "flash_attn_varlen_backward": (
        *(torch.randn(5, 4, 16), QUERY, KEYS, KEYS + 1),
        *(torch.randn(5, 4, 16), torch.randn(4, 5) + 3, torch.randn(4, 5)),
        *(int32(0, 2, 5), int32(0, 4, 9), int32(4, 3), None, int32(1, 0), None),
        *(torch.ones(2, 4) / 8, torch.randn(4), None, None),
        *(0.25, -1, 0, 5.0, "auto", [1, 9, 2, 16, 0, 32, 16, 0, 0]),
        *(True, True, True, True),
    ),
}


def numbers(t):
    """fp8 as float32: torch can neither compare nor subtract it."""
    return t.float() if t.element_size() == 1 else t


def test_every_op_has_a_sample():
    # Other tests, if this process has run them, have declared ops of users.
    assert set(SAMPLES) == {name for name, op in OPS.items() if type(op) is Op}


def test_handlers_and_declarations_agree():
    """Each target that a lowering names has a handler, and none is left over."""
    wanted = {
        OPS[name].lower(*(args[: len(args) - OPS[name].num_donors])).target
        for name, args in SAMPLES.items()
    }
    feeds = {"xla_ops.host_infeed", "xla_ops.host_outfeed"}  # programs.feed's
    # What no op calls: the CPU client's stand-in for XLA's own collectives.
    assert handlers.load(handlers.HOST) == wanted | feeds | {"xla_ops.host_collective"}
    # And that of users' ops, and what programs of several processes call.
    others = {
        "xla_ops.launch_kernel",
        "xla_ops.peer_add_rms_norm",
        "xla_ops.peer_collective",
        *feeds,
    }
    cuda = handlers.load(handlers.CUDA) - others
    assert cuda in (wanted, frozenset()), "a CUDA build has them all, a CPU build none"


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    op = getattr(torch.ops.xla_ops, name).default
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(op, SAMPLES[name], test_utils=tests)


@pytest.mark.parametrize("name", SAMPLES)
def test_handler_matches_reference_and_fake(name):
    op = OPS[name]
    args = SAMPLES[name]
    bare = args[: len(args) - op.num_donors]
    wanted = op.reference(*bare)
    got = op(*args)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = op(*args)
    as_tuple = lambda r: r if isinstance(r, tuple) else (r,)  # noqa: E731
    for g, w, f in zip(as_tuple(got), as_tuple(wanted), as_tuple(fake), strict=True):
        assert g.shape == w.shape == f.shape
        assert g.dtype == w.dtype == f.dtype
        assert torch.allclose(numbers(g), numbers(w), atol=1e-5)


@pytest.mark.parametrize("name", SAMPLES)
def test_reference_on_xla_matches(name):
    op = OPS[name]
    args = SAMPLES[name]
    bare = args[: len(args) - op.num_donors]
    wanted = op.reference(*bare)
    got, _ = Path("lazy").run(op.reference, *bare)
    as_tuple = lambda r: r if isinstance(r, tuple) else (r,)  # noqa: E731
    # XLA:GPU may multiply the references' fp32 matrices on tensor cores.
    atol = 1e-5 if os.environ["PJRT_DEVICE"] == "CPU" else 1e-3
    for g, w in zip(as_tuple(got), as_tuple(wanted), strict=True):
        assert torch.allclose(numbers(g), numbers(w), atol=atol)


@pytest.mark.parametrize("name", SAMPLES)
def test_functional_ops_leave_their_arguments_alone(name):
    args = SAMPLES[name]
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    OPS[name](*args)
    for a, b in zip(args, before, strict=True):
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", SAMPLES)
def test_lowered_once_a_signature(name):
    op = OPS[name]
    op._plans.clear()
    lowerings = []

    def lower(*args):
        lowerings.append(args)
        return op_lower(*args)

    op_lower = op.lower
    object.__setattr__(op, "lower", lower)
    try:
        for _ in range(2):
            Path("lazy").run(op._in_graph, *SAMPLES[name])
    finally:
        object.__setattr__(op, "lower", op_lower)
    assert len(lowerings) == 1


@pytest.mark.parametrize("name", [n for n in SAMPLES if OPS[n].gradient is None])
def test_backward_raises_by_name(name):
    op = OPS[name]
    args = [
        a.clone().requires_grad_()
        if isinstance(a, torch.Tensor) and a.is_floating_point()
        else a
        for a in SAMPLES[name]
    ]
    with torch.enable_grad():
        results = op(*args)
        results = results if isinstance(results, tuple) else (results,)
        assert all(t.requires_grad == t.is_floating_point() for t in results)
        total = sum(numbers(t).sum() for t in results if t.requires_grad)
        if not isinstance(total, torch.Tensor):
            return  # only integers, through which torch differentiates nothing
        with pytest.raises(RuntimeError) as error:
            total.backward()
    function = error.value.args[0].partition(":")[0].removeprefix("xla_ops.")
    assert function in xla_ops.ops.__all__ or function.endswith("_backward")
    assert f"{function}: has no gradient: " in str(error.value)


@pytest.mark.parametrize("name", SAMPLES)
def test_deterministic(name):
    op = OPS[name]
    results = [op(*SAMPLES[name]) for _ in range(3)]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(numbers(a), numbers(b))


@pytest.mark.parametrize("name", SAMPLES)
def test_the_handler_checks_what_python_checks(name):
    """A call of wrong rank past Python's checks fails in the handler, in words."""
    bound = OPS[name].lowered(SAMPLES[name])
    first, *others = bound.operands
    broken = bound._replace(operands=(first.reshape(-1), *others))
    with pytest.raises(ValueError, match=r"^\w+: [\w ]+ must .*, got "):
        call_directly(broken)


@pytest.mark.parametrize("name", xla_ops.__all__)
def test_public_functions_are_documented(name):
    item = getattr(xla_ops, name)
    if not inspect.isfunction(item):
        return
    doc = inspect.getdoc(item)
    assert doc, name
    if name in xla_ops.ops.__all__:
        for section in ("torch.autocast", "Args:", "Raises:"):
            assert section in doc, f"{name} lacks {section}"
