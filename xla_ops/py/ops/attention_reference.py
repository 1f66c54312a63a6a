"""What attention means, in plain torch: the reference of attention.py's ops.

Where XLA has no handler it is part of the user's program, so the number of its
operations depends on no size, and no array of it has more elements than a few times the
logits, [num_tokens, num_heads, num_kv], but for the pages that it looks up: those of a
_PARTS-th of the sequences at a time, in float32.

Contiguous keys meet all rows in one product, and each row masks what is not its
sequence's. Paged ones would be as wide as the cache that way; there rows are taken in
tiles of one sequence each, as attention kernels do, and a tile meets its own pages.

Tested by tests/ops/test_attention_reference.py.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from ..core import paged_cache
from ..core.lazy import torch

if TYPE_CHECKING:
    from .attention import Arguments, Batch
    from .attention_backward import Arguments as BackwardArguments

# In how many parts the tiles of a paged batch are worked on, for less memory.
_PARTS = 4


def reference(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_heads, _ = a.query.shape
    work = prepare(a)
    if work is None:
        out = torch.zeros_like(a.query)
        return out, out.new_full((num_heads, num_tokens), torch.inf, dtype=torch.float)
    attend = work.softmax.attend
    if work.pages is not None:
        out, lse = work.by_tiles(lambda tile: attend(*tile))
    else:
        out, lse = (t[0] for t in attend(*work.all_at_once()))
    out = out * of_rows(a.v_scale, work.sequence)
    seen = work.exists[:, None, None, None] & (lse != torch.inf)
    out = torch.where(seen, out, 0.0).to(a.query.dtype).reshape(a.query.shape)
    lse = torch.where(seen, lse, torch.inf).reshape(num_tokens, num_heads)
    return out, lse.t().contiguous()


def prepare(a: Arguments | BackwardArguments) -> Work | None:
    """What the op and its gradient start from; None where no row sees anything."""
    num_tokens, num_heads, head_dim = a.query.shape
    num_blocks, page_size, num_kv_heads, _, *strides, key_offset, value_offset = (
        a.geometry
    )
    num_kv = page_size * (1 if a.block_table is None else a.block_table.shape[1])
    if 0 in (num_tokens, a.cu_seqlens_q.shape[0] - 1, num_blocks, num_kv):
        return None
    sequences = _sequences(a.batch, num_tokens, num_kv)
    sequence, exists = _owners(sequences, num_tokens, a.num_seqs)
    heads = (num_kv_heads, num_heads // num_kv_heads)
    length = sequences.length[sequence]
    position = torch.arange(num_tokens, device=a.query.device) + length
    position = position - sequences.end[sequence]
    low, high = torch.zeros_like(length), length
    if a.window_left >= 0:
        low = (position - a.window_left).clamp(min=0)
    if a.window_right >= 0:
        high = torch.minimum(high, position + a.window_right + 1)
    slopes = a.alibi_slopes
    if slopes is not None:
        slopes = slopes.expand(a.cu_seqlens_q.shape[0] - 1, num_heads)[sequence]
        slopes = slopes.reshape(num_tokens, *heads)
    grouped = a.query.float().reshape(num_tokens, *heads, head_dim)
    factor = a.scale * of_rows(a.k_scale, sequence)
    rows = _Rows(grouped * factor, low, high, position, slopes)
    pages = None
    if a.block_table is not None:
        pages = _Pages(a.block_table, num_blocks, page_size)
    return Work(
        _Softmax(None if a.sinks is None else a.sinks.reshape(*heads, 1), a.soft_cap),
        rows,
        sequence,
        exists,
        sequences,
        _Buffer(a.key, head_dim, strides, key_offset, a.kv_cache_dtype),
        _Buffer(a.value, head_dim, strides, value_offset, a.kv_cache_dtype),
        pages,
        num_kv,
        factor,
    )


class _Sequences(NamedTuple):
    """Where each sequence is; all int64 [max_num_seqs].

    Attributes:
        start, end: of its query rows, end excluded.
        length: how many KV tokens it has.
        first: the row of its first one, where keys are contiguous; else 0.
    """

    start: torch.Tensor
    end: torch.Tensor
    length: torch.Tensor
    first: torch.Tensor


class _Rows(NamedTuple):
    """Query rows, of any shape [...].

    Attributes:
        query: float32 [..., num_kv_heads, query heads of each, head_dim], scaled.
        low, high: int64 [...]. It sees the tokens from low to high, excluded, of its
            sequence.
        position: int64 [...], among the tokens of its sequence.
        slopes: [..., num_kv_heads, query heads of each], or None.
    """

    query: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    position: torch.Tensor
    slopes: torch.Tensor | None

    def each(self, take: Callable[[torch.Tensor], torch.Tensor]) -> _Rows:
        return _Rows(
            take(self.query),
            take(self.low),
            take(self.high),
            take(self.position),
            None if self.slopes is None else take(self.slopes),
        )


def _sequences(batch: Batch, num_tokens: int, num_kv: int) -> _Sequences:
    bounds = _clamped(batch.cu_seqlens_q, num_tokens)
    start, end = bounds[:-1], bounds[1:]
    first = torch.zeros_like(start)
    length = torch.full_like(start, num_kv)
    if batch.cu_seqlens_k is not None:
        bounds = _clamped(batch.cu_seqlens_k, num_kv)
        first, length = bounds[:-1], bounds[1:] - bounds[:-1]
    if batch.seqused_k is not None:
        length = torch.minimum(batch.seqused_k.long().clamp(min=0), num_kv - first)
    if batch.leftpad_k is not None:
        pad = torch.minimum(batch.leftpad_k.long().clamp(min=0), length)
        first, length = first + pad, length - pad
    return _Sequences(start, end, length, first)


def _clamped(cu_seqlens: torch.Tensor, size: int) -> torch.Tensor:
    """Prefix sums, each at least the one before and at most `size`.

    Not by cummax, which torch_xla 2.9.0 does not compile for more than 64 elements.
    """
    sums = cu_seqlens.long().clamp(0, size)
    index = torch.arange(sums.shape[0], device=sums.device)
    return torch.where(index <= index[:, None], sums, 0).amax(1)


def _owners(
    sequences: _Sequences, num_tokens: int, num_seqs: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's sequence, and whether it has one."""
    max_num_seqs = sequences.end.shape[0]
    row = torch.arange(num_tokens, device=sequences.end.device)
    sequence = (row[:, None] >= sequences.end).sum(1)
    exists = sequence < max_num_seqs
    if num_seqs is not None:
        exists = exists & (sequence < num_seqs.reshape(1))
    sequence = sequence.clamp(max=max_num_seqs - 1)
    return sequence, exists & (row >= sequences.start[sequence])


def of_rows(scale: torch.Tensor | None, sequence: torch.Tensor) -> torch.Tensor | float:
    """A KV scale, [1] or [max_num_seqs, num_kv_heads], as it multiplies rows."""
    if scale is None:
        return 1.0
    if scale.numel() == 1:
        return scale.reshape(())
    return scale[sequence][:, :, None, None]


class _Buffer(NamedTuple):
    """Keys or values, as the op gets them: a buffer and where they are in it."""

    buffer: torch.Tensor
    head_dim: int
    strides: list[int]
    offset: int
    kv_cache_dtype: str

    def take(
        self, block: torch.Tensor, page: torch.Tensor, num_kv_heads: int
    ) -> torch.Tensor:
        """Looks tokens up: float32 [..., num_kv_heads, head_dim] of indices [...]."""
        *strides, offset = *self.strides, self.offset
        flat, lanes = self.buffer.reshape(-1), self.head_dim
        if flat.dtype in paged_cache.FP8.values():
            flat = flat.float()  # torch indexes no fp8
        if all(n % lanes == 0 for n in (*strides, offset, flat.shape[0])):
            # By heads, which takes a head_dim-th of the indices.
            flat = flat.reshape(-1, lanes)
            *strides, offset = (n // lanes for n in (*strides, offset))
        index = offset + block * strides[0] + page * strides[1]
        heads = torch.arange(num_kv_heads, device=flat.device) * strides[2]
        index = index[..., None] + heads
        if flat.dim() == 1:
            index = index[..., None] + torch.arange(lanes, device=flat.device)
        taken = flat[index]
        if taken.dtype != torch.uint8:
            return taken.float()
        # XLA tensors cannot be viewed as another dtype: look the bytes' values up.
        codes = torch.arange(256, dtype=torch.uint8)
        codes = codes.view(paged_cache.FP8[self.kv_cache_dtype]).float()
        return codes.to(flat.device)[taken.long()]


class _Softmax(NamedTuple):
    """What all rows share.

    Attributes:
        sinks: [num_kv_heads, query heads of each, 1], or None.
    """

    sinks: torch.Tensor | None
    soft_cap: float

    def logits(
        self,
        rows: _Rows,
        keys: torch.Tensor,
        token: torch.Tensor,
        exists: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Returns logits of `attend`'s arguments, -inf where a key is not seen.

        And the derivative of each by what it was before the cap. Both are
        [batches, rows, KV heads, query heads of one, num_kv].
        """
        visible = (token >= rows.low[..., None]) & (token < rows.high[..., None])
        if exists is not None:
            visible = visible & exists
        logits = by_kv_head(rows.query, keys.permute(0, 2, 3, 1))
        slope: torch.Tensor | float = 1.0
        if self.soft_cap:
            part = torch.tanh(logits / self.soft_cap)
            logits, slope = self.soft_cap * part, 1 - part * part
        if rows.slopes is not None:
            distance = (rows.position[..., None] - token).abs()[:, :, None, None]
            logits = logits - rows.slopes[..., None] * distance
        return torch.where(visible[:, :, None, None], logits, -torch.inf), slope

    def attend(
        self,
        rows: _Rows,
        keys: torch.Tensor,
        values: torch.Tensor,
        token: torch.Tensor,
        exists: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attends batches of rows to a set of keys each.

        Args:
            rows: [batches, rows].
            keys, values: float32 [batches, num_kv, num_kv_heads, head_dim].
            token: int64 [batches, rows, num_kv], or less and broadcast. Which token
                of a row's sequence each key is.
            exists: bool, as `token`. Whether the key is there.

        Returns:
            out [batches, rows, num_kv_heads, query heads of each, head_dim], and lse
            with 1 for head_dim, +inf where a row sees nothing; float32.
        """
        logits, _ = self.logits(rows, keys, token, exists)
        largest = logits.amax(-1, keepdim=True)
        # torch_xla's amax gives the lowest number where there is none but -inf.
        seen = ~(largest <= torch.finfo(torch.float32).min)
        if self.sinks is not None:
            largest = torch.maximum(largest, self.sinks)
        largest = torch.where(seen, largest, 0.0)
        weights = torch.exp(logits - largest)
        total = weights.sum(-1, keepdim=True)
        if self.sinks is not None:
            total = total + torch.exp(self.sinks - largest)
        lse = torch.where(seen, torch.log(total) + largest, torch.inf)
        return mix(weights, values.transpose(1, 2)) / total, lse


class _Pages(NamedTuple):
    """A paged cache, but for its buffers."""

    block_table: torch.Tensor
    num_blocks: int
    page_size: int


class Meeting(NamedTuple):
    """Batches of rows and the keys that they meet: arguments of `_Softmax.attend`."""

    rows: _Rows
    keys: torch.Tensor
    values: torch.Tensor
    token: torch.Tensor
    exists: torch.Tensor | None = None


class Work(NamedTuple):
    """A batch, prepared.

    Attributes:
        rows: [num_tokens].
        sequence, exists: of each row, which it belongs to and whether to any.
        pages: None where keys are contiguous.
        num_kv: how many tokens a sequence has at most, or contiguous keys' rows.
        factor: what q.k is multiplied by, of each row.
    """

    softmax: _Softmax
    rows: _Rows
    sequence: torch.Tensor
    exists: torch.Tensor
    sequences: _Sequences
    keys: _Buffer
    values: _Buffer
    pages: _Pages | None
    num_kv: int
    factor: torch.Tensor | float

    def all_at_once(self) -> Meeting:
        """All rows and all contiguous keys, a batch of one."""
        first = self.sequences.first[self.sequence]
        slot = torch.arange(self.num_kv, device=first.device)
        num_kv_heads = self.rows.query.shape[1]
        block = torch.zeros_like(slot)
        return Meeting(
            self.rows.each(lambda t: t[None]),
            self.keys.take(block, slot, num_kv_heads)[None],
            self.values.take(block, slot, num_kv_heads)[None],
            (slot - first[:, None])[None],
        )

    def by_tiles(
        self,
        compute: Callable[..., tuple[torch.Tensor, ...]],
        *more: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Calls `compute` on tiles of rows, each of one sequence, and its pages.

        Args:
            compute: (Meeting, *more) -> results [tiles, rows, ...].
            more: tensors [num_tokens, ...], of which it gets the tiles' rows.

        Returns:
            The results, [num_tokens, ...].
        """
        assert self.pages is not None
        block_table, num_blocks, page_size = self.pages
        num_tokens, num_kv_heads = self.rows.query.shape[:2]
        max_num_seqs, device = block_table.shape[0], block_table.device
        sequence, sequences = self.sequence, self.sequences
        # A tile is as many rows as a sequence has on average. So there are at most two
        # tiles a sequence, with at most three times the rows.
        size = (num_tokens + max_num_seqs - 1) // max_num_seqs
        num_tiles = (num_tokens + max_num_seqs * (size - 1)) // size
        num_parts = min(_PARTS, max_num_seqs)
        step = (num_tiles + num_parts - 1) // num_parts

        tiles_of = (sequences.end - sequences.start + size - 1) // size
        after = torch.cumsum(tiles_of, 0)
        before = after - tiles_of
        tile = torch.arange(num_parts * step, device=device)
        owner = (tile[:, None] >= after).sum(1).clamp(max=max_num_seqs - 1)
        row = sequences.start[owner] + (tile - before[owner]) * size
        row = row[:, None] + torch.arange(size, device=device)
        inside = row < sequences.end[owner][:, None]
        row = row.clamp(max=num_tokens - 1)
        tiles = self.rows.each(lambda t: t[row])
        tiles = tiles._replace(high=torch.where(inside, tiles.high, 0))
        more = tuple(t[row] for t in more)

        block = block_table[owner].long()
        exists = (block >= 0) & (block < num_blocks)
        block = torch.where(exists, block, 0)[:, :, None]
        page = torch.arange(page_size, device=device)
        exists = exists.repeat_interleave(page_size, 1)[:, None]
        token = torch.arange(exists.shape[2], device=device)
        parts = []
        for start in range(0, num_parts * step, step):
            part = slice(start, start + step)
            meeting = Meeting(
                tiles.each(operator.itemgetter(part)),
                self.keys.take(block[part], page, num_kv_heads).flatten(1, 2),
                self.values.take(block[part], page, num_kv_heads).flatten(1, 2),
                token,
                exists[part],
            )
            parts.append(compute(meeting, *(t[part] for t in more)))

        # Where each row is in the tiles; anywhere, if it belongs to no sequence.
        at = torch.arange(num_tokens, device=device) - sequences.start[sequence]
        at = (before[sequence] * size + at).clamp(0, num_parts * step * size - 1)
        return [torch.cat(ts).flatten(0, 1)[at] for ts in zip(*parts, strict=True)]


def mix(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The weighted sums of values, where a weight of 0 keeps NaN and infinity out.

    Another sequence's values are among them, and what no token of this one holds.
    """
    finite = values.isfinite()
    sums = by_kv_head(weights, torch.where(finite, values, 0.0))
    some = (weights != 0).float()
    infinities = torch.where(values.isinf(), values.sign(), 0.0)
    up = by_kv_head(some, infinities)  # less those down
    odd = by_kv_head(some, (~finite).float())
    nan = torch.full_like(sums, torch.nan)
    signed = torch.where(up == odd, torch.inf, torch.where(up == -odd, -torch.inf, nan))
    return torch.where(odd > 0, signed, sums)


def by_kv_head(rows: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """[batches, rows, KV heads, group, n] times [batches, KV heads, n, m].

    torch_xla's matmul keeps to set_mat_mul_precision(); its einsum does not.
    """
    batches, num_rows, num_kv_heads, group, _ = rows.shape
    by_head = rows.transpose(1, 2).flatten(2, 3)
    products = torch.matmul(by_head, matrices)
    shape = (batches, num_kv_heads, num_rows, group, matrices.shape[-1])
    return products.reshape(shape).transpose(1, 2)
