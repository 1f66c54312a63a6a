"""Weights of few bits, turned back into numbers while a model is loaded.

Every function takes host tensors in a checkpoint's layout and returns
[out_features, in_features] in the dtype asked for.

Tested by tests/engine/test_quantization.py.
"""

from __future__ import annotations

import torch

# Where AWQ puts column i of eight within an int32.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
# What the eight magnitudes of e2m1, fp4, mean.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def integers(packed: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Unpacks `bits` a number along `dim`, lowest bits first, into int32.

    A number may lie across two int32, as those of 3 bits do.
    """
    words = packed.movedim(dim, -1)
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        numbers = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    else:
        stream = (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1
        stream = stream.flatten(-2).unflatten(-1, (-1, bits))
        numbers = (stream << torch.arange(bits, dtype=torch.int32)).sum(
            -1, dtype=torch.int32
        )
        return numbers.movedim(-1, dim)
    return numbers.flatten(-2).movedim(-1, dim)


def grouped(
    numbers: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | int,
    group_of: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """(numbers - zeros) * scales, with a scale for a row's inputs of one group.

    Args:
        numbers: [out_features, in_features], int32.
        scales: [out_features, num_groups].
        zeros: [out_features, num_groups], int32, or one number.
        group_of: [in_features], each input's group.
    """
    group_of = group_of.long()
    if isinstance(zeros, torch.Tensor):
        zeros = zeros.index_select(1, group_of)
    factors = scales.float().index_select(1, group_of)
    return ((numbers - zeros).float() * factors).to(dtype)


def blocks(
    codes: torch.Tensor, scales: torch.Tensor, block: list[int], dtype: torch.dtype
) -> torch.Tensor:
    """fp8 codes [..., out, in] by one scale for a block of them."""
    out_features, in_features = codes.shape[-2:]
    factors = scales.float().repeat_interleave(block[0], -2)[..., :out_features, :]
    factors = factors.repeat_interleave(block[1], -1)[..., :in_features]
    return (codes.float() * factors).to(dtype)


def awq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    group_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """AWQ: [in, out / 8] and [groups, out / 8] of int32, scales [groups, out]."""

    def columns(packed: torch.Tensor) -> torch.Tensor:
        eights = integers(packed, 4, 1).unflatten(1, (-1, 8))
        return eights[..., list(_AWQ_ORDER)].flatten(1).t()

    in_features = qweight.shape[0]
    group_of = torch.arange(in_features) // group_size
    return grouped(columns(qweight), scales.t(), columns(qzeros), group_of, dtype)


def mxfp4(
    packed: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """MXFP4: [..., in / 2] bytes, two e2m1 each, by powers of two of 32 numbers.

    Args:
        packed: uint8, the first of two numbers in the low half.
        scales: [..., in / 32], uint8, exponents with bias 127.
    """
    table = torch.tensor((*_E2M1, *(-x for x in _E2M1)))
    halves = torch.stack((packed & 0xF, packed >> 4), -1).flatten(-2)
    numbers = table[halves.int()].unflatten(-1, (-1, 32))
    factors = torch.exp2(scales.float() - 127.0).unsqueeze(-1)
    return (numbers * factors).flatten(-2).to(dtype)
