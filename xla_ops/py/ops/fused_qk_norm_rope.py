"""RMSNorm of queries' and keys' heads and rotary embedding in one pass, in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..core import front, in_place, scalars, sharding
from ..core.checks import Checker, float32
from ..core.custom_call import CustomCall
from ..core.dtypes import FLOAT_DTYPES
from ..core.foreign import Foreign
from ..core.gradients import Backward, Gradient
from ..core.hlo import Spec
from ..core.lazy import torch
from ..core.op import NAMESPACE, Op
from . import rms_norm_backward, rotary_embedding

_check = Checker("fused_qk_norm_rope")


def fused_qk_norm_rope(
    qkv: torch.Tensor,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    position_ids: torch.Tensor,
) -> None:
    """Normalises each head of queries and keys and rotates it, in place in `qkv`.

    y = x * (weight / sqrt(mean(x^2) + eps)) over a head, then for a token at position p
    pair i of the head, elements (a, b) = (i, i + head_dim / 2) with is_neox and
    (2 i, 2 i + 1) without, becomes (y_a cos - y_b sin, y_b cos + y_a sin) with
    cos = cos_sin_cache[p, i] and sin = cos_sin_cache[p, head_dim / 2 + i]. All of it is
    fp32, rounded once to the dtype: `rms_norm` and `rotary_embedding` by themselves
    round after every step. Values stay. A token whose position is outside
    [0, max_position), which vLLM leaves undefined, is normalised and not rotated.

    In place: lazily, under torch.compile(backend="openxla"), and through views. A `qkv`
    that the same program computes is overwritten where it is.

    Differentiable in qkv and the weights. Where one of them requires a gradient, the
    new value is computed beside the old one, which the backward reads, and then copied.

    Under torch.autocast, the weights are cast to qkv's dtype, and so is a cos_sin_cache
    that is not float32.

    Args:
        qkv: [num_tokens, (num_heads_q + num_heads_k + num_heads_v) * head_dim],
            float32, float16 or bfloat16 (vLLM: not float32).
        num_heads_q, num_heads_k, num_heads_v: heads of queries, keys and values.
        head_dim: elements of a head; even (vLLM: 64, 128 or 256).
        eps: positive.
        q_weight, k_weight: [head_dim], qkv's dtype.
        cos_sin_cache: [max_position, head_dim], qkv's dtype or float32.
        is_neox: how elements pair up, see above.
        position_ids: [num_tokens], int64 or int32.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Sources: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019; Su et al.,
    RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021. Semantics:
    vLLM's `fused_qk_norm_rope`.

    Example:
        >>> qkv = torch.tensor([[3.0, 4.0, 6.0, 8.0, 1.0, 2.0]])
        >>> ones, table = torch.ones(2), torch.tensor([[0.0, 1.0]])  # 90 degrees
        >>> position = torch.tensor([0])
        >>> fused_qk_norm_rope(qkv, 1, 1, 1, 2, 1e-6, ones, ones, table, True, position)
        >>> qkv
        tensor([[-1.1314,  0.8485, -1.1314,  0.8485,  1.0000,  2.0000]])
    """
    for name, t in (
        ("qkv", qkv),
        ("q_weight", q_weight),
        ("k_weight", k_weight),
        ("cos_sin_cache", cos_sin_cache),
        ("position_ids", position_ids),
    ):
        _check.tensor(name, t)
    is_foreign = isinstance(qkv, Foreign)
    op = _front if is_foreign else torch.ops.xla_ops.fused_qk_norm_rope
    op(
        qkv,
        scalars.integer(_check.op, "num_heads_q", num_heads_q),
        scalars.integer(_check.op, "num_heads_k", num_heads_k),
        scalars.integer(_check.op, "num_heads_v", num_heads_v),
        scalars.integer(_check.op, "head_dim", head_dim),
        scalars.number(_check.op, "eps", eps),
        q_weight,
        k_weight,
        cos_sin_cache,
        scalars.flag(_check.op, "is_neox", is_neox),
        position_ids,
    )


def _front(qkv: torch.Tensor, *rest: Any) -> None:
    _lower(qkv, *rest)  # the checks, before a buffer is touched
    if not qkv.numel():
        return
    in_place.check_writable(_check.op, {"qkv": (qkv, in_place.locate(qkv))})
    if in_place.is_value(qkv):
        in_place.update(_op, qkv, *rest)
    else:
        _op.update_at_once(qkv, *rest, None)


def _lower(
    qkv: torch.Tensor,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    position_ids: torch.Tensor,
) -> CustomCall:
    heads = {"num_heads_q": num_heads_q, "num_heads_k": num_heads_k}
    heads["num_heads_v"] = num_heads_v
    check_heads(
        *(_check, qkv, heads, sum(heads.values()), head_dim, eps),
        *(q_weight, k_weight, cos_sin_cache, position_ids),
    )
    return CustomCall(
        "xla_ops.fused_qk_norm_rope",
        ("qkv", "q_weight", "k_weight", "cos_sin_cache", "position_ids"),
        (Spec.of(qkv),),
        {**heads, "head_dim": head_dim, "eps": eps, "is_neox": is_neox},
        aliases={0: "qkv"},
        nothing_to_do=qkv.numel() == 0 or num_heads_q + num_heads_k == 0,
    )


def check_heads(
    check: Checker,
    qkv: torch.Tensor,
    counts: Mapping[str, int],
    num_heads: int,
    head_dim: int,
    eps: float,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    cos_sin_cache: torch.Tensor,
    position_ids: torch.Tensor,
) -> None:
    """Checks a fused projection of `num_heads` heads and what is done to it.

    `counts` are the arguments that say how many heads there are. Both weights are given
    or neither is.
    """
    check.dtype("qkv", qkv, FLOAT_DTYPES)
    for name, count in counts.items():
        check.require(count >= 0, name, "be at least 0", count)
    check.require(
        head_dim >= 2 and head_dim % 2 == 0,
        "head_dim",
        "be even and at least 2",
        head_dim,
    )
    columns = num_heads * head_dim
    check.require(
        qkv.dim() == 2 and qkv.shape[1] == columns,
        "qkv",
        f"have shape [num_tokens, {columns}]",
        list(qkv.shape),
    )
    check.positive_finite("eps", eps)
    if q_weight is None:
        check.absent("k_weight", k_weight, "without q_weight")
    else:
        k_weight = check.given("k_weight", k_weight, "with q_weight")
        for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
            check.dtype(name, weight, [qkv.dtype])
            check.shape(name, weight, [head_dim])
    wide = [] if qkv.dtype == torch.float32 else [torch.float32]
    check.dtype("cos_sin_cache", cos_sin_cache, [qkv.dtype, *wide])
    check.require(
        cos_sin_cache.dim() == 2 and cos_sin_cache.shape[1] == head_dim,
        "cos_sin_cache",
        f"have shape [max_position, {head_dim}]",
        list(cos_sin_cache.shape),
    )
    check.dtype("position_ids", position_ids, [torch.int64, torch.int32])
    check.shape("position_ids", position_ids, qkv.shape[:1])
    check.same_device(
        "qkv",
        qkv,
        q_weight=q_weight,
        k_weight=k_weight,
        cos_sin_cache=cos_sin_cache,
        position_ids=position_ids,
    )


def reference(
    qkv: torch.Tensor,
    num_heads_q: int,
    num_heads_k: int,
    num_heads_v: int,
    head_dim: int,
    eps: float,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
    position_ids: torch.Tensor,
) -> torch.Tensor:
    """What the op means, in plain torch."""
    heads = num_heads_q + num_heads_k
    split = qkv.reshape(-1, heads + num_heads_v, head_dim)
    x = split[:, :heads].float()
    weight = torch.cat(
        [
            q_weight.float().expand(num_heads_q, head_dim),
            k_weight.float().expand(num_heads_k, head_dim),
        ]
    )
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + float32(eps))
    y = x * (scale * weight)
    max_position = cos_sin_cache.shape[0]
    if max_position:
        valid = (position_ids >= 0) & (position_ids < max_position)
        row = cos_sin_cache[position_ids.clamp(0, max_position - 1)].float()
        cos, sin = row[:, None].chunk(2, dim=-1)
        if is_neox:
            a, b = y.chunk(2, dim=-1)
        else:
            a, b = y[..., ::2], y[..., 1::2]
        pair = (a * cos - b * sin, b * cos + a * sin)
        if is_neox:
            rotated = torch.cat(pair, dim=-1)
        else:
            rotated = torch.stack(pair, dim=-1).flatten(-2)
        y = torch.where(valid[:, None, None], rotated, y)
    out = torch.cat([y.to(qkv.dtype), split[:, heads:]], dim=1)
    return out.reshape(qkv.shape)


def _differentiable_front(qkv: torch.Tensor, *rest: Any) -> None:
    """The front for torch's autograd: its backward keeps what this overwrites."""
    qkv.copy_(_op(qkv.clone(), *rest, None))


def _gradient(backward: Backward) -> dict[str, torch.Tensor]:
    """Rotates back, as rotary_embedding's does, then differentiates the norms."""
    (grad,), args = backward.grads, backward.args
    assert grad is not None
    counts = [args[f"num_heads_{part}"] for part in "qkv"]
    dim, eps = args["head_dim"], args["eps"]
    shape = (grad.shape[0], sum(counts), dim)
    rotation = (dim, args["cos_sin_cache"], args["is_neox"])
    *rotated, values = grad.reshape(shape).split(counts, dim=1)
    heads = args["qkv"].reshape(shape).split(counts, dim=1)
    parts, found = [], {}
    for name, turned, x in zip(("q_weight", "k_weight"), rotated, heads, strict=False):
        turned = rotary_embedding.rotate_back(args["position_ids"], turned, *rotation)
        # Rows of heads: `sharding` can say how these are split.
        of_heads, size = x.shape, (x.shape[0] * x.shape[1], dim)
        turned, x = turned.reshape(size), x.reshape(size)
        wanted = ("weight",) if name in backward.wanted else ()
        both = rms_norm_backward.gradients(turned, x, args[name], None, eps, wanted)
        parts.append(both["input"].reshape(of_heads))
        if wanted:
            found[name] = both["weight"]
    if "qkv" in backward.wanted:
        found["qkv"] = torch.cat([*parts, values], dim=1).reshape(grad.shape)
    return found


def autocast(args: Mapping[str, Any], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What the weights and the table are cast to."""
    given, table = args["qkv"].dtype, args["cos_sin_cache"].dtype
    # A float32 table is legal, and worth more than one that was rounded.
    casts = dict.fromkeys(("q_weight", "k_weight"), given)
    return casts if table == torch.float32 else {**casts, "cos_sin_cache": given}


_ARGUMENTS = (
    "int num_heads_q, int num_heads_k, int num_heads_v, int head_dim, float eps,"
    " Tensor q_weight, Tensor k_weight, Tensor cos_sin_cache, bool is_neox,"
    " Tensor position_ids"
)
_op = Op(
    "fused_qk_norm_rope_functional",
    f"(Tensor qkv, {_ARGUMENTS}, Tensor? donor) -> Tensor",
    _lower,
    reference,
    autocast=autocast,
    # Queries, keys and values lie one after the other: no piece has its own of each.
    splits=sharding.Rule(
        {"qkv": "tokens ~heads", "position_ids": "tokens"}, ("tokens !heads",)
    ),
    gradient=Gradient(
        _gradient,
        keeps=("qkv", "q_weight", "k_weight", "cos_sin_cache", "position_ids"),
    ),
    public_name="fused_qk_norm_rope",
)

front.define(
    NAMESPACE,
    f"fused_qk_norm_rope(Tensor(a!) qkv, {_ARGUMENTS}) -> ()",
    _front,
    autocast=autocast,
    differentiable=front.Differentiable(
        _differentiable_front, ("qkv", "q_weight", "k_weight")
    ),
)
