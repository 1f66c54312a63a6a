"""Sizes that are symbols, in torch.compile and torch.export, and StableHLO."""

import pytest
import torch
from torch.export import Dim, export
from torch_xla.stablehlo import StableHLOGraphModule, exported_program_to_stablehlo

import xla_ops
from support import Path, int32

BACKENDS = [
    ("aot_eager", "cpu"),
    ("inductor", "cpu"),
    ("openxla", "lazy"),
    ("xla_ops", "lazy"),
]
# On both sides of the number of tokens from which on no KV token is cut into splits.
SIZES = (5, 7, 130, 250)
NUM_BLOCKS, PAGE = 32, 8


class Norm(torch.nn.Module):
    dynamic = ("x",)

    def forward(self, x, w):
        return xla_ops.rms_norm(x, w)

    @staticmethod
    def inputs(tokens):
        return {"x": torch.randn(tokens, 16), "w": torch.rand(16)}


class FusedNorm(torch.nn.Module):
    dynamic = ("x", "residual")

    def forward(self, x, residual, w):
        out, total = xla_ops.fused_add_rms_norm(x, residual, w)
        torch.ops.xla_ops.rms_norm(out, total, w, 1e-6)
        return out + total

    @staticmethod
    def inputs(tokens):
        x = torch.randn(tokens, 16)
        return {"x": x, "residual": x + 1, "w": torch.rand(16)}


class Attention(torch.nn.Module):
    """Over keys and values that lie in one packed projection."""

    dynamic = ("qkv",)

    def forward(self, qkv, ends):
        q, k, v = qkv.split([4, 2, 2], dim=1)
        out, lse = xla_ops.flash_attn_varlen(
            q, k, v, ends, ends, 256, 256, is_causal=True
        )
        return out, lse

    @staticmethod
    def inputs(tokens):
        return {"qkv": torch.randn(tokens, 8, 16), "ends": int32(0, tokens)}


class Step(torch.nn.Module):
    """A KV write and paged attention; returns the cache as it is then."""

    dynamic = ("q", "k", "slots")

    def forward(self, q, k, kv, slots, context, tables, starts):
        kv = kv.clone()
        xla_ops.reshape_and_cache_flash(k, k, *kv.unbind(0), slots)
        num_seqs = torch.ones(1, dtype=torch.int32, device=q.device)
        lens = (context, tables, starts, num_seqs)
        return xla_ops.paged_attention(q, kv, *lens, scale=0.25), kv

    @staticmethod
    def inputs(tokens):
        return {
            "q": torch.randn(tokens, 4, 16),
            "k": torch.randn(tokens, 2, 16),
            "kv": torch.zeros(2, NUM_BLOCKS, PAGE, 2, 16),
            "slots": torch.randperm(tokens),
            "context": int32(tokens),
            "tables": torch.arange(NUM_BLOCKS, dtype=torch.int32)[None],
            "starts": int32(0, tokens),
        }


class StepInPlace(Step):
    def forward(self, q, k, kv, slots, context, tables, starts):
        xla_ops.reshape_and_cache_flash(k, k, *kv.unbind(0), slots)
        num_seqs = torch.ones(1, dtype=torch.int32, device=q.device)
        lens = (context, tables, starts, num_seqs)
        return xla_ops.paged_attention(q, kv, *lens, scale=0.25)


class Updates(torch.nn.Module):
    """The other ops that write their arguments, on values and on caches."""

    dynamic = ("qkv", "ids")

    def forward(self, qkv, weight, table, ids, keys, values, others, flat):
        qkv = qkv.clone()
        sizes = (2, 1, 1, 16, 1e-6)
        xla_ops.fused_qk_norm_rope(qkv, *sizes, weight, weight, table, True, ids)
        k, v = qkv.unflatten(1, (4, 16))[:, 2:].split(1, dim=1)
        sizes = (2, 1, 16, 1e-6)
        query = xla_ops.fused_qk_norm_rope_and_cache(
            qkv, *sizes, weight, weight, table, True, ids, *flat.unbind(0), ids
        )
        lens = torch.full((3,), 9, dtype=torch.int32, device=qkv.device)
        starts = torch.arange(0, 4, dtype=torch.int32, device=qkv.device)
        tables = starts[:3, None].repeat(1, 4)
        out = xla_ops.fused_qk_norm_rope_and_paged_attention(
            *(qkv, *sizes, None, None, table, True, ids, *flat.unbind(0), ids),
            *(lens, tables, starts, starts[3:], 0.25),
        )
        xla_ops.reshape_and_cache(k, v, keys, values, ids)
        xla_ops.swap_blocks(keys, others, torch.stack([ids // PAGE, ids % 32], 1))
        penalties = qkv[:, 0].abs() + 1
        xla_ops.apply_repetition_penalties_(qkv, qkv > 1, qkv < -1, penalties)
        gelu = xla_ops.gelu_new(qkv)
        return gelu, query, out, values + 1, others + 1, flat + 1

    @staticmethod
    def inputs(tokens):
        keys = torch.zeros(NUM_BLOCKS, 1, 4, PAGE, 4)
        return {
            "qkv": torch.randn(tokens, 64),
            "weight": torch.rand(16),
            "table": torch.randn(NUM_BLOCKS * PAGE, 16),
            "ids": torch.randperm(tokens),
            "keys": keys,
            "values": torch.zeros(NUM_BLOCKS, 1, 16, PAGE),
            "others": keys + 1,
            "flat": torch.zeros(2, NUM_BLOCKS, PAGE, 1, 16),
        }


MODULES = [Norm, FusedNorm, Attention, Step, StepInPlace, Updates]


def check(got, wanted):
    for g, w in zip(*map(torch.utils._pytree.tree_leaves, (got, wanted)), strict=True):
        assert torch.allclose(g.cpu(), w.cpu(), atol=1e-5)


@pytest.mark.parametrize("backend, path", BACKENDS)
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("how", ["marked", "dynamic"])
def test_compiled_once_for_all_sizes(backend, path, module, how):
    """XLA's backends make a program for each size, all of one trace."""
    path, module = Path(path), module()
    graphs = []
    real = torch._dynamo.lookup_backend(backend)

    def counting(graph, examples):
        graphs.append(graph)
        return real(graph, examples)

    dynamic = True if how == "dynamic" else None
    compiled = torch.compile(module, backend=counting, fullgraph=True, dynamic=dynamic)
    for tokens in SIZES:
        cpu = module.inputs(tokens)
        given = path.put(cpu)
        if how == "marked":
            for name in module.dynamic:
                torch._dynamo.mark_dynamic(given[name], 0)
        wanted = module(**cpu)
        check(compiled(**given), wanted)
        path.wait()
        check(given, cpu)
    assert len(graphs) == 1


@pytest.mark.parametrize("backend, path", BACKENDS)
def test_a_view_whose_place_follows_from_no_single_size(backend, path):
    """Its base's head_dim is a sum of two: the graph is tied to them, and is right."""
    path = Path(path)

    def attend(left, right, ends):
        return Attention()(torch.cat([left, right], dim=2), ends)

    compiled = torch.compile(attend, backend=backend, fullgraph=True, dynamic=True)
    for tokens, left, right in ((5, 8, 24), (6, 8, 24), (6, 16, 32)):
        halves = [torch.randn(tokens, 8, size) for size in (left, right)]
        given = (*halves, int32(0, tokens))
        check(compiled(*path.put(given)), attend(*given))


def exported(module, tokens, strict=False):
    given = module.inputs(tokens)
    count = Dim("tokens", min=2, max=256)
    shapes = {n: {0: count} if n in module.dynamic else None for n in given}
    return export(module, (), given, dynamic_shapes=shapes, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("module", MODULES)
def test_exported_with_a_dynamic_number_of_tokens(module, strict):
    module = module()
    program = exported(module, 6, strict).module()
    for tokens in (2, *SIZES, 256):
        given, own = module.inputs(tokens), {}
        own = {name: t.clone() for name, t in given.items()}
        check(program(**given), module(**own))
        check(given, own)


def test_splits_are_chosen_when_sizes_are_known(monkeypatch):
    """Not in the export, which knows no size."""
    from xla_ops.ops import attention

    chosen = []
    real = attention.handlers.plan

    def plan(platform, op, request, num_results):
        chosen.append(request)
        return real(platform, op, request, num_results)

    monkeypatch.setattr(attention.handlers, "plan", plan)
    program = exported(Attention(), 6).module()
    assert not chosen
    for tokens in (3, 200):
        program(**Attention.inputs(tokens))
        assert chosen[-1][0] == tokens


@pytest.mark.parametrize("module", [Norm, FusedNorm, Attention, Step])
def test_stablehlo_round_trip(module, tmp_path):
    """Static sizes, which are all that a custom call has in torch_xla."""
    module = module()
    given = module.inputs(6)
    program = exported_program_to_stablehlo(export(module, tuple(given.values())))
    assert "stablehlo.custom_call @xla_ops." in program.get_stablehlo_text()
    wanted = module(**given)
    check(program(*given.values()), wanted)
    program.save(tmp_path)
    check(StableHLOGraphModule.load(tmp_path)(*given.values()), wanted)
