"""Which tensors an update takes, which it refuses, and whether their buffers stay."""

import functools
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import xla_ops
from support import Path, addresses
from xla_ops.core import in_place
from xla_ops.programs.replay import replay

PATHS = pytest.mark.parametrize("name", ["cpu", "lazy", "compiled", "dispatched"])
XLA = pytest.mark.parametrize("name", ["lazy", "compiled", "dispatched"])
SHAPE = (6, 4, 2, 8)
ROWS, SLOTS = torch.ones(2, 2, 8), torch.tensor([0, 5])


def write(key_cache, value_cache, rows, slots):
    xla_ops.reshape_and_cache_flash(rows, 2 * rows, key_cache, value_cache, slots)


def run(name, f, *tensors):
    """Calls f twice on a path; returns (tensors on the CPU, whether they stayed)."""
    path = Path(name)
    rows, slots, *tensors = path.put([ROWS, SLOTS, *tensors])
    step = path.function(f)
    before = addresses(tensors) if path.is_xla else [t.data_ptr() for t in tensors]
    for _ in range(2):
        step(*tensors, rows, slots)
    path.wait()
    after = addresses(tensors) if path.is_xla else [t.data_ptr() for t in tensors]
    return [t.cpu() for t in tensors], before == after


# How two caches lie in one raw tensor; as users' code makes them inside the function.
LAYOUTS = {
    "as_strided": (
        (2048,),
        lambda raw: (
            raw.as_strided(SHAPE, (64, 16, 8, 1), 16),
            raw.as_strided(SHAPE, (64, 16, 8, 1), 1024),
        ),
    ),
    "interleaved pages": (
        (2048,),
        lambda raw: (
            raw.as_strided(SHAPE, (128, 16, 8, 1), 0),
            raw.as_strided(SHAPE, (128, 16, 8, 1), 64),
        ),
    ),
    "stacked": ((2, *SHAPE), lambda raw: raw.unbind(0)),
    "blocks first": ((6, 2, 4, 2, 8), lambda raw: raw.unbind(1)),
    "HND": ((2, 6, 2, 4, 8), lambda raw: raw.permute(0, 1, 3, 2, 4).unbind(0)),
    "flat": ((768,), lambda raw: raw.view(2, *SHAPE).unbind(0)),
    "slices": ((14, 4, 2, 8), lambda raw: (raw[1:7], raw[8:])),
    "a part of the head": ((2, 6, 4, 2, 16), lambda raw: raw[..., 8:].unbind(0)),
}


@PATHS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_views_taken_inside_are_written_where_they_lie(name, layout):
    shape, take = LAYOUTS[layout]
    raw = torch.zeros(shape)
    wanted = raw.clone()
    write(*take(wanted), ROWS, SLOTS)
    (got,), stayed = run(name, lambda raw, *rest: write(*take(raw), *rest), raw)
    assert torch.equal(got, wanted)
    assert stayed


@PATHS
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_an_expanded_cache_is_refused(name, where):
    def f(key_cache, value_cache, *rest):
        write(key_cache.expand(SHAPE), value_cache, *rest)

    key_cache = torch.zeros(1, *SHAPE[1:])
    step = f if where == "inside" else write
    path = Path(name)
    rows, slots, key_cache, value_cache = path.put(
        [ROWS, SLOTS, key_cache, torch.zeros(SHAPE)]
    )
    if where == "outside":
        key_cache = key_cache.expand(SHAPE)
    with pytest.raises(Exception, match=r"key_cache must be .* free of overlaps, got"):
        path.function(step)(key_cache, value_cache, rows, slots)


@PATHS
def test_one_tensor_as_both_caches_is_refused(name):
    path = Path(name)
    rows, slots, cache = path.put([ROWS, SLOTS, torch.zeros(SHAPE)])
    text = "value_cache must not share memory with key_cache"
    with pytest.raises(Exception, match=text):
        path.function(write)(cache, cache, rows, slots)
    with pytest.raises(Exception, match=text):  # a page further, all but one shared
        path.function(lambda c, *rest: write(c[:-1], c[1:], *rest))(cache, rows, slots)
    assert not cache.any().item()


@PATHS
def test_one_tensor_twice_in_copy_blocks_is_refused(name):
    path = Path(name)
    cache, mapping = path.put([torch.zeros(SHAPE), torch.tensor([[0, 1]])])
    text = r"value_caches\[0\] must not share memory with key_caches\[0\]"
    with pytest.raises(Exception, match=text):
        path.function(lambda c, m: xla_ops.copy_blocks([c], [c], m))(cache, mapping)


@st.composite
def strided(draw):
    """Shape and strides; a factor leaves gaps."""
    shape = torch.Size(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    strides = draw(st.permutations(in_place.dense_strides(shape)))
    return shape, tuple(s * draw(st.sampled_from([1, 2, 3])) for s in strides)


@given(
    first=strided(), second=strided(), alike=st.booleans(), offset=st.integers(0, 60)
)
def test_meeting_tensors_are_found(first, second, alike, offset):
    """Against all elements of two views, of one shape and set of strides or of two."""
    elements = torch.arange(2000)
    views, spans = [], []
    for (shape, strides), start in ((first, 0), (first if alike else second, offset)):
        views.append(elements.as_strided(shape, strides, start))
        place = in_place.Located(elements, start, strides)
        spans.append(in_place._span(views[-1], place))
    wanted = bool(torch.isin(*(v.flatten() for v in views)).any())
    assert in_place._meet(*spans) == in_place._meet(*reversed(spans)) == wanted


@PATHS
def test_views_of_different_shapes_that_meet_are_refused(name):
    path = Path(name)
    cache, mapping = path.put([torch.zeros(SHAPE), torch.tensor([[0, 1]])])
    text = (
        r"copy_blocks: value_caches\[0\] must not share memory with key_caches\[0\],"
        r" got shapes \[6, 4, 2, 8\] and \[3, 4, 2, 8\] of one tensor"
    )

    def meet(c, m):
        xla_ops.copy_blocks([c[1:4]], [c], m)

    with pytest.raises(Exception, match=text):
        path.function(meet)(cache, mapping)
    path.function(lambda c, m: xla_ops.copy_blocks([c[:2]], [c[2:]], m))(cache, mapping)


def test_views_of_different_dtypes_that_meet_are_refused():
    """Scales in the buffer of the values that they belong to."""
    x, whole = torch.randn(4, 16), torch.zeros(4, 32)
    values = whole.view(torch.int8)[:, :16]  # the first four columns of `whole`

    def quantize(scales):
        torch.ops.xla_ops.dynamic_scaled_int8_quant(values, x, scales, None)

    text = "scale must not share memory with result"
    with pytest.raises(ValueError, match=text):
        quantize(whole[:, 3:4])
    quantize(whole[:, 4:5])
    assert whole[:, 4].all() and values.any()


@pytest.mark.parametrize("name", ["compiled", "dispatched"])
def test_a_view_of_another_dtype_made_inside_is_refused(name):
    def f(cache, rows, slots):
        key_cache, value_cache = (t.view(torch.float8_e4m3fn) for t in cache)
        xla_ops.reshape_and_cache_flash(
            rows, rows, key_cache, value_cache, slots, "fp8"
        )

    path = Path(name)
    args = path.put([torch.zeros((2, *SHAPE), dtype=torch.uint8), ROWS, SLOTS])
    with pytest.raises(Exception, match="key_cache must not be a view of another dtyp"):
        path.function(f)(*args)
    f(*args)  # lazily it works
    assert args[0].any().item()


INFERENCE = """
import warnings
import torch, torch_xla, xla_ops
device = torch_xla.device()
rows, slots = torch.ones(2, 2, 8, device=device), torch.tensor([0, 5], device=device)
with torch.inference_mode(), warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    kv = torch.zeros(2, 6, 4, 2, 8, device=device)
    for _ in range(2):
        xla_ops.reshape_and_cache_flash(rows, rows, *kv.unbind(0), slots)
        torch_xla.sync()
    separate = [torch.zeros(6, 4, 2, 8, device=device) for _ in range(2)]
    xla_ops.reshape_and_cache_flash(rows, rows, *separate, slots)
with warnings.catch_warnings(record=True) as others:
    warnings.simplefilter("always")
    from xla_ops.core import in_place
    in_place._tell_of_untracked_views.cache_clear()
    floats = torch.zeros(2, 6, 4, 2, 8, dtype=torch.int32, device=device)
    views = floats.view(torch.float32).unbind(0)
    xla_ops.reshape_and_cache_flash(rows, rows, *views, slots)
assert any("another dtype" in str(w.message) for w in others)
assert (floats != 0).sum().item() == 64
texts = [str(w.message) for w in caught if "xla_ops" in str(w.message)]
assert len(texts) == 1 and "inference_mode" in texts[0], texts
assert kv.sum().item() == 64 and separate[0].sum().item() == 32
"""


def test_views_under_inference_mode_say_that_they_are_copied():
    subprocess.run([sys.executable, "-c", INFERENCE], check=True)


@pytest.mark.parametrize("is_base_replaced", [False, True])
@pytest.mark.parametrize("name", ["lazy", "compiled", "dispatched", "replayed"])
def test_data_that_was_replaced(name, is_base_replaced):
    """Torch goes on to name what a tensor was a view of before `.data` was set."""

    def step(cache, rows, slots):
        write(cache[0], cache[1], rows, slots)
        return [t.sum() for t in (cache[0], cache[1])]

    def make(whole):
        part = whole[1:]
        replaced = whole if is_base_replaced else part
        replaced.data = replaced + 1
        return whole, part

    path = Path("lazy" if name == "replayed" else name)
    call = replay(step) if name == "replayed" else path.function(step)
    wanted = make(torch.zeros(3, *SHAPE))
    tensors = make(path.put(torch.zeros(3, *SHAPE)))
    for _ in range(2):
        sums = step(wanted[1], ROWS, SLOTS)
        got = call(tensors[1], *path.put([ROWS, SLOTS]))
        for a, b in zip((*got, *tensors), (*sums, *wanted), strict=True):
            assert torch.equal(a.cpu(), b)


@XLA
def test_inference_mode_where_it_works(name):
    """Caches of their own; compiled, also views of one that was made outside."""
    path = Path(name)
    rows, slots, stacked, *caches = path.put(
        [ROWS, SLOTS, torch.zeros(2, *SHAPE), torch.zeros(SHAPE), torch.zeros(SHAPE)]
    )
    with torch.inference_mode():
        before = addresses([stacked, *caches])
        path.function(write)(*caches, rows, slots)
        if name != "lazy":
            path.function(lambda kv, *rest: write(*kv.unbind(0), *rest))(
                stacked, rows, slots
            )
        assert addresses([stacked, *caches]) == before
    assert [c.sum().item() for c in caches] == [32, 64]
    assert stacked.sum().item() == (0 if name == "lazy" else 96)


class Subclass(torch.Tensor):
    """As vLLM's parameters are, it leaves all but its name to torch."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_subclass_of_tensor_is_written_where_it_lies(layout):
    shape, take = LAYOUTS[layout]
    raw, wanted = torch.zeros(shape), torch.zeros(shape)
    write(*take(wanted), ROWS, SLOTS)
    key_cache, value_cache = (t.as_subclass(Subclass) for t in take(raw))
    write(key_cache, value_cache, ROWS, SLOTS)
    assert torch.equal(raw, wanted)


def test_a_cache_of_inference_mode_is_not_lost_outside():
    """Torch refuses its update, by openxla once the program has run."""
    path = Path("lazy")

    def write(key, value, rows, slots):
        xla_ops.reshape_and_cache_flash(rows, rows, key, value, slots)

    with torch.inference_mode():
        caches = path.put([torch.full((4, 2, 2, 8), 5.0) for _ in range(2)])
    rows, slots = path.put([torch.ones(2, 2, 8), torch.tensor([0, 5])])
    step = torch.compile(write, backend="openxla")
    text = r"xla_ops: a cache made under torch.inference_mode\(\) must be .* \[4, 2, 2"
    for is_warm in (False, True):
        with pytest.raises(Exception, match=text):
            step(*caches, rows, slots)
        if not is_warm:
            assert [cache.sum().item() for cache in caches] == [640, 640]
            with torch.inference_mode():
                step(*caches, rows, slots)
        assert [cache.sum().item() for cache in caches] == [512, 512]
    torch.compile(write, backend="xla_ops")(*caches, 2 * rows, slots)
    assert [cache.sum().item() for cache in caches] == [544, 544]


@pytest.mark.parametrize("before", ["lazy", "openxla", "xla_ops", "replay"])
@pytest.mark.parametrize("mode", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("made", [True, False], ids=["made inside", "made outside"])
def test_openxla_knows_a_cache_of_inference_mode_whoever_updated_it(made, mode, before):
    """Torch's value of it is of the mode of the last update."""
    path = Path("lazy")

    def write(key, value, rows, slots):
        xla_ops.reshape_and_cache_flash(rows, rows, key, value, slots)

    update, step = write, torch.compile(write, backend="openxla")
    if before != "lazy":
        how = functools.partial(torch.compile, backend=before)
        update = (replay if before == "replay" else how)(write)
    rows, slots = path.put([torch.ones(2, 2, 8), torch.tensor([0, 5])])
    # A program that was made for caches of the other kind is not taken for these.
    others = path.put([torch.full((4, 2, 2, 8), 5.0) for _ in range(2)])
    step(*others, rows, slots)
    with torch.inference_mode(made):
        caches = path.put([torch.full((4, 2, 2, 8), 5.0) for _ in range(2)])
    sums = [640, 640]
    for value in (2, 3):
        with torch.inference_mode(mode):
            if before != "openxla" or mode == made:
                update(*caches, value * rows, slots)
                sums = [480 + 32 * value] * 2
        assert [cache.sum().item() for cache in caches] == sums
        if made:
            with pytest.raises(Exception, match="must be updated under it"):
                step(*caches, rows, slots)
        else:
            step(*caches, rows, slots)
            sums = [512, 512]
        assert [cache.sum().item() for cache in caches] == sums


@pytest.mark.parametrize("backend", ["openxla", "xla_ops"])
def test_a_training_step_does_not_lose_a_cache_of_inference_mode(backend):
    """Which its backward keeps, so that the cache has a copy of what it keeps."""
    path = Path("lazy")

    def train(x, key, value, rows, slots):
        xla_ops.reshape_and_cache_flash(rows, rows, key, value, slots)
        return (x * key).sum()

    with torch.inference_mode():
        caches = path.put([torch.full((4, 2, 2, 8), 5.0) for _ in range(2)])
    rows, slots = path.put([torch.ones(2, 2, 8), torch.tensor([0, 5])])
    x = path.put(torch.ones(4, 2, 2, 8)).requires_grad_()
    step = torch.compile(train, backend=backend)
    with torch.enable_grad():
        if backend == "openxla":
            with pytest.raises(Exception, match="must be updated under it"):
                step(x, *caches, rows, slots)
            assert [cache.sum().item() for cache in caches] == [640, 640]
            return
        for value in (1, 2):
            loss = step(x, *caches, value * rows, slots)
            assert loss.item() == 480 + 32 * value
            assert [cache.sum().item() for cache in caches] == [loss.item()] * 2
            (grad,) = torch.autograd.grad(loss, [x])
            assert torch.equal(grad.cpu(), caches[0].cpu())


@pytest.mark.parametrize("backend", ["openxla", "xla_ops"])
def test_a_cache_is_not_lost_where_a_backward_cannot_keep_an_argument(backend):
    """Of which torch says so once the program has run."""
    path = Path("lazy")

    def train(x, weight, key, value, rows, slots):
        xla_ops.reshape_and_cache_flash(rows, rows, key, value, slots)
        return (x * weight).sum()

    caches = path.put([torch.full((4, 2, 2, 8), 5.0) for _ in range(2)])
    rows, slots = path.put([torch.ones(2, 2, 8), torch.tensor([0, 5])])
    weight = path.put(torch.ones(3)).requires_grad_()
    with torch.inference_mode():
        x = path.put(torch.ones(3))
    step = torch.compile(train, backend=backend)
    text = {"openxla": r"an argument of .* \[3\]", "xla_ops": "cannot be saved"}[
        backend
    ]
    for _ in range(2):
        with torch.enable_grad(), pytest.raises(Exception, match=text):
            step(x, weight, *caches, rows, slots)
        kept = 640 if backend == "openxla" else 512  # xla_ops has updated them by then
        assert [cache.sum().item() for cache in caches] == [kept, kept]
    with torch.no_grad():
        assert step(x, weight, *caches, 2 * rows, slots).item() == 3
    assert [cache.sum().item() for cache in caches] == [544, 544]
