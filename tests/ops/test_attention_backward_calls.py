"""Ways to the gradients of attention: views, torch's transforms, what has none."""

import resource
from functools import partial

import pytest
import torch
import torch.utils.checkpoint
import torch_xla
import torch_xla.utils.checkpoint
from torch.func import vjp

import xla_ops
from support import Path, int32, same
from varlen import KV_LENS, QUERY_LENS, contiguous, paged
from varlen_gradients import call, cotangents, everything, gradients
from xla_ops.core.op import OPS


@pytest.fixture(autouse=True)
def _grad_mode():
    # Torch counts devices at the first backward of a process: XLA's must be there.
    torch_xla.device()
    with torch.enable_grad():
        yield


def views(packed):
    """How a model makes queries, keys and values of one projection."""
    return packed[:, :4], packed[:, 4:6], packed[:, 6:]


@pytest.mark.parametrize("name", ["cpu", "lazy", "compiled", "dispatched"])
def test_views_of_one_projection(name):
    path = Path(name)
    batch = contiguous([3, 4], [3, 4], 4, 2, 32, torch.float32)
    rest = {n: a for n, a in batch.arguments.items() if n not in ("q", "k", "v")}
    rest, whole = path.put(rest), torch.randn(7, 8, 32)

    def packed(arguments):
        q, k, v = views(arguments["q"])
        return xla_ops.flash_attn_varlen(q, k, v, **rest)

    grads = cotangents(batch)
    got = gradients(path, {"q": whole}, grads, function=packed)["q"]
    apart = dict(zip("qkv", (t.clone() for t in views(whole)), strict=True))
    wanted = gradients(Path("cpu"), {**batch.arguments, **apart}, grads)
    wanted = torch.cat([wanted[n] for n in "qkv"], 1)
    assert torch.allclose(got, wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["cpu", "lazy", "compiled"])
def test_a_detached_view_has_none(name):
    """Though the tensor that it lies in asks for one."""
    path = Path(name)
    batch = contiguous([3, 4], [3, 4], 4, 2, 32, torch.float32)
    rest = {n: a for n, a in batch.arguments.items() if n not in ("q", "k", "v")}
    rest, whole = path.put(rest), torch.randn(7, 8, 32)

    def packed(arguments):
        q, k, v = views(arguments["q"])
        k, v = k.detach(), v.detach()
        return xla_ops.flash_attn_varlen(q, k, v, **rest)

    grads = cotangents(batch)
    got = gradients(path, {"q": whole}, grads, function=packed)["q"]
    assert got[:, 4:].eq(0).all() and got[:, :4].ne(0).any()


@pytest.mark.parametrize("name", ["cpu", "lazy"])
@pytest.mark.parametrize("what", ["stacked", "pair", "flash"])
def test_a_cache_has_none(name, what):
    path = Path(name)
    batch = paged([2, 3], [9, 20], 4, 2, 32, torch.float32, 5)
    a = path.put(batch.arguments)
    query = a["q"].requires_grad_()
    cache = torch.stack([a["k"], a["v"]]).nan_to_num(0.0).requires_grad_()
    if what == "flash":
        out, _ = xla_ops.flash_attn_varlen(**{**a, "k": cache[0], "v": cache[1]})
    else:
        out = xla_ops.paged_attention(
            query,
            cache if what == "stacked" else list(cache.unbind(0)),
            a["seqused_k"],
            a["block_table"],
            a["cu_seqlens_q"],
            2,
            0.2,
        )
    key = "k" if what == "flash" else "kv_cache"
    op = "flash_attn_varlen" if what == "flash" else "paged_attention"
    with pytest.raises(RuntimeError, match=f"{op}: has no gradient: {key} requires"):
        out.sum().backward()


@pytest.mark.parametrize("name", ["cpu", "lazy", "compiled", "dispatched"])
def test_paged_attention(name):
    """The query's, where the cache asks for none; as flash_attn_varlen's."""
    path = Path(name)
    batch = paged([2, 3], [9, 20], 4, 2, 32, torch.float32, 5)
    a = batch.arguments

    def attention(given):
        return xla_ops.paged_attention(
            given["q"],
            [given["k"], given["v"]],
            given["seqused_k"],
            given["block_table"],
            given["cu_seqlens_q"],
            given["num_seqs"],
            32**-0.5,
            sinks=given["sinks"],
            return_lse=True,
        )

    more = {"num_seqs": int32(2), "sinks": torch.randn(4)}
    grads, asked = cotangents(batch), ("q", "sinks")
    got = gradients(path, {**a, **more}, grads, asked, attention)
    wanted = gradients(
        Path("cpu"), {**a, "sinks": more["sinks"], "is_causal": True}, grads, asked
    )
    for argument in asked:
        assert torch.allclose(got[argument], wanted[argument], atol=1e-6)


@pytest.mark.parametrize("name", ["cpu", "lazy"])
def test_slopes_have_none(name):
    path = Path(name)
    batch = contiguous([2], [3], 4, 2, 32, torch.float32)
    arguments = {**batch.arguments, "alibi_slopes": torch.rand(4)}
    with pytest.raises(RuntimeError, match="gradient: alibi_slopes requires one"):
        gradients(path, arguments, cotangents(batch), ("q", "alibi_slopes"))


def test_second_derivatives_have_none(path):
    batch = contiguous([2], [3], 4, 2, 32, torch.float32)
    q = batch.arguments["q"].requires_grad_()
    out, _ = call(batch.arguments)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="flash_attn_varlen: has no gradient: "):
        dq.sum().backward()


@pytest.mark.parametrize(
    "name, checkpoint",
    [
        ("cpu", partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)),
        ("cpu", partial(torch.utils.checkpoint.checkpoint, use_reentrant=True)),
        ("lazy", torch_xla.utils.checkpoint.checkpoint),
        ("compiled", partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)),
        ("dispatched", partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)),
    ],
)
def test_checkpointing(name, checkpoint):
    path = Path(name)
    batch = contiguous([3, 4], [5, 9], 4, 2, 32, torch.float32)
    grads = cotangents(batch)

    def checkpointed(arguments):
        return checkpoint(
            lambda q, k, v: call({**arguments, "q": q, "k": k, "v": v}),
            *(arguments[n] for n in "qkv"),
        )

    got = gradients(path, batch.arguments, grads, "qkv", checkpointed)
    wanted = gradients(path, batch.arguments, grads, "qkv")
    assert all(same(got[n], wanted[n]) for n in "qkv")


@pytest.mark.parametrize("name", ["cpu", "lazy"])
def test_vjp(name):
    path = Path(name)
    batch = contiguous([3, 4], [5, 9], 4, 2, 32, torch.float32)
    grads = cotangents(batch)
    a = path.put(batch.arguments)
    qkv = [a[n] for n in "qkv"]
    _, pull = vjp(lambda q, k, v: call({**a, "q": q, "k": k, "v": v}), *qkv)
    got = pull(tuple(path.put(list(grads))))
    wanted = gradients(path, batch.arguments, grads, "qkv")
    for t, n in zip(got, "qkv", strict=True):
        assert same(t.cpu(), wanted[n])


@pytest.mark.parametrize("name", ["lazy", "compiled", "dispatched"])
def test_paths_agree(name):
    batch = contiguous(QUERY_LENS, KV_LENS, 4, 2, 32, torch.bfloat16)
    arguments = {**batch.arguments, **everything(len(KV_LENS), 4)}
    grads = cotangents(batch)
    got = gradients(Path(name), arguments, grads)
    wanted = gradients(Path("cpu"), arguments, grads)
    assert all(same(got[n], wanted[n]) for n in wanted)


def test_symbolic_sizes():
    """Compiled once, it serves other numbers of tokens."""
    graphs = []
    backend = torch._dynamo.lookup_backend("aot_eager")

    def counting(graph, examples):
        graphs.append(graph)
        return backend(graph, examples)

    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")
    compiled = torch.compile(
        lambda a: xla_ops.flash_attn_varlen(
            *(a[n] for n in names), 64, 64, is_causal=True
        ),
        backend=counting,
        fullgraph=True,
    )

    def call_compiled(arguments):
        for n in "qkv":
            torch._dynamo.mark_dynamic(arguments[n], 0)
        return compiled(arguments)

    cpu = Path("cpu")
    for lens in (([3, 4], [5, 9]), ([5, 4], [5, 12])):
        batch = contiguous(*lens, 4, 2, 32, torch.float32)
        grads = cotangents(batch)
        got = gradients(cpu, batch.arguments, grads, "qkv", call_compiled)
        wanted = gradients(cpu, {**batch.arguments, "is_causal": True}, grads, "qkv")
        assert all(torch.equal(got[n], wanted[n]) for n in "qkv")
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["cpu", "lazy"])
def test_autocast(name):
    """Gradients of the arguments as they were, by way of the autocast dtype."""
    path = Path(name)
    batch = contiguous([3, 4], [5, 9], 4, 2, 32, torch.float32)
    grads = cotangents(batch)

    def cast(arguments):
        with torch.autocast(path.device.type, torch.bfloat16):
            return call(arguments)

    given = {**batch.arguments, "sinks": torch.randn(4)}
    got = gradients(path, given, (grads[0].bfloat16(), grads[1]), function=cast)
    assert all(t.dtype == torch.float32 for t in got.values())
    low = {n: given[n].bfloat16() for n in "qkv"}
    wanted = gradients(path, {**given, **low}, (grads[0].bfloat16(), grads[1]))
    for n, t in got.items():
        assert same(t, wanted[n].float())


def test_deterministic(path):
    """The attribute says so to the handler; and runs are the same, bit for bit."""
    batch = contiguous([50, 70], [50, 70], 4, 2, 32, torch.bfloat16)
    grads = cotangents(batch)
    op = OPS["flash_attn_varlen_backward"]
    seen = []
    lower = op.lower

    def record(*args):
        seen.append(lower(*args).attributes["deterministic"])
        return lower(*args)

    torch.use_deterministic_algorithms(True)
    object.__setattr__(op, "lower", record)
    op._plans.clear()
    try:
        runs = [gradients(path, batch.arguments, grads) for _ in range(3)]
        assert set(seen) == {True}
        torch.use_deterministic_algorithms(False)
        gradients(path, batch.arguments, grads)
        assert set(seen) == {True, False}
    finally:
        object.__setattr__(op, "lower", lower)
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(run[n], runs[0][n]) for n in run)


def test_no_quadratic_memory():
    """64k tokens, of which a row sees 128: as logits they would be 17 GB."""
    tokens = 65536
    q, k, v = (torch.randn(tokens, 1, 8).requires_grad_() for _ in range(3))
    ends = int32(0, tokens)
    call_ = lambda: xla_ops.flash_attn_varlen(  # noqa: E731
        q, k, v, ends, ends, tokens, tokens, is_causal=True, window_left=127
    )
    out, lse = call_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (out.sum() + lse.sum()).backward()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 256 * 1024, f"{grown} KB"
    # The last rows, alone.
    rows = slice(tokens - 200, tokens)
    part = [t.detach()[rows].clone().requires_grad_() for t in (q, k, v)]
    ends = int32(0, 200)
    out, lse = xla_ops.flash_attn_varlen(
        *part, ends, ends, 200, 200, is_causal=True, window_left=127
    )
    (out.sum() + lse.sum()).backward()
    assert torch.allclose(part[0].grad[127:], q.grad[rows][127:], atol=1e-5)
