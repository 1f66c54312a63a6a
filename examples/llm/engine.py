"""Batched generation with a paged KV cache, compiled by XLA.

SPDX-License-Identifier: Apache-2.0

XLA compiles one program for each set of shapes, so the engine uses few: prompts
go in as flat rows of a few fixed lengths (`prefill_buckets`), decoding always
runs `max_seqs` rows, and what is left over is padding. `warm_up` compiles them
all; after it nothing compiles again, whatever prompts arrive.

A request waits until there is room for all that it may become, then its prompt
is prefilled (a long one in several steps), then it decodes with the others
until it ends, and the next one takes its place.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch._dynamo
import torch_xla.debug.metrics as xla_metrics

from kv_cache import PAGE_SIZE, PagedKVCache, blocks_for
from model import Decoder, StepInputs
from parallel import OneDevice
from sampling import GREEDY, Sampling, sample
from xla_ops.programs.replay import replay


@dataclass
class Stats:
    """What was measured since the last reset. Times are wall clock, in seconds,
    from building a step's inputs to having its tokens on the host."""

    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    new_tokens: int = 0
    cache_bytes_moved: int = 0  # buffers whose address changed over a step
    compilations: int = 0


@dataclass
class _Sequence:
    index: int  # its place in the caller's list
    tokens: list[int]  # prompt and what was generated
    num_prompt: int
    max_len: int
    generator: torch.Generator
    blocks: list[int] = field(default_factory=list)
    num_cached: int = 0  # tokens whose keys and values are in the cache

    def slots(self, first: int, last: int) -> list[int]:
        return [
            self.blocks[i // PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE
            for i in range(first, last)
        ]


def prefill_buckets(max_tokens: int) -> tuple[int, ...]:
    """Row lengths for prefill: 16, 64, 256, ... and max_tokens itself.

    A factor of four: a step does at most four times the work that it needs
    (in practice much less, since prompts are packed), and there is little to
    compile.
    """
    sizes, size = [], 16
    while size < max_tokens:
        sizes.append(size)
        size *= 4
    return (*sizes, max_tokens)


def compilations() -> int:
    """Programs that were traced by Dynamo or compiled by XLA in this process."""
    traced = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return traced + (xla_metrics.counter_value("UncachedCompile") or 0)


def check_request(
    prompt: Sequence[int], max_new_tokens: int, vocab_size: int, most: int
) -> None:
    """Raises a ValueError for a request that an engine cannot serve.

    Args:
      prompt: token ids.
      max_new_tokens: most tokens to add to it.
      vocab_size: of the model.
      most: tokens that a sequence may have, prompt and answer.
    """
    if not prompt:
        raise ValueError("generate: prompt must have at least 1 token, got 0")
    if max_new_tokens < 1:
        raise ValueError(
            f"generate: max_new_tokens must be at least 1, got {max_new_tokens}"
        )
    unknown = [t for t in prompt if not 0 <= t < vocab_size]
    if unknown:
        raise ValueError(
            f"generate: prompt tokens must be in 0..{vocab_size - 1}, got {unknown[0]}"
        )
    if len(prompt) + max_new_tokens > most:
        raise ValueError(
            f"generate: prompt and max_new_tokens must be at most {most} tokens "
            f"together, got {len(prompt)} + {max_new_tokens}"
        )


class Engine:
    """Runs prompts through a decoder.

    Args:
      decoder: on an XLA device.
      max_len: most tokens a sequence may have, prompt and answer.
      max_seqs: sequences that run together.
      max_prefill_tokens: prompt tokens that one step takes at most.
      buckets: row lengths of prefill, ascending, a program each; default:
        prefill_buckets(max_prefill_tokens).
      num_blocks: size of the cache in blocks of 16 tokens; default: enough for
        max_seqs sequences of max_len tokens.
      backend: of torch.compile, "openxla" or "xla_ops", which is the same program
        with less work on the host for each step; or "replay", which is it once more,
        traced and called without torch.compile.
      parallel: how the decoder lies on several devices; default: on one.
    """

    def __init__(
        self,
        decoder: Decoder,
        max_len: int,
        max_seqs: int = 8,
        max_prefill_tokens: int = 256,
        buckets: Sequence[int] | None = None,
        num_blocks: int | None = None,
        backend: str = "openxla",
        parallel: OneDevice | None = None,
    ):
        config = decoder.config
        for name, value in (
            ("max_len", max_len),
            ("max_seqs", max_seqs),
            ("max_prefill_tokens", max_prefill_tokens),
        ):
            if value < 1:
                raise ValueError(f"engine: {name} must be at least 1, got {value}")
        limit = decoder.cos_sin_cache.shape[0]
        if max_len > limit:
            raise ValueError(
                f"engine: max_len must be at most the decoder's {limit}, got {max_len}"
            )
        self.decoder = decoder
        self.parallel = parallel or OneDevice()
        self.device = decoder.cos_sin_cache.device
        self.max_len = max_len
        self.max_seqs = max_seqs
        self.buckets = tuple(buckets or prefill_buckets(max_prefill_tokens))
        # Row lengths of all steps: decoding first, then prefill.
        self.shapes = tuple(dict.fromkeys((max_seqs, *self.buckets)))
        self.max_blocks = blocks_for(max_len)
        if num_blocks is None:
            num_blocks = max_seqs * self.max_blocks
        self.cache = PagedKVCache(
            config.num_layers,
            num_blocks,
            config.num_kv_heads,
            config.head_dim,
            decoder.model.embed_tokens.weight.dtype,
            self.device,
            self.parallel.place_cache,
            self.parallel.cache_parts,
        )
        # Dynamo compiles one function for 8 sets of inputs and then gives up: make
        # room for this engine's shapes beside those of others in the process.
        torch._dynamo.config.recompile_limit += len(self.shapes)
        if backend == "replay":
            caches = [tensor for layer in self.cache.layers for tensor in layer]
            self._compiled = replay(self._run, state=[decoder, *caches])
        else:
            self._compiled = torch.compile(
                self._run, backend=backend, fullgraph=True, dynamic=False
            )
        self.stats = Stats()
        self._compiled_before = compilations()

    def _run(self, step: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
        return self.parallel.run(self.decoder, step, self.cache.layers)

    def warm_up(self, progress: Callable[[int], None] = lambda tokens: None) -> None:
        """Compiles every shape, with steps that hold padding alone."""
        for num_tokens in self.shapes:
            # Twice: the first run of a graph compiles it, the second shows that
            # the first left nothing (a new buffer, a new layout) to compile for.
            for _ in range(2):
                _, logits = self._step([], [], num_tokens)
            progress(num_tokens)
        self._on_host(logits)  # which several processes gather by a program
        self.reset_stats()

    def reset_stats(self) -> None:
        self.stats = Stats()
        self._compiled_before = compilations()

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        on_token: Callable[[int, int], None] = lambda index, token: None,
    ) -> list[list[int]]:
        """Continues each prompt.

        Args:
          prompts: token ids.
          max_new_tokens: most tokens to add to each; fewer where an
            end-of-sequence token comes, which is the last one then.
          sampling: greedy by default.
          on_token: called with a prompt's index and its new token.

        Returns:
          The new tokens of each prompt.

        Raises:
          ValueError: a prompt is empty, too long, or has an unknown token.
        """
        for prompt in prompts:
            self.check(prompt, max_new_tokens)
        sequences = [
            _Sequence(
                index=i,
                tokens=list(prompt),
                num_prompt=len(prompt),
                max_len=len(prompt) + max_new_tokens,
                generator=sampling.generator(i),
            )
            for i, prompt in enumerate(prompts)
        ]
        waiting = deque(sequences)
        running: list[_Sequence] = []
        while waiting or running:
            self._admit(waiting, running)
            batch, counts, num_tokens = self._plan(running)
            for sequence, token in self._advance(batch, counts, num_tokens, sampling):
                on_token(sequence.index, token)
                self.stats.new_tokens += 1
                sequence.tokens.append(token)
                ended = token in self.decoder.config.eos_token_ids
                if ended or len(sequence.tokens) == sequence.max_len:
                    self.cache.allocator.give_back(sequence.blocks)
                    running.remove(sequence)
        self.stats.compilations = compilations() - self._compiled_before
        return [s.tokens[s.num_prompt :] for s in sequences]

    def check(self, prompt: Sequence[int], max_new_tokens: int) -> None:
        """Raises the ValueError that `generate` would raise for this request."""
        most = min(self.max_len, self.cache.allocator.num_blocks * PAGE_SIZE)
        check_request(prompt, max_new_tokens, self.decoder.config.vocab_size, most)

    def _admit(self, waiting: deque[_Sequence], running: list[_Sequence]) -> None:
        """Lets sequences in, first come first served, with all their blocks: one
        that has begun can then always be finished."""
        allocator = self.cache.allocator
        while waiting and len(running) < self.max_seqs:
            needed = blocks_for(waiting[0].max_len)
            if needed > allocator.num_free:
                break
            sequence = waiting.popleft()
            sequence.blocks = allocator.take(needed)
            running.append(sequence)

    def _plan(self, running: list[_Sequence]) -> tuple[list, list[int], int]:
        """Chooses a step: (sequences, tokens of each, padded row length)."""
        batch, counts, room = [], [], self.buckets[-1]
        for sequence in running:
            left = sequence.num_prompt - sequence.num_cached
            if left > 0 and room > 0:
                batch.append(sequence)
                counts.append(min(left, room))
                room -= counts[-1]
        if batch:
            used = self.buckets[-1] - room
            return batch, counts, next(b for b in self.buckets if b >= used)
        return running, [1] * len(running), self.max_seqs

    def _advance(self, batch, counts, num_tokens, sampling):
        """Runs one step; returns (sequence, next token) for those that have one."""
        start = time.perf_counter()
        prefill = batch[0].num_cached < batch[0].num_prompt
        greedy, logits = self._step(batch, counts, num_tokens)
        tokens = greedy.tolist()
        if sampling.temperature > 0:
            logits = self._on_host(logits)
        for sequence, count in zip(batch, counts, strict=True):
            sequence.num_cached += count
        # A prompt that is only part way through predicts a token that we know.
        ready = [
            row
            for row, sequence in enumerate(batch)
            if sequence.num_cached == len(sequence.tokens)
        ]
        if sampling.temperature > 0:
            for row in ready:
                tokens[row] = sample(logits[row], sampling, batch[row].generator)
        elapsed = time.perf_counter() - start
        if prefill:
            self.stats.prefill_s.append(elapsed)
            self.stats.prompt_tokens += sum(counts)
        else:
            self.stats.decode_s.append(elapsed)
        return [(batch[row], tokens[row]) for row in ready]

    @torch.no_grad()
    def _step(self, batch, counts, num_tokens):
        before = self.cache.addresses()
        inputs = self._inputs(batch, counts, num_tokens)
        with self.parallel.step():
            greedy, logits = self._compiled(inputs)
        greedy = greedy.cpu()  # waits for the step
        self.stats.cache_bytes_moved += self.cache.bytes_moved(before)
        return greedy, logits

    @torch.no_grad()
    def _on_host(self, logits: torch.Tensor) -> torch.Tensor:
        with self.parallel.step():
            return self.parallel.whole_logits(logits).cpu()

    def _inputs(self, batch, counts, num_tokens: int) -> StepInputs:
        """Packs `counts[i]` uncached tokens of `batch[i]` into one padded row."""
        ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        last_token: list[int] = []
        ends = [0]
        tables = torch.zeros(self.max_seqs, self.max_blocks, dtype=torch.int32)
        for row, (sequence, count) in enumerate(zip(batch, counts, strict=True)):
            first, last = sequence.num_cached, sequence.num_cached + count
            ids += sequence.tokens[first:last]
            positions += range(first, last)
            slots += sequence.slots(first, last)
            ends.append(len(ids))
            last_token.append(len(ids) - 1)
            tables[row, : len(sequence.blocks)] = torch.tensor(sequence.blocks)
        lens = [s.num_cached + n for s, n in zip(batch, counts, strict=True)]

        def padded(values, size, fill, dtype=torch.int32):
            return torch.tensor(values + [fill] * (size - len(values)), dtype=dtype)

        inputs = StepInputs(
            token_ids=padded(ids, num_tokens, 0),
            positions=padded(positions, num_tokens, 0, torch.int64),
            slot_mapping=padded(slots, num_tokens, -1, torch.int64),
            block_tables=tables,
            context_lens=padded(lens, self.max_seqs, 0),
            query_start_loc=padded(ends, self.max_seqs + 1, ends[-1]),
            num_seqs=torch.tensor([len(batch)], dtype=torch.int32),
            last_token=padded(last_token, self.max_seqs, 0),
        )
        return StepInputs(*(tensor.to(self.device) for tensor in inputs))
