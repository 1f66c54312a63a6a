"""Rotary position embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core import autocast, mutable, scalars, sharding
from ..core.checks import Checker
from ..core.custom_call import CustomCall
from ..core.dtypes import FLOAT_DTYPES
from ..core.gradients import Backward, Gradient
from ..core.hlo import Spec
from ..core.lazy import torch
from ..core.op import Op

_check = Checker("rotary_embedding")


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rotates pairs of elements of each head by angles that grow with the position.

    For a token at position p, cos[i] = cos_sin_cache[p, i] and sin[i] =
    cos_sin_cache[p, rotary_dim / 2 + i]. Pair i of a head is (x, y) = elements
    (i, i + rotary_dim / 2) with is_neox, (2 i, 2 i + 1) without, and becomes
    (T(T(x cos) - T(y sin)), T(T(y cos) + T(x sin))), where T rounds to the dtype; an
    fp32 table's cos and sin are rounded first, as vLLM's layer rounds the table.
    Elements from rotary_dim on stay. A position outside [0, max_position), which vLLM
    leaves undefined, leaves its token unrotated.

    vLLM's form, which updates query and key in place, is
    `torch.ops.xla_ops.rotary_embedding(positions, query, key, head_size,
    cos_sin_cache, is_neox)`; slices of a fused qkv and padded heads may be given.

    Differentiable in query and key: their gradients are rotated back, by this op.

    Under torch.autocast, key and cos_sin_cache are cast to query's dtype.

    Args:
        positions: [num_tokens] or [batch_size, seq_len], int64 or int32.
        query: [*positions.shape, num_heads * head_size] or [*positions.shape,
            num_heads, head_size], float32, float16 or bfloat16.
        key: likewise with num_kv_heads heads, a divisor of num_heads; or None.
        head_size: elements of a head.
        cos_sin_cache: [max_position, rotary_dim] of query's dtype or float32;
            rotary_dim is even and at most head_size.
        is_neox: how elements pair up, see above.

    Returns:
        The new query and key (None if key is None), like the arguments.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding,
    2021. Semantics: vLLM's `rotary_embedding`.
    """
    _check.tensor("positions", positions)
    _check.tensor("query", query)
    _check.tensor("cos_sin_cache", cos_sin_cache)
    head_size = scalars.integer(_check.op, "head_size", head_size)
    is_neox = scalars.flag(_check.op, "is_neox", is_neox)
    if key is None:
        args = (positions, query, head_size, cos_sin_cache, is_neox)
        return _one(*args), None
    _check.tensor("key", key)
    return _both(positions, query, key, head_size, cos_sin_cache, is_neox)


def _plan(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
) -> mutable.Update:
    tail = (head_size, cos_sin_cache, is_neox)
    if key is None:
        return mutable.Update(_one, (positions, query, *tail), {"query": query})
    targets = {"query": query, "key": key}
    return mutable.Update(_both, (positions, query, key, *tail), targets)


def _check_heads(
    name: str, heads: torch.Tensor, positions: torch.Tensor, head_size: int
) -> int:
    """Checks the shape of queries or keys and returns their number of heads."""
    *tokens, last = heads.shape if heads.dim() else (0,)
    flat = heads.dim() == positions.dim() + 1
    fits = last % head_size == 0 if flat else last == head_size
    if not flat and tokens:
        tokens.pop()
    right = heads.dim() in (positions.dim() + 1, positions.dim() + 2)
    start = "[" + "".join(f"{n}, " for n in positions.shape)
    _check.require(
        right and fits and tokens == list(positions.shape),
        name,
        f"have shape {start}num_heads * {head_size}] or {start}num_heads, {head_size}]",
        list(heads.shape),
    )
    return last // head_size if flat else heads.shape[-2]


def _check_query(positions: torch.Tensor, query: torch.Tensor, head_size: int) -> int:
    _check.dtype("positions", positions, [torch.int64, torch.int32])
    _check.require(
        positions.dim() in (1, 2),
        "positions",
        "have shape [num_tokens] or [batch_size, seq_len]",
        list(positions.shape),
    )
    _check.require(head_size >= 1, "head_size", "be at least 1", head_size)
    _check.dtype("query", query, FLOAT_DTYPES)
    return _check_heads("query", query, positions, head_size)


def _check_cache(
    query: torch.Tensor, cos_sin_cache: torch.Tensor, head_size: int
) -> None:
    wide = [] if query.dtype == torch.float32 else [torch.float32]
    _check.dtype("cos_sin_cache", cos_sin_cache, [query.dtype, *wide])
    _check.rank("cos_sin_cache", cos_sin_cache, "[max_position, rotary_dim]")
    rotary_dim = cos_sin_cache.shape[1]
    _check.require(
        rotary_dim % 2 == 0 and rotary_dim <= head_size,
        "cos_sin_cache",
        f"have an even last dimension of at most {head_size}",
        rotary_dim,
    )


def _lower_both(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
) -> CustomCall:
    num_heads = _check_query(positions, query, head_size)
    _check.dtype("key", key, [query.dtype])
    num_kv_heads = _check_heads("key", key, positions, head_size)
    _check.require(
        num_heads % num_kv_heads == 0 if num_kv_heads else num_heads == 0,
        "key",
        f"have a number of heads that divides query's {num_heads}",
        num_kv_heads,
    )
    _check_cache(query, cos_sin_cache, head_size)
    _check.same_device(
        "query", query, positions=positions, key=key, cos_sin_cache=cos_sin_cache
    )
    return CustomCall(
        "xla_ops.rotary_embedding",
        ("positions", "query", "key", "cos_sin_cache"),
        (Spec.of(query), Spec.of(key)),
        {"head_size": head_size, "is_neox": is_neox},
        may_overwrite={0: "query", 1: "key"},
    )


def _lower_one(
    positions: torch.Tensor,
    query: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
) -> CustomCall:
    _check_query(positions, query, head_size)
    _check_cache(query, cos_sin_cache, head_size)
    _check.same_device("query", query, positions=positions, cos_sin_cache=cos_sin_cache)
    return CustomCall(
        "xla_ops.rotary_embedding_one",
        ("positions", "query", "cos_sin_cache"),
        (Spec.of(query),),
        {"head_size": head_size, "is_neox": is_neox},
        may_overwrite={0: "query"},
    )


def rotate(
    positions: torch.Tensor,
    heads: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
) -> torch.Tensor:
    """What the op means, in plain torch, of queries or of keys."""
    max_position, rotary_dim = cos_sin_cache.shape
    if max_position == 0 or heads.numel() == 0:
        return heads.clone()
    split = heads.reshape(*positions.shape, -1, head_size)
    valid = (positions >= 0) & (positions < max_position)
    row = cos_sin_cache[positions.clamp(0, max_position - 1)].unsqueeze(-2)
    cos, sin = row.to(heads.dtype).chunk(2, dim=-1)
    rotary, rest = split[..., :rotary_dim], split[..., rotary_dim:]
    if is_neox:
        x, y = rotary.chunk(2, dim=-1)
    else:
        x, y = rotary[..., ::2], rotary[..., 1::2]
    pair = (x * cos - y * sin, y * cos + x * sin)
    if is_neox:
        rotated = torch.cat(pair, dim=-1)
    else:
        rotated = torch.stack(pair, dim=-1).flatten(-2)
    rotated = torch.where(valid[..., None, None], rotated, rotary)
    return torch.cat([rotated, rest], dim=-1).reshape(heads.shape)


def _reference_both(
    positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return rotate(positions, query, *rest), rotate(positions, key, *rest)


def rotate_back(
    positions: torch.Tensor,
    heads: torch.Tensor,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
) -> torch.Tensor:
    """The gradient of heads that were rotated: the rotation by the negative angle."""
    back = _opposite(cos_sin_cache)
    return _one(positions, heads, head_size, back, is_neox)


def _opposite(cos_sin_cache: torch.Tensor) -> torch.Tensor:
    """The table of the negative angles.

    Of the table's size; XLA computes it once for all layers that share a table.
    """
    cos, sin = cos_sin_cache.chunk(2, dim=-1)
    return torch.cat([cos, -sin], dim=-1)


def _gradient(backward: Backward) -> dict[str, torch.Tensor]:
    """Rotates back: the adjoint of a rotation is the one by the negative angle."""
    args = backward.args
    tail = (args["head_size"], _opposite(args["cos_sin_cache"]), args["is_neox"])
    names = [name for name in ("query", "key") if name in backward.specs]
    given = {
        name: grad
        for name, grad in zip(names, backward.grads, strict=True)
        if grad is not None and name in backward.wanted
    }
    if len(given) == 2:
        both = _both(args["positions"], given["query"], given["key"], *tail)
        return dict(zip(given, both, strict=True))
    found = {name: _one(args["positions"], grad, *tail) for name, grad in given.items()}
    unused = [name for name in names if name in backward.wanted and name not in given]
    return found | {name: backward.zeros(name) for name in unused}


def _splits(args: Mapping[str, Any]) -> sharding.Rule:
    """Tokens and heads; a dimension of all heads' elements is one of heads too."""
    positions, head_size = args["positions"], args["head_size"]
    tokens = " ".join(["tokens", "tokens1"][: positions.dim()])
    operands = {"positions": tokens}
    for name in ("query", "key"):
        if name in args:
            flat = args[name].dim() == positions.dim() + 1
            heads = f"heads*{head_size}" if flat else "heads !head_size"
            operands[name] = f"{tokens} {heads}"
    results = [operands[name] for name in ("query", "key") if name in args]
    return sharding.Rule(operands, tuple(results))


_both = Op(
    "rotary_embedding_both",
    "(Tensor positions, Tensor query, Tensor key, int head_size, Tensor cos_sin_cache,"
    " bool is_neox) -> (Tensor, Tensor)",
    _lower_both,
    _reference_both,
    autocast=autocast.like("query", "key", "cos_sin_cache"),
    splits=_splits,
    gradient=Gradient(_gradient, keeps=("positions", "cos_sin_cache")),
    public_name="rotary_embedding",
)
_one = Op(
    "rotary_embedding_one",
    "(Tensor positions, Tensor query, int head_size, Tensor cos_sin_cache,"
    " bool is_neox) -> Tensor",
    _lower_one,
    rotate,
    autocast=autocast.like("query", "cos_sin_cache"),
    splits=_splits,
    gradient=Gradient(_gradient, keeps=("positions", "cos_sin_cache")),
    public_name="rotary_embedding",
)

mutable.define(
    "rotary_embedding(Tensor positions, Tensor(a!) query, Tensor(b!)? key,"
    " int head_size, Tensor cos_sin_cache, bool is_neox) -> ()",
    _plan,
    autocast=autocast.like("query", "cos_sin_cache"),
)
