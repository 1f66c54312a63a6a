"""What attention's gradient means, in plain torch: the reference of its ops.

It meets rows and keys as attention_reference.py does, and is as large: its weights are
those of the forward, computed anew from lse.

Tested by tests/ops/test_attention_backward.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..core.lazy import torch
from .attention_reference import Meeting, Work, by_kv_head, mix, of_rows, prepare

if TYPE_CHECKING:
    from .attention_backward import Arguments


def reference(
    a: Arguments,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    num_heads, head_dim = a.query.shape[1:]
    _, page_size, num_kv_heads, *_ = a.geometry
    none = a.query.new_empty(0)
    dq = torch.zeros_like(a.query) if a.wants_dq else none
    dk = dv = none
    if a.wants_dkv:
        dk = a.query.new_zeros(page_size, num_kv_heads, head_dim)
        dv = torch.zeros_like(dk)
    dsinks = none.float()
    if a.wants_dsinks:
        dsinks = dsinks.new_zeros(num_heads)
    work = prepare(a)
    if work is None:
        return dq, dk, dv, dsinks
    grads = _gradients_of_results(a, work)
    if work.pages is not None:
        if a.wants_dq:
            (dq,) = work.by_tiles(
                lambda tile, *more: (_differentiate(work, tile, _Grads(*more)).dq,),
                *grads,
            )
    else:
        each = (t[None] for t in grads)
        found = _differentiate(work, work.all_at_once(), _Grads(*each))
        if a.wants_dq:
            dq = found.dq[0]
        if a.wants_dkv:
            dk, dv = found.of_keys(a.query.dtype)
    if a.wants_dq:
        exists = work.exists[:, None, None, None]
        dq = torch.where(exists, dq * work.factor, 0.0).to(a.query.dtype)
        dq = dq.reshape(a.query.shape)
    if a.wants_dsinks:
        assert a.sinks is not None
        weights = torch.exp(a.sinks.reshape(grads.delta.shape[1:]) - grads.lse)
        sums = torch.where(grads.lse == torch.inf, 0.0, weights * grads.delta).sum(0)
        dsinks = -sums.reshape(num_heads)
    return dq, dk, dv, dsinks


class _Grads(NamedTuple):
    """Of query rows [...]; float32.

    Attributes:
        out: [..., num_kv_heads, query heads of each, head_dim]: out's gradient, scaled.
        lse, delta: the same with 1 for head_dim; +inf and 0 where nothing is seen.
    """

    out: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor


def _gradients_of_results(a: Arguments, work: Work) -> _Grads:
    shape = work.rows.query.shape

    def of_heads(t: torch.Tensor) -> torch.Tensor:
        return t.t().reshape(*shape[:-1], 1)

    grad_out = a.grad_out.float().reshape(shape)
    lse = torch.where(work.exists[:, None, None, None], of_heads(a.lse), torch.inf)
    delta = (grad_out * a.out.float().reshape(shape)).sum(-1, keepdim=True)
    if a.grad_lse is not None:
        delta = delta - of_heads(a.grad_lse)
    delta = torch.where(lse == torch.inf, 0.0, delta)
    return _Grads(grad_out * of_rows(a.v_scale, work.sequence), lse, delta)


class _Found(NamedTuple):
    """Derivatives by scaled queries, and what those by keys and values are made of.

    Attributes:
        dq: [batches, rows, num_kv_heads, query heads of each, head_dim].
        dx, weights: [batches, rows, num_kv_heads, query heads of each, num_kv].
        query, grad_out: as dq.
    """

    dq: torch.Tensor
    dx: torch.Tensor
    weights: torch.Tensor
    query: torch.Tensor
    grad_out: torch.Tensor

    def of_keys(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """dk and dv of the first batch, [num_kv, num_kv_heads, head_dim]."""
        dk = _sums_over_rows(self.dx, self.query)
        dv = _sums_over_rows(self.weights, self.grad_out)
        return dk[0].to(dtype), dv[0].to(dtype)


def _differentiate(work: Work, meeting: Meeting, grads: _Grads) -> _Found:
    rows, keys, values, token, exists = meeting
    logits, slope = work.softmax.logits(rows, keys, token, exists)
    is_seen = (logits > -torch.inf) & (grads.lse < torch.inf)
    weights = torch.where(is_seen, torch.exp(logits - grads.lse), 0.0)
    products = by_kv_head(grads.out, values.permute(0, 2, 3, 1))
    dx = torch.where(is_seen, weights * (products - grads.delta) * slope, 0.0)
    dq = mix(dx, keys.transpose(1, 2))
    return _Found(dq, dx, weights, rows.query, grads.out)


def _sums_over_rows(weights: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """[batches, num_kv, num_kv_heads, head_dim] of weighted rows."""
    by_key = weights.permute(0, 4, 2, 1, 3).flatten(3, 4)[:, :, :, None]
    # Not by [:, :, :, 0], of which torch_xla 2.9.0 may give another shape.
    return mix(by_key, rows.transpose(1, 2).flatten(2, 3)).squeeze(3)
