"""The vector of a step: what is packed comes out, and padding is what it has to be."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xla_ops.vllm import tuning
from xla_ops.vllm.step import Layout, Step, buckets


@st.composite
def steps(draw):
    """A layout, and a step that fits into it."""
    tokens = draw(st.integers(1, 40))
    rows = draw(st.integers(1, tokens))
    logit_rows = draw(st.integers(rows, 48))
    blocks = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    position_rows = draw(st.sampled_from([1, 3]))
    has_adapters = draw(st.booleans())
    layout = Layout(tokens, rows, logit_rows, blocks, position_rows, has_adapters)
    r = draw(st.integers(0, rows))
    n = draw(st.integers(r, tokens)) if r else 0
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))

    def numbers(*shape):
        return rng.integers(0, 1 << 30, shape, dtype=np.int32)

    starts = np.concatenate([[0], np.sort(rng.integers(0, n + 1, r))]).astype(np.int32)
    step = Step(
        numbers(n),
        numbers(position_rows, n),
        numbers(n) if draw(st.booleans()) else None,
        starts,
        numbers(r),
        numbers(r),
        [(numbers(n), numbers(r, draw(st.integers(0, b)))) for b in blocks],
        numbers(n) if has_adapters and draw(st.booleans()) else None,
    )
    return layout, step


@settings(max_examples=100, deadline=None)
@given(steps())
def test_what_is_packed_comes_out(given_):
    layout, step = given_
    vector = layout.pack(step)
    assert vector.dtype == np.int32 and vector.shape == (layout.size,)
    fields = {
        name: field.numpy()
        for name, field in layout.unpack(torch.from_numpy(vector)).items()
    }
    assert {name: f.shape for name, f in fields.items()} == layout.fields
    n, r = step.token_ids.size, step.context_lens.size
    assert (fields["token_ids"][:n] == step.token_ids).all()
    assert (fields["positions"][:, :n] == step.positions).all()
    sources = -1 if step.sources is None else step.sources
    assert (fields["sources"][:n] == sources).all()
    assert (fields["sources"][n:] == -1).all()
    assert (fields["query_start_loc"][: r + 1] == step.query_start_loc).all()
    assert (fields["query_start_loc"][r:] == step.query_start_loc[-1]).all()
    assert (fields["context_lens"][:r] == step.context_lens).all()
    assert (fields["context_lens"][r:] == 0).all()
    assert (fields["logit_indices"][:r] == step.logit_indices).all()
    assert fields["num_seqs"] == r
    assert ("adapter_slots" in fields) == layout.has_adapters
    if layout.has_adapters:
        slots = -1 if step.adapter_slots is None else step.adapter_slots
        assert (fields["adapter_slots"][:n] == slots).all()
        assert (fields["adapter_slots"][n:] == -1).all()
    for group, (slots, table) in enumerate(step.groups):
        assert (fields[f"slots_{group}"][:n] == slots).all()
        assert (fields[f"slots_{group}"][n:] == -1).all()
        got = fields[f"block_tables_{group}"][:r, : table.shape[1]]
        assert (got == table).all()


@pytest.mark.parametrize("groups, position_rows", [(1, 1), (3, 3)])
def test_a_step_of_nothing(groups, position_rows):
    layout = Layout(8, 4, 8, (5,) * groups, position_rows)
    fields = layout.unpack(
        torch.from_numpy(layout.pack(Step.empty(groups, position_rows)))
    )
    assert fields["num_seqs"].item() == 0
    assert not fields["query_start_loc"].any()
    for group in range(groups):
        assert (fields[f"slots_{group}"] == -1).all()


@pytest.mark.parametrize(
    "smallest, largest, wanted",
    [
        (8, 64, [8, 16, 32, 64]),
        (8, 100, [8, 16, 32, 64, 100]),
        (8, 8, [8]),
        (5, 5, [5]),
        (1, 3, [1, 2, 3]),
        (128, 1000, [128, 256, 384, 512, 768, 1000]),
        (1024, 8192, [1024, 1536, *range(2048, 8193, 512)]),
        (8192, 16384, [*range(8192, 16385, 1024)]),
        (2048, 2600, [2048, 2560, 2600]),
    ],
)
def test_buckets(smallest, largest, wanted):
    assert buckets(smallest, largest) == wanted


def test_a_vector_that_is_given_is_written_whole():
    layout = Layout(16, 4, 4, (5, 2))
    step = Step.empty(2, 1)
    given = np.full(layout.size, 77, np.int32)
    assert layout.pack(step, given) is given
    assert (given == layout.pack(step)).all()


def test_what_is_tried_for_products_of_a_step(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    no_triton = {"xla_gpu_enable_triton_gemm": False}
    nothing = no_triton | {"xla_gpu_autotune_level": 0}
    options = tuning.compile_options
    assert options(16, is_quantised=False) == {}
    assert options(32, is_quantised=False) == nothing
    assert options(256, is_quantised=False) == nothing
    assert options(384, is_quantised=False) == no_triton
    assert options(8, is_quantised=True) == no_triton
    assert options(64, is_quantised=True) == no_triton
    for flag in ("xla_gpu_enable_triton_gemm=true", "xla_gpu_autotune_level=3"):
        monkeypatch.setenv("XLA_FLAGS", f"--{flag}")
        assert options(32, is_quantised=True) == {}
