"""A batch of attention: the sizes of its sequences and heads, and what follows of them.

No arrays, so that it serves the benchmark's cases, which are torch's, and the checks of
tests/gpu, which are JAX's.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

Pages = list[list[int]]


@dataclass(frozen=True)
class Batch:
    """Query and KV lengths of the sequences of a batch, and its heads."""

    query_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    causal: bool = True

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_seqs(self) -> int:
        return len(self.kv_lens)

    @property
    def num_tokens(self) -> int:
        return sum(self.query_lens)

    @property
    def query_starts(self) -> list[int]:
        """Prefix sums of the query lengths: cu_seqlens_q."""
        return list(itertools.accumulate(self.query_lens, initial=0))

    @property
    def kv_starts(self) -> list[int]:
        """Prefix sums of the KV lengths: cu_seqlens_k."""
        return list(itertools.accumulate(self.kv_lens, initial=0))

    def num_pages(self, page: int) -> list[int]:
        """How many pages each sequence's KV tokens fill."""
        return [-(-n // page) for n in self.kv_lens]

    def deal(self, order: list[int], page: int) -> Pages:
        """Deals blocks out to the sequences, in the given order."""
        blocks = iter(order)
        return [list(itertools.islice(blocks, n)) for n in self.num_pages(page)]

    @property
    def kv_bytes(self) -> int:
        """Bytes of K and V in 16 bits."""
        return 4 * sum(self.kv_lens) * self.num_kv_heads * self.head_dim

    @property
    def moved(self) -> int:
        """Bytes of query, result, K and V in 16 bits."""
        return self.kv_bytes + 4 * self.num_tokens * self.num_heads * self.head_dim

    @property
    def flops(self) -> int:
        """Of the two products, a causal mask counted as half of the square."""
        pairs = sum(
            q * k - (q * q / 2 if self.causal else 0)
            for q, k in zip(self.query_lens, self.kv_lens, strict=True)
        )
        return int(4 * pairs * self.num_heads * self.head_dim)
