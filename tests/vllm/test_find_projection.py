"""What queries, keys and values are found to be made of, in functions like vLLM's."""

import re

import pytest
import torch
import torch_xla

import xla_ops
from support import addresses
from xla_ops.programs.replay import replay
from xla_ops.vllm import projection

HEADS, KV_HEADS, DIM = 4, 2, 8
SIZES = [n * DIM for n in (HEADS, KV_HEADS, KV_HEADS)]
WIDTH = sum(SIZES)


def on_xla(*shape):
    return torch.randn(*shape).to(torch_xla.device())


class Model:
    """What a decoder layer of vLLM's does before its attention."""

    def __init__(self, tokens=5, normed=True):
        self.x, self.weight = on_xla(tokens, 16), on_xla(WIDTH, 16)
        self.norms = [1 + on_xla(DIM) / 4 for _ in "qk"] if normed else [None, None]
        self.eps = [1e-5, 1e-5]
        self.table = on_xla(32, DIM)
        self.positions = torch.randperm(32)[:tokens].to(torch_xla.device())

    def project(self):
        return torch.nn.functional.linear(self.x, self.weight)

    def norm(self, heads, weight, eps):
        """q_norm or k_norm, with the views around it."""
        if weight is None:
            return heads
        by_head = heads.view(heads.shape[0], -1, weight.shape[0])
        out = xla_ops.rms_norm(by_head, weight, eps)
        projection.note_norm(out, by_head, weight, eps)
        return out.view(heads.shape)

    def rotate(self, q, k, positions=None):
        """rotary_emb."""
        how = (DIM, self.table, True)
        positions = self.positions if positions is None else positions
        rotated = xla_ops.rotary_embedding(positions, q, k, *how)
        projection.note_rotation(rotated, positions, q, k, *how)
        return rotated

    def __call__(self, qkv):
        q, k, v = qkv.split(SIZES, dim=-1)
        q, k = (
            self.norm(t, *how)
            for t, *how in zip((q, k), self.norms, self.eps, strict=True)
        )
        return (*self.rotate(q, k), v)


def find(q, k, v, sizes=(HEADS, KV_HEADS, DIM)):
    return projection.find(q, k, v, *sizes)


FORMS = pytest.mark.parametrize("normed", [True, False], ids=["norm", "no norm"])


@FORMS
@pytest.mark.parametrize("tokens", [1, 5])
def test_finds_the_projection(normed, tokens):
    model = Model(tokens, normed)
    with projection.noting():
        qkv = model.project()
        found = find(*model(qkv))
    assert found.qkv is qkv
    assert found[1:4] == (HEADS, KV_HEADS, DIM)
    assert found.q_weight is model.norms[0] and found.k_weight is model.norms[1]
    assert found.cos_sin_cache is model.table and found.is_neox
    assert found.position_ids is model.positions
    assert not normed or found.eps == 1e-5


def test_finds_it_through_views():
    """As some models hand queries and keys on, and some layers make a projection."""
    model = Model()
    with projection.noting():
        three = torch.nn.functional.linear(model.x[None], model.weight)
        q, k, v = model(three.view(-1, WIDTH))
        found = find(q.view(-1, HEADS, DIM), k.unflatten(1, (-1, DIM)), v)
    torch.testing.assert_close(found.qkv.cpu(), three[0].cpu())


def cached(model, attend):
    """Queries and a cache, of a program that prepares for attention by `attend`."""
    cache = torch.zeros(2, 3, 4, KV_HEADS, DIM).to(torch_xla.device())
    slots = torch.tensor([3, 8, -1, 0, 11]).to(torch_xla.device())

    def step(cache, slots):
        with projection.noting():
            return attend(*model(model.project()), *cache.unbind(0), slots)

    state = [t for t in vars(model).values() if isinstance(t, torch.Tensor)]
    run = replay(
        step, state=(cache, *state, *(t for t in model.norms if t is not None))
    )
    (before,) = addresses([cache])
    out = run(cache, slots)
    assert addresses([cache]) == [before]
    return out, cache


def together(q, k, v, *where):
    return xla_ops.fused_qk_norm_rope_and_cache(*find(q, k, v), *where)


def apart(q, k, v, *where):
    rows = (t.view(-1, KV_HEADS, DIM) for t in (k, v))
    xla_ops.reshape_and_cache_flash(*rows, *where)
    return q.view(-1, HEADS, DIM)


@FORMS
def test_nothing_else_is_in_the_program(normed, hlo_dump):
    """Norms, rotary embedding and slices of the projection are not."""
    model = Model(normed=normed)
    known = set(hlo_dump.iterdir())
    got = cached(model, together)
    new = [f for f in hlo_dump.glob("*after_optimizations.txt") if f not in known]
    (program,) = [t for f in new if "xla_ops." in (t := f.read_text())]
    calls = re.findall(r'custom_call_target="(xla_ops\.\w+)"', program)
    assert calls == ["xla_ops.fused_qk_norm_rope_and_cache_stacked"]
    assert "slice" not in program and "copy" not in program
    for a, b in zip(got, cached(model, apart), strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-5, atol=1e-5)


def test_keys_that_are_used_again():
    """Then they are computed once more, alike."""
    model = Model()

    def both(q, k, v, *where):
        return together(q, k, v, *where), k

    (query, key), cache = cached(model, both)
    slots = cache.cpu().view(2, 12, -1)[0, [3, 8, 0, 11]]
    torch.testing.assert_close(key.cpu()[[0, 1, 3, 4]], slots, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(query.cpu(), cached(model, together)[0].cpu())


def scaled(model, q, k, v):
    return q * 2, k, v


def scaled_in_place(model, q, k, v):
    q.mul_(2)
    return q, k, v


def values_written(model, q, k, v):
    v.mul_(2)
    return q, k, v


def values_of_another(model, q, k, v):
    return q, k, model.project()[:, -SIZES[2] :]


def values_that_are_keys(model, q, k, v):
    return q, k, v._base[:, SIZES[0] : -SIZES[2]]


def keys_of_another(model, q, k, v):
    return q, model(model.project())[1], v


def keys_as_queries(model, q, k, v):
    return k, q, v


def heads_permuted(model, q, k, v):
    return q.view(-1, 2, 2, DIM).transpose(1, 2), k, v


@pytest.mark.parametrize(
    "change",
    [
        scaled,
        scaled_in_place,
        values_written,
        values_of_another,
        values_that_are_keys,
        keys_of_another,
        keys_as_queries,
        heads_permuted,
    ],
)
@FORMS
def test_what_attention_gets_is_something_else(change, normed):
    model = Model(normed=normed)
    with projection.noting():
        assert find(*change(model, *model(model.project()))) is None


def test_other_layers():
    def is_found(model, run=None, sizes=(HEADS, KV_HEADS, DIM)):
        with projection.noting():
            qkv = model.project()
            return find(*(run or model)(qkv), sizes) is not None

    assert is_found(Model())
    assert not is_found(Model(), sizes=(HEADS, KV_HEADS, DIM // 2))
    assert not is_found(Model(), sizes=(KV_HEADS, HEADS, DIM))
    model = Model()
    model.eps = [1e-5, 1e-6]
    assert not is_found(model)
    for i in range(2):
        model = Model()
        model.norms[i] = None
        assert not is_found(model)
    model = Model()
    model.table = model.table[:, : DIM // 2]  # a part of a head
    assert not is_found(model)
    model = Model()
    model.norms = [on_xla(n) for n in SIZES[:2]]  # of all heads together
    assert not is_found(model)
    model = Model()
    model.weight = on_xla(WIDTH + 8, 16)  # a gate behind values
    assert not is_found(model, lambda qkv: model(qkv[:, :WIDTH]))

    def rotated_as_a_batch(qkv):
        q, k, v = qkv.split(SIZES, dim=-1)
        q, k = (
            model.norm(t, w, 1e-5)[None]
            for t, w in zip((q, k), model.norms, strict=True)
        )
        q, k = model.rotate(q, k, model.positions[None])
        return q[0], k[0], v

    model = Model()
    assert not is_found(model, rotated_as_a_batch)

    def written_between(qkv):
        q, k, v = qkv.split(SIZES, dim=-1)
        q, k = (
            model.norm(t, w, 1e-5) for t, w in zip((q, k), model.norms, strict=True)
        )
        qkv.mul_(2)
        return (*model.rotate(q, k), v)

    assert not is_found(model, written_between)

    def positions_written(qkv):
        rows = model(qkv)
        model.positions.add_(1)
        return rows

    assert not is_found(model, positions_written)


def test_notes_end_with_the_trace():
    model = Model()
    rows = model(model.project())
    with projection.noting():
        assert find(*rows) is None
        rows = model(model.project())
        assert find(*rows) is not None
    assert find(*rows) is None
    with projection.noting():
        assert find(*rows) is None
