"""Batches of requests for vLLM's sampler and the device's."""

import types

import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops import logprobs, penalties
from vllm.v1.sample.sampler import Sampler

# vLLM's sampler as it is on its CPU: no pinned memory, nothing compiled.
penalties.is_pin_memory_available = lambda: False
_count = logprobs.batched_count_greater_than._torchdynamo_orig_callable
Sampler.gather_logprobs.__globals__["batched_count_greater_than"] = _count


def _config(rows):
    scheduler = types.SimpleNamespace(max_num_seqs=rows)
    return types.SimpleNamespace(scheduler_config=scheduler)


def request(prompt=(1, 2), output=(), bad_words=None, allowed=None, **params):
    """A request: SamplingParams, its prompt and output, and what vLLM tokenises."""
    params = SamplingParams(max_tokens=64, **params)
    params._bad_words_token_ids = bad_words
    return params, list(prompt), list(output), allowed


def metadata_of(requests, vocab, custom=()):
    """vLLM's metadata for a batch, as its InputBatch would make it.

    Args:
        requests: of `request`; the lists of output tokens become the metadata's.
        vocab: the width of the logits.
        custom: logits processors beside vLLM's own.
    """
    params = [r[0] for r in requests]
    rows = len(requests)
    cpu = torch.device("cpu")
    processors = [
        MinTokensLogitsProcessor(None, cpu, False),
        LogitBiasLogitsProcessor(None, cpu, False),
        MinPLogitsProcessor(_config(rows), cpu, False),
        *custom,
    ]
    added = [(i, p, prompt, out) for i, (p, prompt, out, _) in enumerate(requests)]
    for processor in processors:
        processor.update_state(BatchUpdate(rows, removed=[], added=added, moved=[]))
    greedy = [p.temperature < 1e-5 for p in params]
    width = max(len(prompt) for _, prompt, _, _ in requests)
    prompts = torch.full((rows, width), vocab, dtype=torch.int64)
    for i, (_, prompt, _, _) in enumerate(requests):
        prompts[i, : len(prompt)] = torch.tensor(prompt)
    top_k = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    top_p = [p.top_p for p in params]
    penalties = [
        [p.frequency_penalty for p in params],
        [p.presence_penalty for p in params],
        [p.repetition_penalty for p in params],
    ]
    none = penalties == [[0.0] * rows, [0.0] * rows, [1.0] * rows]
    forbidden = None
    if any(allowed is not None for *_, allowed in requests):
        forbidden = torch.zeros(rows, vocab, dtype=torch.bool)
        for i, (*_, allowed) in enumerate(requests):
            if allowed is not None:
                forbidden[i] = True
                forbidden[i, allowed] = False
    bad = {
        i: p._bad_words_token_ids
        for i, p in enumerate(params)
        if p._bad_words_token_ids
    }
    generators = {
        i: torch.Generator().manual_seed(p.seed)
        for i, p in enumerate(params)
        if p.seed is not None and not greedy[i]
    }
    asked = [p.logprobs for p in params if p.logprobs is not None]
    frequency, presence, repetition = map(torch.tensor, penalties)
    return SamplingMetadata(
        temperature=None
        if all(greedy)
        else torch.tensor(
            [0.0 if g else p.temperature for g, p in zip(greedy, params, strict=True)]
        ),
        all_greedy=all(greedy),
        all_random=not any(greedy),
        top_p=torch.tensor(top_p) if min(top_p) < 1 else None,
        top_k=torch.tensor(top_k, dtype=torch.int32) if min(top_k) < vocab else None,
        generators=generators,
        max_num_logprobs=max(asked) if asked else None,
        no_penalties=none,
        prompt_token_ids=None if none else prompts,
        frequency_penalties=frequency,
        presence_penalties=presence,
        repetition_penalties=repetition,
        output_token_ids=[r[2] for r in requests] if bad or not none or custom else [],
        allowed_token_ids_mask=forbidden,
        bad_words_token_ids=bad,
        logitsprocs=LogitsProcessors(processors),
    )


def padded(logits: torch.Tensor, rows: int) -> torch.Tensor:
    """Logits of a bucket of rows."""
    return torch.nn.functional.pad(logits, (0, 0, 0, rows - logits.shape[0]))


def random_bits(rng: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    """A grammar's bitmask that allows about half of the tokens."""
    words = -(-vocab // 32)
    bits = rng.integers(-(1 << 31), 1 << 31, size=(rows, words), dtype=np.int64)
    return bits.astype(np.int32)
