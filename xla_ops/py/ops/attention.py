"""What paged_attention and flash_attn_varlen share: one functional op each.

The contract is that of xla_ops/cc/ops/attention/attention.h. The two ops compute the
same; they differ in what their errors call the arguments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, get_type_hints

from ..core import debug, handlers, paged_cache, sharded_cache, sharding
from ..core.autocast import Rule
from ..core.checks import Checker, float32
from ..core.custom_call import CustomCall, OptionalOperand
from ..core.dtypes import FLOAT_DTYPES
from ..core.gradients import Gradient
from ..core.hlo import Spec
from ..core.lazy import torch
from ..core.op import Op
from ..core.paged_cache import PagedCache
from . import attention_reference

_PER_HEAD = ("alibi_slopes", "sinks")
FLOAT_OPERANDS = (*_PER_HEAD, "k_scale", "v_scale")


class Names(NamedTuple):
    """What an op calls itself and the arguments that the ops name differently."""

    op: str
    query: str
    key: str
    value: str
    cu_seqlens_q: str
    seqused_k: str
    block_table: str
    scale: str
    soft_cap: str
    cache: str = ""  # the one argument that holds key and value, if there is one

    @property
    def labels(self) -> dict[str, str]:
        """The op's names of the functional op's arguments."""
        others = ("op", "cache")
        return {n: label for n, label in self._asdict().items() if n not in others}

    @property
    def gradient_labels(self) -> dict[str, str]:
        return {"key": self.cache, "value": self.cache} if self.cache else {}


class Batch(NamedTuple):
    """Where the sequences' query rows and KV tokens are; None is absent.

    The shapes are those of attention.h; a block_table makes the keys paged.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    leftpad_k: torch.Tensor | None = None
    num_seqs: torch.Tensor | None = None


class Features(NamedTuple):
    """What both ops take as trailing keyword arguments."""

    alibi_slopes: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    kv_cache_dtype: str = "auto"
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


FEATURES_SCHEMA = (
    "Tensor? alibi_slopes=None, Tensor? sinks=None, str kv_cache_dtype='auto',"
    " Tensor? k_scale=None, Tensor? v_scale=None"
)


class Arguments(NamedTuple):
    """The functional op's arguments, in its order: from the fronts to the handler.

    Attributes:
        query, key, value: query's rows, and the buffers that hold keys and values.
        cu_seqlens_q to num_seqs: the `Batch`.
        alibi_slopes to v_scale, kv_cache_dtype: the `Features`, floats as float32.
        scale, window_left, window_right, soft_cap: as in attention.h.
        num_splits: into how many pieces each sequence's KV tokens are cut; 0: to be
            chosen when the sizes are known, as they are not in a symbolic trace.
        geometry: where keys and values lie in their buffers, `PagedCache.geometry`.
        debug: whether the handler reports what it masks.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
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
    num_splits: int
    geometry: list[int]
    debug: bool

    @property
    def batch(self) -> Batch:
        return Batch(*(getattr(self, name) for name in Batch._fields))


# Types of the functional op's schema; ints may be symbolic.
_SCHEMA_TYPES = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    float: "float",
    int: "SymInt",
    str: "str",
    list[int]: "SymInt[]",
    bool: "bool",
}


def schema(arguments: type) -> str:
    """The arguments of a functional op, in torch's schema language."""
    return ", ".join(
        f"{_SCHEMA_TYPES[hint]} {name}"
        for name, hint in get_type_hints(arguments).items()
    )


def declare(names: Names, gradient: Gradient) -> Op:
    """Declares the functional op torch.ops.xla_ops.<names.op>."""
    check = Checker(names.op)
    return Op(
        names.op,
        f"({schema(Arguments)}) -> (Tensor out, Tensor lse)",
        lambda *args: lower(names, check, Arguments(*args)),
        lambda *args: attention_reference.reference(Arguments(*args)),
        autocast=autocast("query", "key", "value"),
        splits=lambda args: splits(names, Arguments(**args)),
        gradient=gradient,
        labels=names.labels,
        gradient_labels=names.gradient_labels,
    )


def splits(names: Names, a: Arguments) -> sharding.Rule:
    """Heads: a device's queries meet its keys and values, of all tokens."""
    place = dict(zip(paged_cache.ATTRIBUTES, a.geometry, strict=True))
    num_kv_heads, head_stride = place["num_kv_heads"], place["head_stride"]
    operands = {
        name: sharded_cache.layout(getattr(a, name).shape, head_stride, num_kv_heads)
        for name in ("key", "value")
    }
    operands["query"] = "!tokens heads !head_dim"
    for name in FLOAT_OPERANDS:
        t = getattr(a, name)
        if t is not None and t.dim() and (t.numel() > 1 or name in _PER_HEAD):
            operands[name] = "heads" if t.dim() == 1 else "!seqs heads"

    def localize(local: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
        pieces = whole["query"].shape[1] // local["query"].shape[1]
        shapes = {}
        for name in ("key", "value"):
            old, new = whole[name], local[name]
            label = names.labels[name]
            sharded_cache.require_split(names.op, label, old, new, pieces)
            shapes[name] = (old.shape, new.shape)
        new_place = {
            name: sharded_cache.moved(
                number, *shapes["value" if name == "value_offset" else "key"]
            )
            if name.endswith(("_stride", "_offset"))
            else number
            for name, number in place.items()
        }
        new_place["num_kv_heads"] = num_kv_heads // pieces
        # A device has fewer heads to keep itself busy with: the lowering asks anew.
        return {"geometry": list(new_place.values()), "num_splits": 0}

    return sharding.Rule(
        operands, ("!tokens heads !head_dim", "heads !tokens"), localize
    )


def autocast(query: str, key: str, value: str) -> Rule:
    """Makes the rule for torch.autocast of an op with these arguments.

    Queries, keys and values are cast to the autocast dtype, or to that of a given
    result. A paged cache stays as it is, and so do keys in 8 bits; queries are cast to
    the dtype of the former.
    """

    def rule(args: Mapping[str, Any], dtype: torch.dtype) -> dict[str, torch.dtype]:
        keys = args[key] if isinstance(args[key], torch.Tensor) else args[key][0]
        is_paged = any(args.get(f"block_table{s}") is not None for s in ("", "s"))
        new = dict.fromkeys(FLOAT_OPERANDS, torch.float32)
        if args.get("out") is not None:
            dtype = args["out"].dtype
        if args.get("kv_cache_dtype", "auto") != "auto":
            return {**new, query: dtype}
        if is_paged:
            return {**new, query: keys.dtype}
        return {**new, query: dtype, key: dtype, value: dtype}

    return rule


def check_head_dim(
    check: Checker, names: Names, query: torch.Tensor, key: torch.Tensor
) -> None:
    """Checks what the functional op, which gets buffers, cannot."""
    check.rank(names.query, query, "[num_tokens, num_heads, head_dim]")
    head_dim = query.shape[2]
    if key.shape[-1] != head_dim:
        check.require(False, names.key, f"have head_dim {head_dim}", key.shape[-1])


def locate_rows(keys: torch.Tensor, values: torch.Tensor) -> PagedCache:
    """Locates contiguous keys and values where they lie.

    But for a gradient, which is as dense as they are: it takes them as dense values, by
    a copy where they are views.
    """
    is_asked = torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)
    return paged_cache.locate_rows(keys, values, dense=is_asked)


def arguments(
    check: Checker,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cache: PagedCache,
    batch: Batch,
    features: Features,
    scale: float,
    window: tuple[int, int],
    soft_cap: float,
    longest: int,
) -> Arguments:
    """Returns the functional op's arguments.

    Args:
        key, value: what `cache` was located of.
        longest: how many KV tokens a sequence has at most, as far as the host knows.
        The others are as in attention.h.
    """
    if features.kv_cache_dtype == "auto":
        # vLLM's layers give scales whatever the cache is, and read them for fp8.
        features = features._replace(k_scale=None, v_scale=None)
    return Arguments(
        query=query,
        key=_asking_like(key, cache.key_buffer),
        value=_asking_like(value, cache.value_buffer),
        **batch._asdict(),
        alibi_slopes=as_float32(check, "alibi_slopes", features.alibi_slopes),
        sinks=as_float32(check, "sinks", features.sinks),
        k_scale=features.k_scale,
        v_scale=features.v_scale,
        scale=float(scale),
        window_left=window[0],
        window_right=window[1],
        soft_cap=float(soft_cap),
        kv_cache_dtype=features.kv_cache_dtype,
        num_splits=_plan(query, cache.num_kv_heads, batch, longest).num_splits,
        geometry=cache.geometry,
        debug=debug.enabled(),
    )


def _asking_like(view: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """`buffer`, without the gradient that it asks for where its view does not.

    A view is also what detach() gives.
    """
    return buffer.detach() if buffer.requires_grad > view.requires_grad else buffer


class Plan(NamedTuple):
    """What the library asks for, as in xla_ops/cc/ops/attention/attention_plan.h."""

    num_splits: int
    workspace_bytes: int


# The reference cuts nothing, and works in memory of its own.
_NO_LIBRARY = Plan(1, 0)
# While a graph with symbolic sizes is traced: a size that a plan looks at would tie the
# graph to it.
_LATER = Plan(0, 0)


def _plan(
    query: torch.Tensor,
    num_kv_heads: int,
    batch: Batch,
    longest: int,
    num_splits: int = 0,
) -> Plan:
    """Asks the library that will run the call.

    Args:
        longest: how many KV tokens a sequence has at most.
        num_splits: 0 where the library is to choose.
    """
    num_tokens, num_heads, head_dim = query.shape
    max_num_seqs = batch.cu_seqlens_q.numel() - 1
    sizes = (num_tokens, num_heads, num_kv_heads, head_dim, max_num_seqs, longest)
    if not all(isinstance(n, int) for n in sizes):
        return _LATER
    request = (*sizes[:4], max(max_num_seqs, 0), _octave(longest), num_splits)
    platform = handlers.platform_of(query.device)
    fields = handlers.plan(platform, "attention", request, len(Plan._fields))
    return _NO_LIBRARY if fields is None else Plan(*fields)


def _octave(n: int) -> int:
    """Returns the largest power of two up to n.

    A bound that grows token by token so changes a plan, and with it the program, once
    an octave or less often.
    """
    power = 1
    while 2 * power <= n:
        power *= 2
    return power if n >= 1 else 0


def smaller(bound: int, size: int) -> int:
    """The smaller one; where symbolic, `size`, since a comparison would tie both."""
    known = isinstance(bound, int) and isinstance(size, int)
    return min(bound, size) if known else size


def as_float32(
    check: Checker, argument: str, t: torch.Tensor | None
) -> torch.Tensor | None:
    """Checks a feature; vLLM holds sinks, for one, in the model's dtype."""
    if t is None:
        return None
    check.dtype(argument, t, FLOAT_DTYPES)
    return t.float()


def lower(names: Names, check: Checker, a: Arguments) -> CustomCall:
    """Checks the arguments and returns the call that they make."""
    check.dtype(names.query, a.query, FLOAT_DTYPES)
    check.rank(names.query, a.query, "[num_tokens, num_heads, head_dim]")
    num_tokens, num_heads, head_dim = a.query.shape
    check.require(
        head_dim % 8 == 0 and 0 < head_dim <= 256,
        names.query,
        "have a head_dim that is a multiple of 8 up to 256",
        head_dim,
    )
    cache_dtypes = paged_cache.dtypes(check, a.query, a.kv_cache_dtype)
    check.dtype(names.key, a.key, cache_dtypes)
    check.dtype(names.value, a.value, cache_dtypes)
    place = dict(zip(paged_cache.ATTRIBUTES, a.geometry, strict=True))
    del place["head_dim"]
    num_kv_heads = place["num_kv_heads"]
    check.require(
        num_kv_heads > 0 and num_heads % num_kv_heads == 0,
        "num_kv_heads",
        f"divide num_heads {num_heads}",
        num_kv_heads,
    )
    max_num_seqs = _check_batch(names, check, a.query, a.batch)
    _check_features(names, check, a, max_num_seqs, num_kv_heads)
    # As the handler gets them.
    scale, soft_cap = float32(a.scale), float32(a.soft_cap)
    check.require(math.isfinite(scale), names.scale, "be finite", f"{scale:g}")
    for name in ("window_left", "window_right"):
        window = getattr(a, name)
        check.require(window >= -1, name, "be at least -1", window)
    check.require(
        math.isfinite(soft_cap) and soft_cap >= 0,
        names.soft_cap,
        "be finite and at least 0",
        f"{soft_cap:g}",
    )
    check.require(
        0 <= a.num_splits <= 1024, "num_splits", "be from 1 to 1024", a.num_splits
    )
    plan = _plan(a.query, num_kv_heads, a.batch, _longest(a), a.num_splits)
    return CustomCall(
        f"xla_ops.{names.op}",
        (
            "query",
            "key",
            "value",
            *(OptionalOperand(name, torch.int32) for name in Batch._fields),
            *(OptionalOperand(name, torch.float32) for name in FLOAT_OPERANDS),
        ),
        (Spec.of(a.query), Spec((num_heads, num_tokens), torch.float32)),
        {
            "scale": scale,
            "window_left": a.window_left,
            "window_right": a.window_right,
            "soft_cap": soft_cap,
            "kv_cache_dtype": a.kv_cache_dtype,
            "paged": a.block_table is not None,
            "num_splits": a.num_splits or plan.num_splits,
            **place,
            "debug": a.debug,
        },
        nothing_to_do=a.query.numel() == 0,
        scratch=(Spec((plan.workspace_bytes,), torch.uint8),),
    )


def _longest(a: Arguments) -> int:
    """How many KV tokens a sequence has at most, by the shapes alone."""
    page_size = a.geometry[paged_cache.ATTRIBUTES.index("page_size")]
    return page_size if a.block_table is None else a.block_table.shape[1] * page_size


def _check_features(
    names: Names, check: Checker, a: Arguments, max_num_seqs: int, num_kv_heads: int
) -> None:
    num_heads = a.query.shape[1]
    if a.alibi_slopes is not None:
        check.dtype("alibi_slopes", a.alibi_slopes, [torch.float32])
        check.require(
            list(a.alibi_slopes.shape) in ([num_heads], [max_num_seqs, num_heads]),
            "alibi_slopes",
            f"have shape [{num_heads}] or [{max_num_seqs}, {num_heads}]",
            list(a.alibi_slopes.shape),
        )
    if a.sinks is not None:
        check.dtype("sinks", a.sinks, [torch.float32])
        check.shape("sinks", a.sinks, [num_heads])
    for name in ("k_scale", "v_scale"):
        t = getattr(a, name)
        if t is not None:
            shape = [max_num_seqs, num_kv_heads]
            _check_scale(check, name, t, shape, a.kv_cache_dtype)
    floats = {name: getattr(a, name) for name in FLOAT_OPERANDS}
    check.same_device(
        names.query, a.query, **{names.key: a.key, names.value: a.value}, **floats
    )


def _check_batch(
    names: Names, check: Checker, query: torch.Tensor, batch: Batch
) -> int:
    """Checks the integer tensors and returns max_num_seqs."""
    table = batch.block_table
    by_name = {
        names.seqused_k: batch.seqused_k,
        names.block_table: batch.block_table,
        names.cu_seqlens_q: batch.cu_seqlens_q,
        "cu_seqlens_k": batch.cu_seqlens_k,
        "leftpad_k": batch.leftpad_k,
        "num_seqs": batch.num_seqs,
    }
    for name, t in by_name.items():
        if t is not None:
            check.dtype(name, t, [torch.int32])
    check.same_device(names.query, query, **by_name)
    if table is not None:
        paged = f"with {names.block_table}"
        for name in ("cu_seqlens_k", "leftpad_k"):
            check.absent(name, by_name[name], paged)
        seqused_k = check.given(names.seqused_k, batch.seqused_k, paged)
        check.rank(names.seqused_k, seqused_k, "[max_num_seqs]")
        max_num_seqs = seqused_k.shape[0]
        check.require(
            table.dim() == 2 and table.shape[0] == max_num_seqs,
            names.block_table,
            f"have shape [{max_num_seqs}, max_blocks]",
            list(table.shape),
        )
        check.shape(names.cu_seqlens_q, batch.cu_seqlens_q, [max_num_seqs + 1])
    else:
        check.require(
            batch.cu_seqlens_q.dim() == 1 and batch.cu_seqlens_q.shape[0] > 0,
            names.cu_seqlens_q,
            "have shape [max_num_seqs + 1]",
            list(batch.cu_seqlens_q.shape),
        )
        max_num_seqs = batch.cu_seqlens_q.shape[0] - 1
        cu_seqlens_k = check.given(
            "cu_seqlens_k", batch.cu_seqlens_k, f"without {names.block_table}"
        )
        check.shape("cu_seqlens_k", cu_seqlens_k, [max_num_seqs + 1])
        for name in (names.seqused_k, "leftpad_k"):
            t = by_name[name]
            if t is not None:
                check.shape(name, t, [max_num_seqs])
    if batch.num_seqs is not None:
        check.one_element("num_seqs", batch.num_seqs)
    return max_num_seqs


def _check_scale(
    check: Checker, name: str, t: torch.Tensor, shape: list[int], kv_cache_dtype: str
) -> None:
    if kv_cache_dtype == "auto":
        check.absent(name, t, "with kv_cache_dtype auto")
    check.dtype(name, t, [torch.float32])
    check.require(
        t.numel() == 1 or list(t.shape) == shape,
        name,
        f"have 1 element or shape {shape}",
        f"shape {list(t.shape)}",
    )
