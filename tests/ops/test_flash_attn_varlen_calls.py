"""xla_ops.flash_attn_varlen: what programs its calls make, and what they ask for."""

import pytest
import torch
import torch_xla
import torch_xla.debug.metrics as met

import xla_ops
from support import Path, int32
from varlen import contiguous, paged
from xla_ops.core import handlers


def programs():
    return met.counter_value("UncachedCompile") or 0


def test_bounds_seldom_make_new_programs():
    """max_seqlen_q never does, max_seqlen_k once an octave or less often."""
    path = Path("lazy")
    given = path.put(contiguous([1, 1], [1990, 4], 2, 1, 32, torch.float32).arguments)
    xla_ops.flash_attn_varlen(**given)[0].cpu()
    before = programs()
    for n in range(7):
        given |= {"max_seqlen_q": 1 + n, "max_seqlen_k": 1991 + n}
        xla_ops.flash_attn_varlen(**given)[0].cpu()
    assert programs() == before


def test_symbolic_sizes_tie_no_graph():
    """torch.compile makes sizes symbolic once they change; a plan must not fix them."""
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(xla_ops.flash_attn_varlen, backend=counter, dynamic=True)
    for tokens, longest in [(5, 1100), (6, 1101), (7, 1900), (8, 2047)]:
        q = torch.randn(tokens, 4, 16)
        k = torch.randn(2100, 2, 16)
        starts, kv_starts = int32(0, tokens), int32(0, longest)
        given = (q, k, k, starts, kv_starts, tokens, longest)
        out, _ = step(*given, is_causal=True)
        expected, _ = xla_ops.flash_attn_varlen(*given, is_causal=True)
        assert torch.equal(out, expected)
    assert counter.frame_count == 1


def test_library_is_asked_for_splits_and_workspace(monkeypatch, lowered):
    asked = []

    def plan(platform, op, request, num_results):
        asked.append((platform, op, request, num_results))
        return 7, 4321

    monkeypatch.setattr(handlers, "plan", plan)
    monkeypatch.setattr(handlers, "loaded", lambda platform, target: False)
    batch = contiguous([2, 1], [1500, 600], 4, 2, 16, torch.float32)
    xla_ops.flash_attn_varlen(**batch.arguments)
    (call,) = lowered
    assert call.attributes["num_splits"] == 7
    assert [spec.shape for spec in call.scratch] == [(4321,)]
    # Tokens, heads, KV heads, head_dim, sequences; the bound in octaves; splits.
    sizes = 3, 4, 2, 16, 2
    choose = ("Host", "attention", (*sizes, 1024, 0), 2)
    assert asked == [choose, ("Host", "attention", (*sizes, 2048, 7), 2)]


def test_without_a_library_nothing_is_cut(monkeypatch, lowered):
    monkeypatch.setattr(handlers, "plan", lambda *args: None)
    monkeypatch.setattr(handlers, "loaded", lambda platform, target: False)
    batch = contiguous([2, 1], [1500, 600], 4, 2, 16, torch.float32)
    xla_ops.flash_attn_varlen(**batch.arguments)
    assert [call.attributes["num_splits"] for call in lowered] == [1]


def test_absent_operands_are_no_parameters():
    given = Path("lazy").put(contiguous([2], [5], 2, 1, 32, torch.float32).arguments)
    results = xla_ops.flash_attn_varlen(**given)
    hlo = torch_xla._XLAC._get_xla_tensors_hlo(list(results))
    entry = hlo[hlo.index("ENTRY") :]
    assert entry.count(" parameter(") == 5, "q, k, v and two prefix sums"


def test_torch_op_takes_the_arguments_in_order(path):
    batch = paged([3, 1], [10, 18], 4, 2, 32, torch.float32, 8)
    a = batch.arguments
    wanted = batch.check(
        path, softmax_scale=0.3, window_left=4, window_right=2, softcap=9.0
    )

    def call(*args):
        return torch.ops.xla.flash_attn_varlen_op(*args)

    got, _ = path.run(
        call,
        *(a["q"], a["k"], a["v"], a["cu_seqlens_q"], None, 3, 18),
        *(0.3, False, 4, 2, 9.0, a["seqused_k"], a["block_table"]),
    )
    assert all(torch.equal(g, w) for g, w in zip(got, wanted, strict=True))


@pytest.mark.parametrize("name", ["lazy", "cpu"])
def test_debug_mode_reports_block_ids(name, debug_mode, capfd):
    given = paged([1], [12], 2, 1, 32, torch.float32, 4).arguments
    given["block_table"][0, 1] = 77
    Path(name).run(lambda a: xla_ops.flash_attn_varlen(**a), given)
    captured = capfd.readouterr()
    text = captured.err + captured.out
    assert "flash_attn_varlen: block_table[0, 1] must be" in text
    assert "got 77; masked" in text
