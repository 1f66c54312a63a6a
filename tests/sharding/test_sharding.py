"""How shardings are read and written, whatever the mesh."""

import hypothesis
import numpy as np
import pytest
import torch
import torch_xla
from hypothesis import strategies as st
from torch_xla.distributed import spmd as xs

import xla_ops
from sharded import put, spec_of, tiles_of
from xla_ops.core import sharded_cache, sharding
from xla_ops.core.in_place import dense_strides

MESHES = [
    ((4,), ("a",)),
    ((2, 2), ("a", "b")),
    ((1, 4), ("a", "b")),
    ((2, 1, 2), "abc"),
]


@st.composite
def meshes(draw):
    shape, axes = draw(st.sampled_from(MESHES))
    devices = draw(st.permutations(range(4)))
    return xs.Mesh(np.array(devices), shape, tuple(axes))


@st.composite
def specs(draw, mesh, rank):
    """Each axis of the mesh for one dimension at most; a dimension may have several."""
    spec = [[] for _ in range(rank)]
    for axis in mesh.axis_names:
        dim = draw(st.sampled_from([None, *range(rank)]))
        if dim is not None:
            spec[dim].append(axis)
    return tuple(
        None if not axes else axes[0] if len(axes) == 1 else tuple(axes)
        for axes in spec
    )


@hypothesis.given(data=st.data())
@hypothesis.settings(
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_shardings_are_read_as_they_are(spmd, data):
    """Each device's piece is what the mesh says; and written, it is the same again."""
    mesh = data.draw(meshes())
    spec = data.draw(specs(mesh, 3))
    t = put(torch.zeros(8, 8, 8), mesh, spec)
    read = sharding.parse(spec_of(t)) or (None,) * 3
    logical = mesh.get_logical_mesh()
    for axes, pieces in zip(spec, read, strict=True):
        names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
        sizes = [mesh.shape()[n] for n in names]
        if np.prod(sizes, initial=1) == 1:
            assert pieces is None
            continue
        for place in np.ndindex(logical.shape):
            index = [place[mesh.axis_names.index(n)] for n in names]
            assert pieces[logical[place]] == np.ravel_multi_index(index, sizes)
    split = sharding.split(read)
    assert split is not None
    again = put(torch.zeros(8, 8, 8)) + 1
    torch_xla._XLAC._xla_annotate_custom_sharding(again, sharding.op_sharding(split))
    assert sharding.parse(spec_of(again)) == sharding.parse(spec_of(t))


@hypothesis.given(data=st.data())
@hypothesis.settings(
    max_examples=15,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
def test_any_mesh_will_do(spmd, data):
    """Values and split are right on each device, whatever order the mesh has."""
    mesh = data.draw(meshes())
    tokens, heads = data.draw(specs(mesh, 2))
    prefix, suffix = torch.randn(8, 8, 16), torch.randn(8, 8, 16)
    lse = torch.randn(8, 8)
    expected, _ = xla_ops.merge_attn_states(prefix, lse, suffix, lse + 1)
    given = put(prefix, mesh, (tokens, heads, None))
    rest = [put(t) for t in (lse, suffix, lse + 1)]
    result, result_lse = xla_ops.merge_attn_states(given, *rest)
    torch.testing.assert_close(result.cpu(), expected)
    tokens_split, heads_split, _ = tiles_of(given)
    assert tiles_of(result) == [tokens_split, heads_split, 1]
    assert tiles_of(result_lse) == [heads_split, tokens_split]


@pytest.mark.parametrize(
    "text, pieces",
    [
        ("", ()),
        ("{replicated}", ()),
        ("{maximal device=0}", ()),
        ("{unknown}", ()),
        ("{devices=[2,2]<=[4]}", ((0, 0, 1, 1), (0, 1, 0, 1))),
        ("{devices=[2,2]<=[2,2]T(1,0)}", ((0, 1, 0, 1), (0, 0, 1, 1))),
        ("{devices=[1,2,2]<=[4] last_tile_dim_replicate}", (None, (0, 0, 1, 1))),
        ("{devices=[4]3,1,0,2}", ((2, 1, 3, 0),)),
    ],
)
def test_what_xla_prints(text, pieces):
    assert sharding.parse(text) == pieces


def test_unknown_words_are_an_error():
    with pytest.raises(ValueError, match="unknown sharding"):
        sharding.parse("{devices=[2,2]<=[4] last_tile_dims={manual}}")


@hypothesis.given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=5), data=st.data()
)
def test_offsets_and_strides_in_a_shard(shape, data):
    """An element's place in a shard is that of the same element in the whole."""
    dim = data.draw(st.integers(0, len(shape) - 1))
    pieces = data.draw(st.integers(1, 4))
    whole = [*shape[:dim], shape[dim] * pieces, *shape[dim + 1 :]]
    index = [data.draw(st.integers(0, n - 1)) for n in shape]
    place, moved = (
        sum(i * s for i, s in zip(index, dense_strides(torch.Size(n)), strict=True))
        for n in (whole, shape)
    )
    assert sharded_cache.moved(place, whole, shape) == moved
