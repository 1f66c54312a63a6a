"""Copies blocks of one paged cache to another, on one device or between two."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ..core import autocast, debug, front, in_place, sharded_cache, sharding
from ..core.checks import Checker
from ..core.custom_call import CustomCall
from ..core.dtypes import FLOAT_DTYPES, FP8_DTYPES
from ..core.foreign import Foreign
from ..core.hlo import Spec
from ..core.lazy import torch, tracing
from ..core.op import NAMESPACE, Op
from ..core.places import Located, dense_strides
from .copy_blocks import can_copy_within, copy_within

_check = Checker("swap_blocks")
_DTYPES = (*FLOAT_DTYPES, *FP8_DTYPES, torch.int8, torch.uint8)
_MAX_REPORTS = 8


def swap_blocks(
    src: torch.Tensor, dst: torch.Tensor, block_mapping: torch.Tensor
) -> None:
    """Copies blocks of `src` to blocks of `dst`, in place in `dst`.

    Block destination of `dst` takes block source of `src` for one pair
    (source, destination) of `block_mapping` after the other. A pair with a negative
    number is padding and is skipped; so is one with a number past its cache, which
    `set_debug(True)` reports. Where src is dst this is `copy_blocks`.

    On one device: lazily, under torch.compile(backend="openxla"), and through views; by
    one kernel, and never a copy of a cache unless the two are different views of one
    tensor. Between the CPU and an XLA or CUDA device, as when blocks leave the GPU and
    come back: the blocks alone travel, all together, and the call waits for them; not
    in a compiled function.

    torch.autocast changes nothing.

    Args:
        src, dst: caches [num_blocks, ...] of one dtype (float32, float16, bfloat16,
            fp8, int8 or uint8), alike but in their number of blocks, of any rank from 1
            on and any layout. On one device, or one of them on the CPU.
        block_mapping: [num_pairs, 2], int64, on the CPU or on a cache's device. vLLM's
            is on the CPU.

    Raises:
        ValueError: an argument breaks one of the rules above.

    Semantics: vLLM's `_C_cache_ops.swap_blocks`, which takes no two CPU tensors.

    Example:
        >>> gpu, cpu = torch.arange(6.0).reshape(3, 2), torch.zeros(2, 2)
        >>> swap_blocks(gpu, cpu, torch.tensor([[2, 0], [0, 1]]))
        >>> cpu
        tensor([[4., 5.],
                [0., 1.]])
    """
    for name, t in (("src", src), ("dst", dst), ("block_mapping", block_mapping)):
        _check.tensor(name, t)
    is_foreign = isinstance(src, Foreign)
    op = _front if is_foreign else torch.ops.xla_ops.swap_blocks
    op(src, dst, block_mapping)


def _front(src: torch.Tensor, dst: torch.Tensor, block_mapping: torch.Tensor) -> None:
    _check.dtype("dst", dst, _DTYPES)
    _check.dtype("src", src, [dst.dtype])
    _check.require(dst.dim() > 0, "dst", "have rank 1 or more", "shape []")
    _check.require(
        src.dim() == dst.dim() and src.shape[1:] == dst.shape[1:],
        "src",
        "have shape [num_blocks" + "".join(f", {n}" for n in dst.shape[1:]) + "]",
        list(src.shape),
    )
    _check_mapping(block_mapping)
    _check.require(
        block_mapping.device in (src.device, dst.device)
        or block_mapping.device.type == "cpu",
        "block_mapping",
        f"be on the CPU or on dst's device {dst.device}",
        block_mapping.device,
    )
    if src.device == dst.device:
        _on_one_device(src, dst, block_mapping)
        return
    kinds = (src.device.type, dst.device.type)
    _check.require(
        "cpu" in kinds and "meta" not in kinds,
        "src",
        f"be on dst's device {dst.device} or the CPU",
        src.device,
    )
    _check.require(
        not _is_traced(src, dst, block_mapping),
        "src",
        f"be on dst's device {dst.device} in a compiled function",
        src.device,
    )
    _between_devices(src, dst, block_mapping.cpu())


def _check_mapping(block_mapping: torch.Tensor) -> None:
    _check.dtype("block_mapping", block_mapping, [torch.int64])
    _check.require(
        block_mapping.dim() == 2 and block_mapping.shape[1] == 2,
        "block_mapping",
        "have shape [num_pairs, 2]",
        list(block_mapping.shape),
    )


def _is_traced(*tensors: torch.Tensor) -> bool:
    is_plain = all(map(tracing.is_plain, tensors))
    return not is_plain or bool(torch.compiler.is_compiling())


def _between_devices(
    src: torch.Tensor, dst: torch.Tensor, block_mapping: torch.Tensor
) -> None:
    """Carries the blocks from the CPU to the other device or back, at once."""
    # Of several pairs with one destination the last one counts: src gets nothing.
    wanted: dict[int, int] = {}
    reports = 0
    for i, (source, target) in enumerate(block_mapping.tolist()):
        if source < 0 or target < 0:
            continue
        if source < src.shape[0] and target < dst.shape[0]:
            wanted[target] = source
        elif debug.enabled() and reports < _MAX_REPORTS:
            reports += 1
            print(
                f"xla_ops: swap_blocks: block_mapping[{i}] must be less than"
                f" [{src.shape[0]}, {dst.shape[0]}], got [{source}, {target}]; skipped",
                file=sys.stderr,
            )
    if not wanted or dst[0].numel() == 0:
        return
    sources, targets = list(wanted.values()), list(wanted)
    travelling = torch.zeros(len(wanted), *src.shape[1:], dtype=src.dtype)
    numbers = range(len(wanted))
    if src.device.type == "cpu":
        _on_one_device(src, travelling, _pairs(sources, numbers))
        _on_one_device(travelling.to(dst.device), dst, _pairs(numbers, targets))
    else:
        travelling = travelling.to(src.device)
        _on_one_device(src, travelling, _pairs(sources, numbers))
        _on_one_device(travelling.cpu(), dst, _pairs(numbers, targets))


def _pairs(sources: Iterable[int], targets: Iterable[int]) -> torch.Tensor:
    return torch.tensor(list(zip(sources, targets, strict=True)))


class _Layout(NamedTuple):
    """How two caches hold the elements of a block, in the same order.

    Attributes:
        inner: three sizes, the last one of elements that lie together in both.
        src, dst: from one block, outer and middle part to the next, in elements.
    """

    inner: tuple[int, int, int]
    src: tuple[int, int, int]
    dst: tuple[int, int, int]


def _on_one_device(
    src: torch.Tensor, dst: torch.Tensor, block_mapping: torch.Tensor
) -> None:
    if dst.numel() == 0 or src.numel() == 0 or block_mapping.shape[0] == 0:
        return
    block_mapping = block_mapping.to(dst.device)
    is_value = in_place.is_value(dst)
    target = in_place.locate(dst, to_write=True)
    source = target if src is dst else in_place.locate(src)
    in_place.check_writable(_check.op, {"dst": (dst, target)})
    if _share_memory(source, target, is_value):
        if src.shape == dst.shape and _are_equal(source, target, is_value):
            if can_copy_within(dst, target):
                copy_within(dst, target, block_mapping)
            else:
                rearranged = dst.contiguous()
                _on_one_device(rearranged, rearranged, block_mapping)
                dst.copy_(rearranged)
            return
        src = src.clone()  # two views of one tensor: src as it was
        source = _dense(src)
    layout = _joint_layout(src.shape, source.strides, target.strides)
    if layout is None and not in_place.may_be_dense(dst, to_write=True):
        rearranged = dst.contiguous()
        _on_one_device(src.contiguous(), rearranged, block_mapping)
        dst.copy_(rearranged)
        return
    if layout is None:
        source, target = _dense(src), _dense(dst)
        layout = _joint_layout(src.shape, source.strides, target.strides)
        assert layout is not None
    geometry = [src.shape[0], dst.shape[0], *layout.inner]
    geometry += [*layout.src, source.offset, *layout.dst, target.offset]
    args = (target.buffer, source.buffer, block_mapping, geometry, debug.enabled())
    if is_value:
        in_place.update(_op, *args, views=[dst])
    else:
        _op.update_at_once(*args, None)


def _dense(t: torch.Tensor) -> Located:
    """Takes a tensor as a dense value, without looking for a buffer below it."""
    return Located(t, 0, dense_strides(t.shape))


def _share_memory(a: Located, b: Located, is_value: bool) -> bool:
    """Whether two caches may have an element in common."""
    if is_value:
        return a.buffer is b.buffer
    x, y = a.buffer, b.buffer
    return (
        x.data_ptr() < y.data_ptr() + y.nbytes
        and y.data_ptr() < x.data_ptr() + x.nbytes
    )


def _are_equal(a: Located, b: Located, is_value: bool) -> bool:
    """Whether two caches of one shape, which share memory, are the same."""
    start = a.offset == b.offset
    if not is_value:
        start = a.buffer.data_ptr() == b.buffer.data_ptr()
    return start and a.strides == b.strides


def _joint_layout(
    shape: Sequence[int], src_strides: Sequence[int], dst_strides: Sequence[int]
) -> _Layout | None:
    """Describes blocks by three inner dimensions; None where they do not do.

    The order of a block's elements does not matter, as long as it is the same in both:
    dimensions are sorted by dst's stride and joined where one continues the other in
    both caches.
    """
    dims = [
        (d, s, size)
        for size, s, d in zip(shape[1:], src_strides[1:], dst_strides[1:], strict=True)
        if size != 1
    ]
    if any(d <= 0 or s < 0 for d, s, _ in dims):
        return None
    joined: list[tuple[int, int, int]] = []
    for d, s, size in sorted(dims, reverse=True):
        if joined and joined[-1][0] == d * size and joined[-1][1] == s * size:
            joined[-1] = (d, s, size * joined[-1][2])
        else:
            joined.append((d, s, size))
    if not joined or joined[-1][:2] != (1, 1):
        joined.append((1, 1, 1))
    if len(joined) > 3:
        return None
    joined = [(0, 0, 1)] * (3 - len(joined)) + joined
    (d0, s0, outer), (d1, s1, middle), (_, _, run) = joined
    return _Layout(
        (outer, middle, run),
        (src_strides[0], s0, s1),
        (dst_strides[0], d0, d1),
    )


_ATTRIBUTES = (
    "num_src_blocks",
    "num_dst_blocks",
    "page_size",
    "num_kv_heads",
    "head_dim",
    "src_block_stride",
    "src_page_stride",
    "src_head_stride",
    "src_offset",
    "dst_block_stride",
    "dst_page_stride",
    "dst_head_stride",
    "dst_offset",
)


def _lower(
    dst: torch.Tensor,
    src: torch.Tensor,
    block_mapping: torch.Tensor,
    geometry: list[int],
    debug_mode: bool,
) -> CustomCall:
    _check.dtype("dst", dst, _DTYPES)
    _check.dtype("src", src, [dst.dtype])
    _check_mapping(block_mapping)
    _check.same_device("dst", dst, src=src, block_mapping=block_mapping)
    values = dict(zip(_ATTRIBUTES, geometry, strict=True))
    return CustomCall(
        "xla_ops.swap_blocks",
        ("dst", "src", "block_mapping"),
        (Spec.of(dst),),
        {**values, "debug": debug_mode},
        {0: "dst"},
        nothing_to_do=0 in (dst.numel(), src.numel(), block_mapping.numel()),
    )


def _reference(
    dst: torch.Tensor,
    src: torch.Tensor,
    block_mapping: torch.Tensor,
    geometry: list[int],
    _: bool,
) -> torch.Tensor:
    num_src, num_dst, page, heads, dim, *places = geometry
    # Which block of src each block of dst gets in the end; -1: none.
    ids = torch.arange(num_dst, device=dst.device)
    origin = torch.full_like(ids, -1)
    for pair in block_mapping.unbind(0):
        source, target = pair.unbind(0)
        valid = (source >= 0) & (source < num_src) & (target >= 0)
        origin = torch.where(valid & (ids == target), source, origin)

    def lanes(page_stride: int, head_stride: int) -> torch.Tensor:
        return (
            (torch.arange(page, device=dst.device) * page_stride)[:, None, None]
            + (torch.arange(heads, device=dst.device) * head_stride)[:, None]
            + torch.arange(dim, device=dst.device)
        ).reshape(-1)

    # fp8 arithmetic is rare: move the bits as bytes.
    bits = [t.view(torch.uint8) if t.element_size() == 1 else t for t in (src, dst)]
    from_flat, to_flat = (t.reshape(-1) for t in bits)
    src_block, *src_inner, src_offset = places[:4]
    dst_block, *dst_inner, dst_offset = places[4:]
    read = src_offset + src_block * origin.clamp(min=0)[:, None] + lanes(*src_inner)
    write = dst_offset + dst_block * ids[:, None] + lanes(*dst_inner)
    moved = torch.where(origin[:, None] >= 0, from_flat[read], to_flat[write])
    return to_flat.index_put((write,), moved).reshape(dst.shape).view(dst.dtype)


def _splits(args: Mapping[str, Any]) -> sharding.Rule:
    """The dimensions inside a block, where blocks have no gaps."""
    num_src, num_dst, page, heads, size, *places = args["geometry"]
    if page * heads != 1:
        return sharding.Rule({}, ("",))
    words = {
        name: sharded_cache.block_layout(args[name].shape, size)
        for name in ("dst", "src")
    }

    def localize(local: Mapping[str, Any], whole: Mapping[str, Any]) -> dict[str, Any]:
        pieces = sharded_cache.shrunk(whole["dst"].shape, local["dst"].shape)
        sharded_cache.require_split(
            _check.op, "src", whole["src"], local["src"], pieces
        )
        moved = [
            sharded_cache.moved(n, whole[name].shape, local[name].shape)
            for name, n in zip(["src"] * 4 + ["dst"] * 4, places, strict=True)
        ]
        # The strides inside a block, of which there is one run, have no meaning.
        geometry = [num_src, num_dst, 1, 1, size // pieces, *moved]
        return {"geometry": geometry}

    return sharding.Rule(words, (words["dst"],), localize)


_op = Op(
    "swap_blocks_functional",
    "(Tensor dst, Tensor src, Tensor block_mapping, SymInt[] geometry, bool debug,"
    " Tensor? donor) -> Tensor",
    _lower,
    _reference,
    autocast=autocast.unchanged,
    splits=_splits,
    public_name="swap_blocks",
)

front.define(
    NAMESPACE,
    "swap_blocks(Tensor src, Tensor(a!) dst, Tensor block_mapping) -> ()",
    _front,
    autocast=autocast.unchanged,
)
