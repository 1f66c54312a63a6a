"""Random programs over caches: on XLA they do what torch does with CPU tensors.

A program makes caches of several layouts, has them share memory in the ways of
shares.py, keeps views and results that are not computed yet, and updates caches lazily,
by both backends and by `replay`, in every grad mode, and by calls that are refused.
Whenever it looks, and at its end, each tensor that there is has its value of the CPU. A
cache that has not shared its buffer does not move.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch_xla
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from shares import COPIES
from support import Path, addresses, int32
from xla_ops.programs.replay import replay

CACHE = (4, 4, 2, 8)

# A raw tensor's shape, and how key and value caches lie in it.
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable]] = {
    "stacked": ((2, *CACHE), lambda raw: raw.unbind(0)),
    "blocks first": ((4, 2, 4, 2, 8), lambda raw: raw.unbind(1)),
    "HND": ((2, 4, 2, 4, 8), lambda raw: raw.permute(0, 1, 3, 2, 4).unbind(0)),
    "flat": ((512,), lambda raw: raw.view(2, *CACHE).unbind(0)),
    "slices": ((9, 4, 2, 8), lambda raw: (raw[:4], raw[5:])),
    "packed heads": ((2, 4, 4, 2, 16), lambda raw: raw[..., 8:].unbind(0)),
}


# Updates: (key cache, value cache, rows, slots). Values stay small integers.


def write(keys, values, rows, slots):
    xla_ops.reshape_and_cache_flash(rows, 2 * rows, keys, values, slots)


def copy_pages(keys, values, rows, slots):
    pages = slots[:1] // 4
    xla_ops.copy_blocks([keys], [values], torch.stack([pages, (pages + 1) % 4], 1))


def swap_pages(keys, values, rows, slots):
    xla_ops.swap_blocks(keys, values, torch.stack([slots // 4] * 2, 1))


def project(keys, values, rows, slots):
    """Queries, keys and values of a projection, rotated by 90 degrees."""
    qkv = torch.cat([rows, rows + 1, 3 * rows], 1).flatten(1)
    table = torch.tensor([[0.0] * 4 + [1.0] * 4]).to(keys.device)
    xla_ops.fused_qk_norm_rope_and_cache(
        *(qkv, 2, 2, 8, 1e-6, None, None, table, True),
        *(slots * 0, keys, values, slots),
    )


def project_and_attend(keys, values, rows, slots):
    """The same, and one sequence's attention over all pages."""
    qkv = torch.cat([rows, rows + 1, 3 * rows], 1).flatten(1)
    table, lengths, pages, starts, count = (
        t.to(keys.device)
        for t in (
            torch.tensor([[0.0] * 4 + [1.0] * 4]),
            *(int32(16), int32([0, 1, 2, 3]), int32(0, len(rows)), int32(1)),
        )
    )
    out = xla_ops.fused_qk_norm_rope_and_paged_attention(
        *(qkv, 2, 2, 8, 1e-6, None, None, table, True),
        *(slots * 0, keys, values, slots, lengths, pages, starts, count, 0.1),
    )
    # Not where the last bits of a mean decide.
    attended = (out.flatten()[0] * 0.37 + 0.123).floor() % 3
    write(keys, values, rows + attended, slots)


def write_around_a_read(keys, values, rows, slots):
    write(keys, values, rows, slots)
    total = keys.sum()
    write(keys, values, rows + total % 3, slots.flip(0))


def attend(query, keys, values, rows, slots):
    """Writes, and reads what a backward is to know as it was."""
    write(keys, values, rows, slots)
    lengths, table, starts = (
        torch.tensor(t, dtype=torch.int32).to(keys.device)
        for t in ([16], [[0, 1, 2, 3]], [0, 1])
    )
    caches = [keys, values]
    return xla_ops.paged_attention(query, caches, lengths, table, starts, 1, 0.1)


def normalise_a_page(keys, values, rows, slots):
    """Of an op that knows no cache, so that a buffer may move."""
    torch.ops.xla_ops.rms_norm(values[1], keys[2] + 1, rows[0, 0] * 0 + 1, 1.0)


UPDATES = [
    *(write, copy_pages, swap_pages, project, project_and_attend),
    *(write_around_a_read, normalise_a_page),
]
# Torch's own, of (raw, keys, values, views kept).
OWN = {
    "all": lambda raw, keys, values, views: raw.add_(1),
    "a row": lambda raw, keys, values, views: raw[1:3].mul_(2),
    "keys": lambda raw, keys, values, views: keys.sub_(1),
    "copy": lambda raw, keys, values, views: keys.copy_(values),
    "a view": lambda raw, keys, values, views: views and views[-1].add_(2),
}
VIEWS = {
    "keys": lambda raw, keys, values: keys,
    "values": lambda raw, keys, values: values,
    "rows": lambda raw, keys, values: raw[1:],
    "flat": lambda raw, keys, values: raw.view(-1),
    "detach": lambda raw, keys, values: raw.detach(),
    "data": lambda raw, keys, values: raw.data,
}
WRONG = {
    "dtype": lambda rows: rows.half(),
    "device": lambda rows: rows.cpu(),
    "shape": lambda rows: rows[:, :1],
    "gradient": lambda rows: rows.requires_grad_(),
}
MODES = {
    mode.__name__: mode
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad)
}
WAYS = ["lazy", "openxla", "xla_ops", "replay"]


@dataclass
class Cache:
    """A raw tensor, and what was made of it."""

    layout: str
    raw: torch.Tensor
    views: list[torch.Tensor] = field(default_factory=list)
    reads: list[torch.Tensor] = field(default_factory=list)
    address: int | None = None  # None: its buffer may move

    @property
    def parts(self):
        return self.raw, *LAYOUTS[self.layout][1](self.raw)

    @property
    def tensors(self):
        return [self.raw, *self.views, *self.reads]


class Steps:
    """Functions that update, each made once a way and once for a pair of layouts."""

    def __init__(self):
        self._made = {}

    def __call__(self, way, update, key_layout, value_layout=None):
        key = way, update, key_layout, value_layout
        if key not in self._made:
            self._made[key] = self._make(*key)
        return self._made[key]

    @staticmethod
    def _make(way, update, key_layout, value_layout):
        take_keys = LAYOUTS[key_layout][1]
        take_values = LAYOUTS[value_layout or key_layout][1]

        def one(raw, rows, slots):
            update(*take_keys(raw), rows, slots)
            return take_keys(raw)[1].sum()

        def two(key_raw, value_raw, rows, slots):
            keys, values = take_keys(key_raw)[0], take_values(value_raw)[1]
            update(keys, values, rows, slots)
            return keys.sum() + values.sum()

        step = two if value_layout else one
        if update is attend:

            def step(raw, query, rows, slots):
                return attend(query, *take_keys(raw), rows, slots).sum()

        if way == "lazy":
            return step
        if way == "replay":
            return replay(step)
        return torch.compile(step, backend=way, fullgraph=True, dynamic=False)


class World:
    """The same caches on the XLA device and, as plain tensors, on the CPU."""

    def __init__(self, steps):
        self.steps = steps
        self.pairs = [self._new(i, "stacked") for i in range(2)]
        self.left = []  # caches that have been replaced
        self.losses = []  # (loss, what it is of, gradient) of steps to train

    @staticmethod
    def _new(value, layout):
        shape = torch.Size(LAYOUTS[layout][0])
        raw = (torch.arange(shape.numel()) % 7 + value).float().reshape(shape)
        cache = Cache(layout, Path("lazy").put(raw))
        (cache.address,) = addresses([cache.raw])
        return cache, Cache(layout, raw)

    def new(self, number, i, layout):
        self.left.append(self.pairs[i])
        self.pairs[i] = self._new(-number, layout)

    def share(self, number, i, j, way):
        """Cache i comes to have the values of cache j."""
        old, source = self.pairs[i], self.pairs[j]
        if i == j or old[1].raw.shape != source[1].raw.shape:
            return
        found = [COPIES[way](a.raw, b.raw) for a, b in zip(old, source, strict=True)]
        if found[1] is old[1].raw:
            for a, b in zip(old, source, strict=True):
                a.layout = b.layout
        else:
            self.left.append(old)
            self.pairs[i] = tuple(Cache(source[1].layout, raw) for raw in found)
        old[0].address = self.pairs[i][0].address = source[0].address = None

    def view(self, number, i, kind):
        for cache in self.pairs[i]:
            cache.views.append(VIEWS[kind](*cache.parts))

    def forget(self, number, i):
        for cache in self.pairs[i]:
            cache.views.clear()
            cache.reads.clear()

    def read(self, number, i):
        for cache in self.pairs[i]:
            # torch_xla may take graphs for one that differ in their inputs alone.
            cache.reads.append(cache.raw.sum() + 10 * number + i)

    def own(self, number, i, kind):
        """Only of what shares with nobody: torch_xla itself is not careful then."""
        if self.pairs[i][0].address is None:
            return
        for cache in self.pairs[i]:
            OWN[kind](*cache.parts, cache.views)
        (self.pairs[i][0].address,) = addresses([self.pairs[i][0].raw])

    def update(self, number, caches, way, update, mode, sync):
        i, j = caches
        pairs = [self.pairs[i]] if i == j else [self.pairs[i], self.pairs[j]]
        layouts = [pair[1].layout for pair in pairs]
        if len(set(layouts)) > 1:
            return
        if way in ("lazy", "openxla") and mode == "inference_mode":
            mode = "no_grad"  # torch_xla takes no view of what was made outside
        # A cache that a graph holds twice may move another one; so may a look at what
        # is lazily updated, before a sync.
        sync = sync or update is normalise_a_page
        moves = update is normalise_a_page or (way == "lazy" and not sync)
        if moves or any(pair[0].address is None for pair in pairs):
            for pair in pairs:
                pair[0].address = None
        for side, step_way in enumerate((way, "lazy")):
            given_ = [pair[side].raw for pair in pairs]
            batch = [t.to(given_[0].device) for t in self._batch(number)]
            if sync:
                torch_xla.sync()
            with MODES[mode]():
                step = self.steps(step_way, update, *layouts)
                pairs[0][side].reads.append(step(*given_, *batch))
            if way == "lazy" and sync:
                torch_xla.sync()

    def train(self, number, i, way, sync):
        """A step of which the backward may come after others."""
        query = torch.arange(16.0).reshape(1, 2, 8) % (3 + number % 4) - 1
        for cache, step_way in zip(self.pairs[i], (way, "lazy"), strict=True):
            device = cache.raw.device
            given_ = [query.to(device).requires_grad_()]
            given_ += [t.to(device) for t in self._batch(number)]
            if sync:
                torch_xla.sync()
            with torch.enable_grad():
                step = self.steps(step_way, attend, cache.layout)
                loss = step(cache.raw, *given_)
                if step_way == "lazy":
                    (wanted,) = torch.autograd.grad(loss, given_[:1])
                    self.losses[-1] += (wanted,)
                else:
                    self.losses.append((loss, given_[0]))
        self.pairs[i][0].address = None

    def backward(self, number):
        for loss, query, wanted in self.losses:
            (grad,) = torch.autograd.grad(loss, [query])
            torch.testing.assert_close(grad.cpu(), wanted, rtol=1e-4, atol=1e-4)
        self.losses.clear()

    def fail(self, number, i, way, kind):
        """A call that is refused leaves all as it was."""
        cache = self.pairs[i][0]
        rows, slots = (t.to(cache.raw.device) for t in self._batch(number))
        error = None
        with torch.enable_grad():
            try:
                step = self.steps(way, write, cache.layout)
                step(cache.raw, WRONG[kind](rows), slots)
            except Exception as raised:  # noqa: BLE001 - Dynamo wraps it
                error = str(raised)
        assert error is not None
        assert any(words in error for words in (" must ", "has no gradient")), error

    @staticmethod
    def _batch(number):
        rows = (torch.arange(32) % 5 + number).float().reshape(2, 2, 8)
        return rows, torch.tensor([number % 16, (3 * number + 1) % 16])

    def sync(self, number):
        torch_xla.sync()

    def look(self, number, i):
        self._compare([self.pairs[i]])

    def _compare(self, pairs):
        for got, wanted in pairs:
            for a, b in zip(got.tensors, wanted.tensors, strict=True):
                torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-3)

    def check(self):
        self.backward(0)
        self._compare([*self.pairs, *self.left])
        for cache, _ in self.pairs:
            assert cache.address in (None, *addresses([cache.raw]))


INDEX = st.integers(0, 1)


def one_of(values):
    return st.sampled_from(sorted(values))


UPDATE = st.tuples(
    *(st.just("update"), st.tuples(INDEX, INDEX), one_of(WAYS)),
    *(st.sampled_from(UPDATES), one_of(MODES), st.booleans()),
)
ACTION = st.one_of(
    *(UPDATE, UPDATE, st.tuples(st.just("share"), INDEX, INDEX, one_of(COPIES))),
    st.tuples(
        st.just("train"), INDEX, st.sampled_from(["openxla", "xla_ops"]), st.booleans()
    ),
    st.tuples(st.just("backward")),
    st.tuples(st.just("view"), INDEX, one_of(VIEWS)),
    st.tuples(st.just("own"), INDEX, one_of(OWN)),
    st.tuples(st.just("fail"), INDEX, one_of(WAYS), one_of(WRONG)),
    st.tuples(st.just("new"), INDEX, one_of(LAYOUTS)),
    st.tuples(st.sampled_from(["read", "look", "forget"]), INDEX),
    st.tuples(st.just("sync")),
)


# A step is one code for all layouts.
@torch._dynamo.config.patch(recompile_limit=1000)
def test_random_programs():
    steps = Steps()

    @settings(max_examples=250)
    @given(program=st.lists(ACTION, min_size=3, max_size=14))
    def run(program):
        world = World(steps)
        for number, (action, *arguments) in enumerate(program):
            getattr(world, action)(number, *arguments)
        world.check()

    run()
