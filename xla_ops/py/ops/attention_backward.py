"""The gradients of paged_attention and flash_attn_varlen: one functional op each.

The contract is that of
xla_ops/cc/ops/attention_backward/attention_backward.h. Keys and values are
differentiated where they are contiguous and dense, as `attention.locate_rows` has them
for that; those of a cache, slopes and scales are not, and ask for it in vain.

Tested by tests/ops/test_attention_backward.py and test_attention_backward_calls.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..core import autocast, handlers, paged_cache, sharding
from ..core.checks import Checker
from ..core.custom_call import CustomCall, OptionalOperand
from ..core.gradients import Backward, Gradient
from ..core.hlo import Spec
from ..core.lazy import torch
from ..core.op import Op
from . import attention, attention_backward_reference
from .attention import Batch, Names


class Arguments(NamedTuple):
    """The functional op's arguments, in its order.

    Attributes:
        grad_out, grad_lse: gradients of the op's results; None of lse: zero.
        out, lse: its results.
        query to v_scale, scale to geometry: its arguments (`attention.Arguments`).
        deterministic: whether every run must give dq and dsinks the same bits.
        wants_dq, wants_dkv, wants_dsinks: which results are wanted; the others have no
            element.
    """

    grad_out: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    grad_lse: torch.Tensor | None
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor | None
    seqused_k: torch.Tensor | None
    block_table: torch.Tensor | None
    leftpad_k: torch.Tensor | None
    num_seqs: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    sinks: torch.Tensor | None
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    scale: float
    window_left: int
    window_right: int
    soft_cap: float
    kv_cache_dtype: str
    geometry: list[int]
    deterministic: bool
    wants_dq: bool
    wants_dkv: bool
    wants_dsinks: bool

    @property
    def forward(self) -> attention.Arguments:
        """The arguments of the op itself, which is cut into one piece."""
        given = self._asdict()
        known = {n: given[n] for n in attention.Arguments._fields if n in given}
        return attention.Arguments(**known, num_splits=1, debug=False)

    @property
    def batch(self) -> Batch:
        return self.forward.batch


_RESULTS = "(Tensor dq, Tensor dk, Tensor dv, Tensor dsinks)"
# The op's arguments that are tensors.
_TENSORS = ("query", "key", "value", *Batch._fields, *attention.FLOAT_OPERANDS)


def declare(names: Names) -> Gradient:
    """Declares torch.ops.xla_ops.<names.op>_backward; returns the gradient by it."""
    own_names = names._replace(op=f"{names.op}_backward")
    check = Checker(own_names.op)
    op = Op(
        own_names.op,
        f"({attention.schema(Arguments)}) -> {_RESULTS}",
        lambda *args: _lower(own_names, check, Arguments(*args)),
        lambda *args: attention_backward_reference.reference(Arguments(*args)),
        autocast=autocast.unchanged,
        splits=lambda args: _splits(own_names, Arguments(**args)),
        public_name=names.op,
        labels=names.labels,
        gradient_labels=names.gradient_labels,
    )
    return Gradient(lambda b: _compute(op, b), _TENSORS, keeps_results=(0, 1))


def _compute(op: Op, b: Backward) -> dict[str, torch.Tensor]:
    args: Mapping[str, Any] = b.args
    grad_out, grad_lse = b.grads
    out, lse = b.results[0], b.results[1]
    asks_dkv = "key" in b.wanted or "value" in b.wanted
    wants = {
        "wants_dq": "query" in b.wanted,
        "wants_dkv": asks_dkv and _are_dense_rows(args),
        "wants_dsinks": "sinks" in b.wanted,
    }
    if not any(wants.values()):
        return {}
    given = {
        "grad_out": torch.zeros_like(out) if grad_out is None else grad_out,
        "grad_lse": grad_lse,
        "out": out,
        "lse": lse,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        **wants,
    }
    known = {**args, **given}
    dq, dk, dv, dsinks = op(*(known[name] for name in Arguments._fields))
    found = {"query": dq} if wants["wants_dq"] else {}
    if wants["wants_dkv"]:
        found |= {"key": dk, "value": dv}
    if wants["wants_dsinks"]:
        found["sinks"] = dsinks
    return found


def _are_dense_rows(args: Mapping[str, Any]) -> bool:
    """Whether `key` and `value` have the shape of their gradients."""
    place = dict(zip(paged_cache.ATTRIBUTES, args["geometry"], strict=True))
    key, value = args["key"], args["value"]
    dense = (place["num_kv_heads"] * place["head_dim"], place["head_dim"])
    return (
        args["block_table"] is None
        and args["kv_cache_dtype"] == "auto"
        and key.dim() == value.dim() == 3
        and (place["page_stride"], place["head_stride"]) == dense
        and (place["key_offset"], place["value_offset"]) == (0, 0)
    )


def _lower(names: Names, check: Checker, a: Arguments) -> CustomCall:
    forward = attention.lower(names, check, a.forward)
    place = dict(zip(paged_cache.ATTRIBUTES, a.geometry, strict=True))
    num_tokens, num_heads, head_dim = a.query.shape
    for name in ("grad_out", "out"):
        t = getattr(a, name)
        check.dtype(name, t, [a.query.dtype])
        check.shape(name, t, a.query.shape)
    for name in ("lse", "grad_lse"):
        t = getattr(a, name)
        if t is not None:
            check.dtype(name, t, [torch.float32])
            check.shape(name, t, [num_heads, num_tokens])
    check.same_device(
        names.query,
        a.query,
        grad_out=a.grad_out,
        out=a.out,
        lse=a.lse,
        grad_lse=a.grad_lse,
    )
    for is_so, rule in (
        (a.wants_dkv and a.block_table is not None, f"with {names.block_table}"),
        (
            a.wants_dkv and a.kv_cache_dtype != "auto",
            f"with kv_cache_dtype {a.kv_cache_dtype}",
        ),
    ):
        check.require(not is_so, "wants_dkv", f"be false {rule}", "true")
    check.require(
        not a.wants_dsinks or a.sinks is not None,
        "wants_dsinks",
        "be false without sinks",
        "true",
    )
    rows = (place["page_size"], place["num_kv_heads"], head_dim)
    shapes = {
        "dq": (a.wants_dq, tuple(a.query.shape), a.query.dtype),
        "dk": (a.wants_dkv, rows, a.query.dtype),
        "dv": (a.wants_dkv, rows, a.query.dtype),
        "dsinks": (a.wants_dsinks, (num_heads,), torch.float32),
    }
    left_out = ("num_splits", "debug")
    attributes = {n: v for n, v in forward.attributes.items() if n not in left_out}
    return CustomCall(
        f"xla_ops.{names.op}",
        (
            *("grad_out", "query", "key", "value", "out", "lse"),
            OptionalOperand("grad_lse", torch.float32),
            *forward.operands[3:],
        ),
        tuple(
            Spec(shape if is_wanted else (0,), dtype)
            for is_wanted, shape, dtype in shapes.values()
        ),
        {
            **attributes,
            "deterministic": a.deterministic,
            "wants_dq": a.wants_dq,
            "wants_dkv": a.wants_dkv,
            "wants_dsinks": a.wants_dsinks,
        },
        scratch=(Spec((_workspace_bytes(a, place["num_kv_heads"]),), torch.uint8),),
    )


def _workspace_bytes(a: Arguments, num_kv_heads: int) -> int:
    """Asks the library that will run the call.

    0 where none will, and while a graph with symbolic sizes is traced.
    """
    num_tokens, num_heads, head_dim = a.query.shape
    max_num_seqs = a.cu_seqlens_q.numel() - 1
    sizes = (num_tokens, num_heads, num_kv_heads, head_dim, max_num_seqs)
    if not all(isinstance(n, int) for n in sizes):
        return 0
    platform = handlers.platform_of(a.query.device)
    fields = handlers.plan(platform, "attention_backward", sizes, 1)
    return 0 if fields is None else fields[0]


def _splits(names: Names, a: Arguments) -> sharding.Rule:
    """Heads, as of the op itself."""
    rule = attention.splits(names, a.forward)
    rows, of_rows = "!tokens heads !head_dim", "heads !tokens"
    operands = {"grad_out": rows, "out": rows, "lse": of_rows, "grad_lse": of_rows}
    layouts = (
        (a.wants_dq, rows),
        (a.wants_dkv, "!kv_tokens heads !head_dim"),
        (a.wants_dkv, "!kv_tokens heads !head_dim"),
        (a.wants_dsinks, "heads"),
    )

    def localize(local: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
        assert rule.localize is not None
        return {"geometry": rule.localize(local, whole)["geometry"]}

    return sharding.Rule(
        {**rule.operands, **operands},
        tuple(layout if is_wanted else "!none" for is_wanted, layout in layouts),
        localize,
    )
