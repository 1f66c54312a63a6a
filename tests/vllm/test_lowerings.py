"""xla_ops.vllm: vLLM's own ops, by its schemas, on every path.

Three ops are given, before the lowerings are registered, what vLLM's compiled libraries
give them: a schema and kernels. The others are defined by the lowerings.
tests/vllm/test_vllm_code.py does the same with vLLM's own Python code.
"""

import pytest
import torch
import torch_xla
from torch._dynamo.backends.common import aot_autograd

import xla_ops.vllm
from support import Path

EPS = 1e-5
# Written by the kernels that stand for vLLM's own.
OWN = 42.0

_own = torch.library.Library("_C", "FRAGMENT")
_own.define(
    "rms_norm(Tensor! result, Tensor input, Tensor weight, float epsilon) -> ()"
)
_own_cache = torch.library.Library("_C_cache_ops", "FRAGMENT")
_own_cache.define(
    "copy_blocks(Tensor(a!)[] key_caches, Tensor[](b!) value_caches,"
    " Tensor block_mapping) -> ()"
)
_own_fa2 = torch.library.Library("_vllm_fa2_C", "FRAGMENT")
_own_fa2.define(
    "varlen_fwd(Tensor! q, Tensor k, Tensor v, Tensor!? out, Tensor cu_seqlens_q,"
    " Tensor cu_seqlens_k, Tensor? seqused_k, Tensor? leftpad_k, Tensor? block_table,"
    " Tensor? alibi_slopes, int max_seqlen_q, int max_seqlen_k, float p_dropout,"
    " float softmax_scale, bool zero_tensors, bool is_causal, int window_size_left,"
    " int window_size_right, float softcap, bool return_softmax, Generator? gen)"
    " -> Tensor[]"
)


def own_rms_norm(result, input, weight, epsilon):
    result.fill_(OWN)


def own_copy_blocks(key_caches, value_caches, block_mapping):
    for cache in (*key_caches, *value_caches):
        cache.fill_(OWN)


def own_varlen_fwd(q, k, v, out, *_):
    out = torch.empty_like(q) if out is None else out
    return [out.fill_(OWN), q.new_full((q.shape[1], q.shape[0]), OWN)]


for _key in ("CPU", "CUDA"):
    _own.impl("rms_norm", own_rms_norm, _key)
    _own_fa2.impl("varlen_fwd", own_varlen_fwd, _key)
    _own_cache.impl("copy_blocks", own_copy_blocks, _key)


def graph_of_rms_norm():
    """Returns the code of the graph that torch.compile makes of it on the CPU."""
    code = []

    def compiler(graph, _):
        code.append(graph.print_readable(print_output=False))
        return graph.forward

    def f(result, x, w):
        torch.ops._C.rms_norm(result, x, w, EPS)
        return result + 1

    torch._dynamo.reset()
    compiled = torch.compile(f, backend=aot_autograd(fw_compiler=compiler))
    result = torch.zeros(2, 8)
    with torch.no_grad():
        plus_one = compiled(result, torch.ones(2, 8), torch.ones(8))
    assert torch.all(result == OWN)
    assert torch.all(plus_one == OWN + 1)
    return code


def schema_error():
    """Returns what registering says where the op has another schema."""
    other = torch.library.Library("_C", "FRAGMENT")
    other.define("gelu_and_mul(Tensor! out, Tensor input, float limit) -> ()")
    with pytest.raises(ValueError) as error:
        xla_ops.vllm.register_gelu_and_mul_lowering()
    other._destroy()
    return str(error.value)


GRAPH_BEFORE = graph_of_rms_norm()
SCHEMA_ERROR = schema_error()
xla_ops.vllm.register_lowerings()


def rows(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


def empty(*shape, dtype=torch.float32):
    """A result to be overwritten: all bits set, which no op here gives."""
    size = torch.empty((), dtype=dtype).element_size()
    return torch.full((*shape[:-1], shape[-1] * size), 255, dtype=torch.uint8).view(
        dtype
    )


FP8 = torch.float8_e4m3fn
ONE = torch.ones(1)
# By op: the arguments. Every one that vLLM writes is compared.
CASES = {
    "rms_norm": (empty(5, 24), rows(5, 24), rows(24), EPS),
    "fused_add_rms_norm": (rows(5, 24), rows(5, 24), rows(24), EPS),
    "rms_norm_static_fp8_quant": (
        empty(5, 24, dtype=FP8),
        rows(5, 24),
        rows(24),
        ONE / 64,
        EPS,
    ),
    "fused_add_rms_norm_static_fp8_quant": (
        empty(5, 24, dtype=FP8),
        rows(5, 24),
        rows(5, 24),
        rows(24),
        ONE / 64,
        EPS,
    ),
    "rms_norm_dynamic_per_token_quant": (
        empty(5, 24, dtype=torch.int8),
        rows(5, 24),
        rows(24),
        empty(5, 1),
        EPS,
        None,
        rows(5, 24),
    ),
    "rotary_embedding": (
        torch.tensor([3, 0, 7]),
        rows(3, 4 * 16),
        rows(3, 2 * 16),
        16,
        rows(8, 16),
        True,
    ),
    "fused_qk_norm_rope": (
        rows(3, 8 * 16),
        *(4, 2, 2, 16, EPS, rows(16), rows(16) + 1, rows(8, 16)),
        *(True, torch.tensor([3, 0, 7])),
    ),
    "silu_and_mul": (empty(5, 12), rows(5, 24)),
    "mul_and_silu": (empty(5, 12), rows(5, 24)),
    "gelu_and_mul": (empty(5, 12), rows(5, 24)),
    "gelu_tanh_and_mul": (empty(5, 12), rows(5, 24)),
    "silu_and_mul_quant": (
        empty(5, 12, dtype=FP8),
        rows(5, 24).half(),
        ONE / 64,
    ),
    "fatrelu_and_mul": (empty(5, 12), rows(5, 24), 0.5),
    "swigluoai_and_mul": (empty(5, 12), rows(5, 24), 1.5, 0.75),
    "gelu_new": (empty(5, 24), rows(5, 24)),
    "gelu_fast": (empty(5, 24), rows(5, 24)),
    "gelu_quick": (empty(5, 24), rows(5, 24)),
    "static_scaled_fp8_quant": (empty(5, 24, dtype=FP8), rows(5, 24), ONE / 64),
    "dynamic_scaled_fp8_quant": (empty(5, 24, dtype=FP8), rows(5, 24), empty(1)),
    "dynamic_per_token_scaled_fp8_quant": (
        empty(5, 24, dtype=FP8),
        rows(5, 24),
        empty(5, 1),
        None,
    ),
    "static_scaled_int8_quant": (
        empty(5, 24, dtype=torch.int8),
        rows(5, 24),
        ONE / 64,
        torch.ones(1, dtype=torch.int32),
    ),
    "dynamic_scaled_int8_quant": (
        empty(5, 24, dtype=torch.int8),
        rows(5, 24),
        empty(5, 1),
        empty(5, 1, dtype=torch.int32),
    ),
    "apply_repetition_penalties_": (
        rows(5, 24),
        rows(5, 24) > 0.5,
        rows(5, 24) < -0.5,
        rows(5).abs() + 1,
    ),
    "merge_attn_states": (
        empty(5, 4, 16),
        empty(4, 5),
        rows(5, 4, 16),
        rows(4, 5),
        rows(5, 4, 16) + 1,
        rows(4, 5) + 1,
    ),
    "flash_attn_varlen": (
        rows(5, 4, 16),
        rows(6, 8, 2, 16),
        rows(6, 8, 2, 16) + 1,
        empty(5, 4, 16),
        torch.tensor([0, 2, 5], dtype=torch.int32),
        torch.zeros(3, dtype=torch.int32),
        torch.tensor([9, 3], dtype=torch.int32),
        None,
        torch.tensor([[4, 1], [2, 0]], dtype=torch.int32),
        rows(4).abs(),
        *(3, 16, 0.0, 0.25, False, True, 4, -1, 20.0, False, None),
    ),
    "reshape_and_cache_flash": (
        rows(3, 2, 16),
        rows(3, 2, 16) + 1,
        torch.zeros(4, 8, 2, 16),
        torch.zeros(4, 8, 2, 16),
        torch.tensor([9, -1, 30]),
        "auto",
        torch.ones(()),
        torch.ones(()),
    ),
    "reshape_and_cache": (
        rows(3, 2, 16),
        rows(3, 2, 16) + 1,
        torch.zeros(4, 2, 4, 8, 4),
        torch.zeros(4, 2, 16, 8),
        torch.tensor([9, -1, 30]),
        "auto",
        torch.ones(()),
        torch.ones(()),
    ),
    "convert_fp8": (empty(4, 8, 2, 16, dtype=FP8), rows(4, 8, 2, 16), 0.5, "fp8"),
    "swap_blocks": (
        rows(6, 8, 2, 16),
        rows(4, 8, 2, 16) + 1,
        torch.tensor([[5, 2], [1, 3]]),
    ),
    "copy_blocks": (
        [rows(4, 8, 2, 16)],
        [rows(4, 8, 2, 16) + 1],
        torch.tensor([[0, 2], [1, 3]]),
    ),
}


# What replaces our front where there are kernels of vLLM's.
OWN_KERNELS = {
    "rms_norm": own_rms_norm,
    "copy_blocks": own_copy_blocks,
    "flash_attn_varlen": own_varlen_fwd,
}


def vllm_op(name):
    """The op of vLLM's whose lowering is called `name`."""
    if name == "flash_attn_varlen":
        return torch.ops._vllm_fa2_C.varlen_fwd
    cache_ops = ("reshape_and_cache", "reshape_and_cache_flash", "convert_fp8")
    cache_ops += ("copy_blocks", "swap_blocks")
    namespace = torch.ops._C_cache_ops if name in cache_ops else torch.ops._C
    return getattr(namespace, name)


def front(name):
    """The mutable op of ours that must do what vLLM's does."""
    packet = getattr(torch.ops.xla_ops, name)
    overload = "out" if "out" in packet.overloads() else "default"
    return getattr(packet, overload)


def flat(tree):
    leaves = torch.utils._pytree.tree_leaves(tree)
    tensors = filter(is_tensor, leaves)
    return [t.view(torch.uint8) if t.dtype == FP8 else t for t in tensors]


def is_tensor(leaf):
    return isinstance(leaf, torch.Tensor)


def test_every_lowering_has_a_case():
    registrars = {f"register_{name}_lowering" for name in CASES}
    public = {n for n in vars(xla_ops.vllm) if n.startswith("register_")}
    assert public == registrars | {"register_lowerings"}


@pytest.mark.parametrize("name", CASES)
def test_same_as_our_front(path, name):
    expected = front(name)
    if not path.is_xla:
        expected = OWN_KERNELS.get(name, expected)
    results, wanted = path.run(lambda *args: expected(*args), *CASES[name])
    results, wanted = flat(results), flat(wanted)
    before = flat(CASES[name])
    assert any(not torch.equal(a, b) for a, b in zip(before, wanted, strict=True))

    got, after = path.run(lambda *args: vllm_op(name)(*args), *CASES[name])
    for a, b in zip(flat(got) + flat(after), results + wanted, strict=True):
        assert torch.equal(a, b)


# Its schema has no other result than the argument in place, so torch.autograd can
# follow it.
DIFFERENTIABLE = "fused_qk_norm_rope"


@pytest.mark.parametrize("name", ["lazy", "compiled"])
def test_gradients_by_vllms_name(name):
    path = Path(name)

    def gradients(op):
        qkv, *rest = path.put(CASES[DIFFERENTIABLE])

        def call(qkv, *rest):
            qkv = qkv.clone()
            op(qkv, *rest)
            return qkv.square().sum()

        leaves = [qkv, *(t for t in rest if is_tensor(t) and t.is_floating_point())][:3]
        for leaf in leaves:
            leaf.requires_grad_()
        with torch.enable_grad():
            path.function(call)(qkv, *rest).backward()
        return [leaf.grad.cpu() for leaf in leaves]

    got, expected = gradients(vllm_op(DIFFERENTIABLE)), gradients(front(DIFFERENTIABLE))
    for a, b in zip(got, expected, strict=True):
        assert a.any() and torch.equal(a, b)


@pytest.mark.parametrize("name", ["lazy", "compiled"])
@pytest.mark.parametrize("op", sorted(CASES.keys() - {DIFFERENTIABLE}))
def test_gradients_are_refused_by_name(op, name):
    """Where the front runs: vLLM's own kernels know nothing of ours."""
    tensors = [t for t in torch.utils._pytree.tree_leaves(CASES[op]) if is_tensor(t)]
    asks = next(t for t in tensors if t.dtype == torch.float32)
    path = Path(name)
    args = path.put(CASES[op])
    leaves, spec = torch.utils._pytree.tree_flatten(args)
    at = [leaf is asks for leaf in torch.utils._pytree.tree_leaves(CASES[op])].index(
        True
    )
    leaves[at].requires_grad_()
    call = path.function(lambda *args: vllm_op(op)(*args))
    with torch.enable_grad(), pytest.raises(Exception) as error:
        call(*torch.utils._pytree.tree_unflatten(leaves, spec))
    assert f"xla_ops.{op}: has no gradient: " in str(error.value)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("compiled", [False, True])
# With and without kernels of vLLM's.
@pytest.mark.parametrize("name", ["rms_norm", "silu_and_mul"])
def test_through_a_view(name, compiled, mode):
    result, *rest = CASES[name]
    _, (wanted, *_) = Path("lazy").run(front(name), *CASES[name])

    def call(base, *rest):
        vllm_op(name)(base[1:6], *rest)
        return base * 2

    f = torch.compile(call, backend="openxla", fullgraph=True) if compiled else call
    with mode():
        device = torch_xla.device()
        base = torch.full((7, result.shape[1]), 7.0).to(device)
        rest = [t.to(device) if is_tensor(t) else t for t in rest]
        torch_xla.sync()
        doubled = f(base, *rest)
        torch_xla.sync()
        expected = torch.full((7, result.shape[1]), 7.0)
        expected[1:6] = wanted
        assert torch.equal(base.cpu(), expected)
        assert torch.equal(doubled.cpu(), expected * 2)


@pytest.mark.parametrize("name", ["lazy", "compiled"])
def test_varlen_fwd_returns_out_and_lse(name):
    q, k, v, _, *rest = CASES["flash_attn_varlen"]
    (wanted, lse), _ = Path(name).run(front("flash_attn_varlen"), q, k, v, None, *rest)
    assert not torch.isnan(wanted).any() and lse.shape == (4, 5)

    def into_view(q, k, v, base, *rest):
        return torch.ops._vllm_fa2_C.varlen_fwd(q, k, v, base[1:6], *rest)

    base = torch.full((7, 4, 16), 7.0)
    (got, got_lse), args = Path(name).run(into_view, q, k, v, base, *rest)
    assert torch.equal(got, wanted) and torch.equal(got_lse, lse)
    assert torch.equal(args[3][1:6], wanted)
    assert torch.all(args[3][[0, 6]] == 7)


def test_varlen_fwd_of_meta_tensors():
    """What tracing asks of an op for other devices: shapes."""
    args = [t.to("meta") if is_tensor(t) else t for t in CASES["flash_attn_varlen"]]
    out, lse = torch.ops._vllm_fa2_C.varlen_fwd(*args)
    assert out is args[3] and (lse.shape, lse.dtype) == ((4, 5), torch.float32)


@pytest.mark.parametrize(
    "at, value, text",
    [
        (12, 0.1, "p_dropout must be 0, got 0.1"),
        (19, True, "return_softmax must be False, got True"),
        (3, empty(5, 4, 8), "out must have shape [5, 4, 16], got [5, 4, 8]"),
        (3, empty(5, 4, 16).half(), "out must be float32, got float16"),
    ],
)
def test_varlen_fwd_refuses(path, at, value, text):
    args = list(CASES["flash_attn_varlen"])
    args[at] = value
    with pytest.raises(Exception) as error:
        path.run(front("flash_attn_varlen"), *args)
    assert "flash_attn_varlen: " + text in str(error.value)


def test_defaults_of_the_schema(path):
    _, (wanted, _) = path.run(
        lambda out, x: torch.ops._C.swigluoai_and_mul(out, x, 1.702, 7.0),
        *(empty(5, 12), 9 * rows(5, 24)),
    )
    _, (got, _) = path.run(
        lambda out, x: torch.ops._C.swigluoai_and_mul(out, x),
        *(empty(5, 12), 9 * rows(5, 24)),
    )
    assert torch.equal(got, wanted) and got.isfinite().all()


def test_own_kernels_keep_their_graph():
    assert graph_of_rms_norm() == GRAPH_BEFORE
    assert "_C.rms_norm.default" in GRAPH_BEFORE[0]
    assert "auto_functionalized" in GRAPH_BEFORE[0]


def test_again_does_nothing():
    kernel = torch._C._dispatch_dump("_C::rms_norm")
    xla_ops.vllm.register_lowerings()
    xla_ops.vllm.register_rms_norm_lowering()
    assert torch._C._dispatch_dump("_C::rms_norm") == kernel


def test_our_checks_apply(path):
    bad = (empty(4, 12), rows(5, 24))
    with pytest.raises(Exception) as error:
        path.run(lambda *args: torch.ops._C.silu_and_mul(*args), *bad)
    text = "silu_and_mul: result must have shape [5, 12], got [4, 12]"
    assert text in str(error.value)


def test_other_schema():
    assert SCHEMA_ERROR == (
        "register_gelu_and_mul_lowering: torch.ops._C.gelu_and_mul must have the schema"
        f" {torch.ops._C.gelu_and_mul.default._schema}, got _C::gelu_and_mul("
        "Tensor($0! -> ) out, Tensor input, float limit) -> ()"
    )
