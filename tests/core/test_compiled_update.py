"""Updates of CPU and CUDA tensors under torch.compile: as eager, and in place."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from xla_ops.core import handlers

BACKENDS = pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
SHAPE = (2, 5, 4, 2, 8)
ROWS, SLOTS = torch.randn(3, 2, 8), torch.tensor([1, 7, -1])


def write(cache, rows, slots):
    key_cache, value_cache = cache.unbind(0)
    xla_ops.reshape_and_cache_flash(rows, 2 * rows, key_cache, value_cache, slots)


def read_before_and_after(cache, rows, slots):
    old = cache[0, 0] + 0
    write(cache, rows, slots)
    new = cache.sum()
    return old, new


def write_twice(cache, rows, slots):
    write(cache, rows, slots)
    between = cache[1] * 1  # Inductor of torch 2.9.0 gets a clone wrong: in_place.md
    write(cache, 3 * rows, slots)
    return between, cache.sum()


def write_and_return(cache, rows, slots):
    write(cache, rows, slots)
    return cache, cache[0]


def write_a_clone(cache, rows, slots):
    """The input keeps its value."""
    other = cache.clone()
    write(other, rows, slots)
    return other


def write_between_aten_updates(cache, rows, slots):
    cache.mul_(2)
    write(cache, rows, slots)
    cache.add_(1)
    return cache.amax()


def write_a_new_cache(cache, rows, slots):
    other = torch.zeros_like(cache)
    write(other, rows, slots)
    return other + cache


def copy_pages(cache, rows, slots):
    write(cache, rows, slots)
    pairs = torch.tensor([[0, 3], [1, 0]], device=cache.device)
    xla_ops.copy_blocks([cache[0]], [cache[1]], pairs)
    return cache[0, 3]


def break_the_graph(cache, rows, slots):
    write(cache, rows, slots)
    torch._dynamo.graph_break()
    write(cache, -rows, slots)
    return cache.sum()


PROGRAMS = [
    read_before_and_after,
    write_twice,
    write_and_return,
    write_a_clone,
    write_between_aten_updates,
    write_a_new_cache,
    copy_pages,
    break_the_graph,
]


@BACKENDS
@pytest.mark.parametrize("program", PROGRAMS)
def test_values_are_those_of_eager(program, backend):
    cache = torch.randn(SHAPE)
    mine = cache.clone()
    address = mine.data_ptr()
    compiled = torch.compile(program, backend=backend)
    for _ in range(2):
        wanted = program(cache, ROWS, SLOTS)
        got = compiled(mine, ROWS, SLOTS)
        torch.testing.assert_close(got, wanted)
        assert torch.equal(mine, cache)
        assert mine.data_ptr() == address


# Key and value caches of a stacked one, by what is stacked.
LAYOUTS = {
    "K and V": ((2, 5, 4, 2, 8), lambda kv: kv.unbind(0)),
    "K and V of a block": ((5, 2, 4, 2, 8), lambda kv: kv.unbind(1)),
    "HND": ((2, 5, 2, 4, 8), lambda kv: kv.transpose(2, 3).unbind(0)),
    "parts of a head": ((5, 4, 2, 20), lambda kv: (kv[..., 2:10], kv[..., 10:18])),
}


def whole(key_cache, value_cache):
    return key_cache, value_cache


def last_pages(key_cache, value_cache):
    return key_cache[:, 1:], value_cache[:, 1:]


@BACKENDS
@pytest.mark.parametrize("handler", [True, False], ids=["handler", "reference"])
@pytest.mark.parametrize("inside", [whole, last_pages])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_made_outside(layout, inside, handler, backend, monkeypatch):
    """What lies beside them stays."""
    if not handler:
        monkeypatch.setattr(handlers, "loaded", lambda platform, target: False)
    shape, take = LAYOUTS[layout]
    cache = torch.randn(shape)
    mine = cache.clone()

    def step(key_cache, value_cache, rows, slots):
        caches = inside(key_cache, value_cache)
        xla_ops.reshape_and_cache_flash(rows, 2 * rows, *caches, slots)
        pairs = torch.tensor([[0, 2], [1, 0]])
        xla_ops.copy_blocks(*([c] for c in caches), pairs)
        xla_ops.swap_blocks(*caches, pairs[:1])
        return key_cache.sum()

    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for _ in range(2):
        wanted = step(*take(cache), ROWS, SLOTS)
        torch.testing.assert_close(compiled(*take(mine), ROWS, SLOTS), wanted)
        assert torch.equal(mine, cache)


@BACKENDS
def test_views_of_another_dtype(backend):
    def step(cache, rows, slots):
        key_cache, value_cache = (t.view(torch.float8_e4m3fn) for t in cache)
        xla_ops.reshape_and_cache_flash(
            rows, 2 * rows, key_cache, value_cache, slots, "fp8"
        )

    cache = torch.arange(640).to(torch.uint8).reshape(SHAPE)
    mine = cache.clone()
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    for _ in range(2):
        step(cache, ROWS, SLOTS)
        compiled(mine, ROWS, SLOTS)
        assert torch.equal(mine, cache)


@BACKENDS
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_columns_of_activations(where, backend):
    """Ops that know of no strides; a column is 24 elements of a row of 40."""
    weight, table, places = torch.ones(8), torch.randn(9, 8), torch.tensor([3, 0, 7])
    mask, penalties = torch.rand(3, 24) < 0.5, torch.full((3,), 2.0)

    def step(x):
        xla_ops.fused_qk_norm_rope(
            x, 1, 1, 1, 8, 1e-6, weight, weight, table, True, places
        )
        xla_ops.apply_repetition_penalties_(x, mask, mask, penalties)

    def on_columns(x):
        step(x[:, 8:32])

    x = torch.randn(3, 40)
    mine = x.clone()
    on_columns(x)
    if where == "inside":
        torch.compile(on_columns, backend=backend, fullgraph=True)(mine)
    else:
        torch.compile(step, backend=backend, fullgraph=True)(mine[:, 8:32])
    assert torch.equal(mine, x)


@pytest.mark.parametrize("backend", [None, "aot_eager", "inductor"])
def test_what_is_read_may_lie_in_what_is_written(backend):
    """The old values count, as on XLA."""

    def program(cache, x):
        slots = torch.tensor([5, 0, 7])
        xla_ops.reshape_and_cache_flash(
            cache[0, 0, :3], cache[1, 1, :3], cache[0], cache[1], slots
        )
        table, places = torch.ones(9, 8), torch.tensor([3, 0, 7])
        xla_ops.fused_qk_norm_rope(
            x, 1, 1, 1, 8, 1e-6, x[0, :8], x[1, 8:16], table, True, places
        )

    def apart(cache, x):
        old, slots = cache.clone(), torch.tensor([5, 0, 7])
        xla_ops.reshape_and_cache_flash(
            old[0, 0, :3], old[1, 1, :3], cache[0], cache[1], slots
        )
        table, places = torch.ones(9, 8), torch.tensor([3, 0, 7])
        xla_ops.fused_qk_norm_rope(
            x, 1, 1, 1, 8, 1e-6, *(x[0, :8] * 1, x[1, 8:16] * 1), table, True, places
        )

    wanted = torch.randn(SHAPE), torch.randn(3, 24)
    got = tuple(t.clone() for t in wanted)
    apart(*wanted)
    run = torch.compile(program, backend=backend) if backend else program
    run(*got)
    assert all(map(torch.equal, got, wanted))


STEP = st.one_of(
    st.tuples(st.just("write"), st.integers(-2, 21)),
    st.tuples(st.just("copy"), st.integers(0, 4), st.integers(0, 4)),
    st.tuples(st.sampled_from(["read", "add_", "clone", "half"])),
)


@settings(max_examples=25)
@given(steps=st.lists(STEP, min_size=1, max_size=6))
def test_any_program(steps):
    """Of updates, aten's and ours, and reads between them."""

    def program(cache, rows):
        out = []
        for kind, *numbers in steps:
            if kind == "write":
                slots = torch.tensor([numbers[0], numbers[0] + 1])
                write(cache, rows, slots)
                rows = rows + 1
            elif kind == "copy":
                xla_ops.copy_blocks([cache[0]], [cache[1]], torch.tensor([numbers]))
            elif kind == "read":
                out.append(cache[:, 1].sum())
            elif kind == "add_":
                cache[1].add_(0.5)
            elif kind == "clone":
                cache = cache.clone()
                out.append(cache)
            else:
                out.append(cache.view(2, 5, -1)[0] * 0.5)
        return out

    torch._dynamo.reset()
    cache, mine, rows = torch.ones(SHAPE), torch.ones(SHAPE), torch.ones(2, 2, 8)
    wanted = program(cache, rows)
    got = torch.compile(program, backend="aot_eager")(mine, rows)
    torch.testing.assert_close(got, wanted)
    assert torch.equal(mine, cache)


# Peak memory needs a process of its own; 200 MB of cache are far above the noise.
MEMORY = """
import json, resource, sys
import torch, xla_ops, xla_ops.vllm
backend, form = sys.argv[1:]
xla_ops.vllm.register_lowerings()
by_vllm = torch.ops._C_cache_ops.reshape_and_cache_flash
one = torch.ones(())

def separate(key_cache, value_cache, rows, slots):
    xla_ops.reshape_and_cache_flash(rows, rows, key_cache, value_cache, slots)
    return key_cache[0].sum()

interleaved = separate

def stacked(cache, rows, slots):
    return separate(*cache.unbind(0), rows, slots)

def vllm(cache, rows, slots):
    by_vllm(rows, rows, *cache.unbind(0), slots, "auto", one, one)
    return cache[0, 0].sum()

def blocks(cache, rows, slots):
    xla_ops.copy_blocks([cache[0]], [cache[1]], torch.tensor([[0, 1]]))
    return cache[0, 0].sum()

step = torch.compile(
    globals()[form], backend=backend, fullgraph=True, dynamic=False)
rows, slots = torch.ones(3, 8, 64), torch.tensor([0, 5, -1])
with torch.no_grad():
    small = torch.zeros(2, 4, 16, 8, 64)
    torch.compile(globals()[form], backend=backend, fullgraph=True, dynamic=False)(
        *(small.unbind(0) if globals()[form] is separate else [small]), rows, slots)
    cache = torch.ones(2, 3200, 16, 8, 64)
    caches = cache.unbind(0) if form == "separate" else [cache]
    if form == "interleaved":
        caches = cache.view(3200, 2, 16, 8, 64).unbind(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        step(*caches, rows, slots)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"cache": cache.nbytes, "grown": (after - before) * 1024}))
"""


@BACKENDS
@pytest.mark.parametrize(
    "form", ["separate", "interleaved", "stacked", "vllm", "blocks"]
)
def test_memory_does_not_grow_by_the_cache(form, backend):
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, backend, form],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["grown"] < result["cache"] / 3, result


@BACKENDS
def test_a_cache_without_a_handler_is_updated_by_the_reference(backend, monkeypatch):
    monkeypatch.setattr(handlers, "loaded", lambda platform, target: False)
    cache, mine = torch.zeros(SHAPE), torch.zeros(SHAPE)
    write(cache, ROWS, SLOTS)
    torch.compile(write, backend=backend)(mine, ROWS, SLOTS)
    assert torch.equal(mine, cache)
    assert cache[0].any().item()
