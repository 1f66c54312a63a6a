"""What queries, keys and values of attention were made of.

vLLM's models split what a fused projection gives, norm the heads of queries and keys
if they do that, rotate both and hand the three to attention. One custom call does all
of it from the projection, and the write into the cache. So while a step's program is
traced, norms and rotary embeddings note what they were given, and attention looks for
a projection behind its queries, keys and values. Where it finds one, nobody needs what
the norms and the embedding gave, and it is no part of the program.

Notes end with the trace. Queries, keys, values and positions that were written since
are no longer what was noted; tables and weights are constants of a model.

Tested by tests/vllm/test_find_projection.py and tests/engine/test_projection.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch

from ..core import in_place
from ..core.places import Located, dense_strides


class Projection(NamedTuple):
    """The first arguments of `fused_qk_norm_rope_and_paged_attention`, in order."""

    qkv: torch.Tensor
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    cos_sin_cache: torch.Tensor
    is_neox: bool
    position_ids: torch.Tensor


class _Norm(NamedTuple):
    """A norm of heads."""

    input: torch.Tensor
    version: int
    weight: torch.Tensor
    eps: float


class _Rotation(NamedTuple):
    """A rotary embedding."""

    inputs: tuple[torch.Tensor, torch.Tensor]  # queries and keys
    versions: tuple[int, int]
    positions: torch.Tensor
    positions_version: int
    head_size: int
    cos_sin_cache: torch.Tensor
    is_neox: bool


class _Note(NamedTuple):
    """What made a tensor, which it keeps: no other may get its id meanwhile."""

    tensor: torch.Tensor
    version: int
    made_by: _Norm | _Rotation
    position: int  # among the results


_notes: ContextVar[dict[int, _Note] | None] = ContextVar(
    "xla_ops.vllm.projection", default=None
)


@contextmanager
def noting() -> Iterator[None]:
    """While a program is traced: norms and rotary embeddings are noted."""
    token = _notes.set({})
    try:
        yield
    finally:
        _notes.reset(token)


def note_norm(
    result: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> None:
    """Notes `result`, the RMSNorm of x's rows; only those of heads matter."""
    if _notes.get() is not None and x.dim() == 3 and not x.is_inference():
        _note([result], _Norm(x, x._version, weight, eps))


def note_rotation(
    results: Sequence[torch.Tensor | None],
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
) -> None:
    """Notes the rotary embedding of queries and keys, by `rotary_embedding`."""
    inputs = (query, key)
    if _notes.get() is None or any(t.is_inference() for t in (*inputs, positions)):
        return
    versions = (query._version, key._version)
    how = (positions, positions._version, head_size, cos_sin_cache, is_neox)
    _note(results, _Rotation(inputs, versions, *how))


def find(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
) -> Projection | None:
    """The projection whose parts, normed and rotated, are all that attention gets.

    None where it is not known, or the call that starts from it would do something else.
    """
    rotation = _rotation_of(query, 0)
    if rotation is None or _rotation_of(key, 1) is not rotation:
        return None
    if (
        rotation.head_size != head_size
        or rotation.cos_sin_cache.shape[1] != head_size
        or rotation.positions_version != rotation.positions._version
        or rotation.versions != tuple(t._version for t in rotation.inputs)
    ):
        return None
    norms = [_norm_of(t) for t in rotation.inputs]
    parts = [
        t if norm is None else norm.input
        for t, norm in zip(rotation.inputs, norms, strict=True)
    ]
    heads = (num_heads, num_kv_heads, num_kv_heads)
    qkv = _whole([*parts, value], heads, head_size)
    if qkv is None or rotation.positions.shape != qkv.shape[:1]:
        return None
    sizes = (qkv, num_heads, num_kv_heads, head_size)
    how = (rotation.cos_sin_cache, rotation.is_neox, rotation.positions)
    q_norm, k_norm = norms
    if q_norm is None and k_norm is None:
        return Projection(*sizes, 1.0, None, None, *how)
    if q_norm is None or k_norm is None or q_norm.eps != k_norm.eps:
        return None
    if any(norm.version != norm.input._version for norm in (q_norm, k_norm)):
        return None
    return Projection(*sizes, q_norm.eps, q_norm.weight, k_norm.weight, *how)


def _note(results: Sequence[torch.Tensor | None], made_by: _Norm | _Rotation) -> None:
    notes = _notes.get()
    assert notes is not None
    for i, t in enumerate(results):
        if t is not None:
            notes[id(t)] = _Note(t, t._version, made_by, i)


def _norm_of(t: torch.Tensor) -> _Norm | None:
    note = _note_of(t)
    return note.made_by if note and isinstance(note.made_by, _Norm) else None


def _rotation_of(t: torch.Tensor, position: int) -> _Rotation | None:
    """The rotary embedding among whose results `t` is at this position."""
    note = _note_of(t)
    if note is None or note.position != position:
        return None
    return note.made_by if isinstance(note.made_by, _Rotation) else None


def _note_of(t: torch.Tensor) -> _Note | None:
    """What is noted of a tensor, or of the one that it is a whole view of."""
    notes = _notes.get()
    if not notes or t.is_inference():
        return None
    whole = t
    if t._is_view():
        place = in_place.locate_in_base(t)
        if place is None or place.buffer.numel() != t.numel():
            return None
        if place.offset or not _steps(t, place, dense_strides(t.shape)):
            return None
        whole = place.buffer
    note = notes.get(id(whole))
    return note if note is not None and note.version == whole._version else None


def _whole(
    parts: Sequence[torch.Tensor], heads: Sequence[int], head_size: int
) -> torch.Tensor | None:
    """The tensor [tokens, all heads] whose columns are `parts`, one after the other."""
    columns = sum(heads) * head_size
    buffer, offset = None, 0
    for part, count in zip(parts, heads, strict=True):
        place = in_place.locate_in_base(part) if part._is_view() else None
        if place is None or place.offset != offset:
            return None
        if buffer is not None and place.buffer is not buffer:
            return None
        buffer = place.buffer
        tokens = buffer.numel() // columns
        if part.shape == (tokens, count * head_size):
            strides: tuple[int, ...] = (columns, 1)
        elif part.shape == (tokens, count, head_size):
            strides = (columns, head_size, 1)
        else:
            return None
        if not _steps(part, place, strides):
            return None
        offset += count * head_size
    if buffer is None or buffer.numel() != tokens * columns:
        return None
    shape = (tokens, columns)
    return buffer if buffer.shape == shape else buffer.view(shape)


def _steps(t: torch.Tensor, place: Located, strides: Sequence[int]) -> bool:
    """Whether a tensor has these strides, where more than one element is apart."""
    found = zip(t.shape, place.strides, strides, strict=True)
    return all(size == 1 or stride == wanted for size, stride, wanted in found)
