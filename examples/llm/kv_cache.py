"""The paged KV cache: its tensors, and who owns which block.

SPDX-License-Identifier: Apache-2.0

A sequence's keys and values lie in blocks of `page_size` tokens that need not
be neighbours; its block table lists them in order. So sequences of any length
share one buffer, and no token moves when one grows or ends.
"""

from collections.abc import Callable

import torch
import torch_xla
import torch_xla.runtime as xr

PAGE_SIZE = 16


class BlockAllocator:
    """Hands out block numbers from a free list. Host side, no tensors.

    Example:
      >>> allocator = BlockAllocator(num_blocks=8)
      >>> allocator.take(2)
      [0, 1]
    """

    def __init__(self, num_blocks: int):
        if num_blocks < 1:
            raise ValueError(
                f"kv_cache: num_blocks must be at least 1, got {num_blocks}"
            )
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack, block 0 on top
        self._taken: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Takes `count` blocks.

        Raises:
          MemoryError: fewer are free; none is taken then.
        """
        if count > len(self._free):
            raise MemoryError(
                f"kv_cache: blocks must be free, got {len(self._free)} of "
                f"{self.num_blocks} where {count} are needed"
            )
        blocks = [self._free.pop() for _ in range(count)]
        self._taken.update(blocks)
        return blocks

    def give_back(self, blocks: list[int]) -> None:
        """Returns blocks taken before.

        Raises:
          ValueError: a block is not taken (given back twice, or never taken).
        """
        for block in blocks:
            if block not in self._taken:
                raise ValueError(f"kv_cache: block must be taken, got {block}")
            self._taken.remove(block)
            self._free.append(block)


def blocks_for(num_tokens: int) -> int:
    """Blocks that hold num_tokens tokens."""
    return -(-num_tokens // PAGE_SIZE)


def round_up(num_tokens: int) -> int:
    """Tokens that fill the blocks which num_tokens need."""
    return blocks_for(num_tokens) * PAGE_SIZE


def cache_bytes(
    num_layers: int, num_blocks: int, num_kv_heads: int, head_dim: int, item_size: int
) -> int:
    """Bytes of a PagedKVCache."""
    return 2 * num_layers * num_blocks * PAGE_SIZE * num_kv_heads * head_dim * item_size


class PagedKVCache:
    """K and V of every layer, [num_blocks, page_size, num_kv_heads, head_dim].

    K and V are separate tensors: halves of one stacked tensor are correct too,
    but a compiled step then has to gather and scatter them.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        place: Callable[[torch.Tensor], torch.Tensor] = lambda cache: cache,
        num_parts: int = 1,
    ):
        """
        Args:
          place: says how a new tensor lies on several devices.
          num_parts: on how many; each has some of the heads.
        """
        self.allocator = BlockAllocator(num_blocks)
        self.shape = (num_blocks, PAGE_SIZE, num_kv_heads, head_dim)
        self.part_shape = (num_blocks, PAGE_SIZE, num_kv_heads // num_parts, head_dim)
        self.layers = []
        for _ in range(num_layers):
            key, value = (
                place(torch.zeros(self.shape, dtype=dtype, device=device)) for _ in "kv"
            )
            self.layers.append((key, value))
        torch_xla.sync(wait=True)  # buffers from here on, not pending work

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for layer in self.layers for tensor in layer]

    @property
    def num_buffers(self) -> int:
        return len(self._tensors())

    @property
    def nbytes_each(self) -> int:
        return self.layers[0][0].nbytes

    @property
    def nbytes(self) -> int:
        return self.num_buffers * self.nbytes_each

    def addresses(self) -> list[int]:
        """Where each buffer is on the device, K and V of layer 0 first.

        Nothing of sharded ones: torch_xla does not tell. The programs' HLO does.
        """
        if xr.is_spmd():
            return []
        return [torch_xla._XLAC._unsafe_buffer_pointer(t) for t in self._tensors()]

    def bytes_moved(self, before: list[int]) -> int:
        """Bytes of the buffers that are no longer where `before` saw them."""
        stayed = [a == b for a, b in zip(before, self.addresses(), strict=True)]
        return stayed.count(False) * self.nbytes_each
