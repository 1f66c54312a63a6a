"""Speculative decoding with drafts that have no probabilities, such as n-grams.

Rejection sampling accepts such a draft with the probability that the model gives it,
and draws what replaces a rejected one from the other tokens. That is to draw a token at
each position as if there were no draft, and to accept the drafts up to the first that
differs. So every position is a row for DeviceSampler, with the drafts before it as
output, and vLLM's Triton kernels are not needed.

A request with a seed uses up one random number a token that it gets, whatever was
drafted: its text is the same with and without speculation.

Tested by tests/engine/test_rejection.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import (
    BUILTIN_LOGITS_PROCESSORS,
    LogitsProcessor,
    LogitsProcessors,
)
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from ..programs.feed import FedStep
from .sampled import SampledOnDevice
from .sampler import DeviceSampler, random_bits

# vLLM's mark of a position without a token.
PLACEHOLDER = -1


class DeviceRejectionSampler:
    """In the place of vLLM's RejectionSampler, on logits on the device.

    Args:
        sampler: for as many rows as steps have logits, drafts and all.
    """

    def __init__(self, sampler: DeviceSampler):
        self.sampler = sampler

    def __call__(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        argmax: torch.Tensor | None = None,
        grammar_bitmask: np.ndarray | None = None,
        discard: Sequence[bool] | np.ndarray | None = None,
        fed: FedStep | None = None,
    ) -> SamplerOutput:
        """Samples a step with drafts, and waits for it.

        Args:
            metadata: vLLM's. A request's drafts and its bonus token are rows in turn.
            draft_probs: None.
            logits: [L, V] float32 on the device, L a bucket.
            sampling_metadata: vLLM's, a row a request.
            argmax: see DeviceSampler.
            grammar_bitmask: see DeviceSampler; a row a row of logits.
            discard: see DeviceSampler; a row a request.
            fed: see DeviceSampler.

        Returns:
            The tokens, [requests, max_spec_len + 1] int32 on the host, -1 after the
            last of each, and the logprobs of all that are not -1, one after the other.
        """
        if draft_probs is not None:
            raise ValueError(
                "DeviceRejectionSampler: draft_probs must be None, as n-gram drafts"
                f" have it, got a tensor of shape {tuple(draft_probs.shape)}"
            )
        for processor in sampling_metadata.logitsprocs.all:
            if type(processor) not in BUILTIN_LOGITS_PROCESSORS:
                raise ValueError(
                    "DeviceRejectionSampler: logitsprocs must be vLLM's own with"
                    f" speculative decoding, got {type(processor).__name__}"
                )
        counts = metadata.num_draft_tokens
        parts = np.cumsum(counts)[:-1]
        drafts = np.split(metadata.draft_token_ids.cpu().numpy(), parts)
        request = np.repeat(np.arange(len(counts)), np.add(counts, 1))
        states = {
            i: generator.get_state()
            for i, generator in sampling_metadata.generators.items()
        }
        if discard is not None:
            discard = np.asarray(discard, bool)[request]
        sampled = self.sampler(
            logits,
            argmax,
            expand(sampling_metadata, [d.tolist() for d in drafts], request),
            request.size,
            grammar_bitmask,
            discard,
            fed,
        )
        drawn = sampled.cpu()[:, 0].numpy()
        tokens = np.full(
            (len(counts), metadata.max_spec_len + 1), PLACEHOLDER, np.int32
        )
        kept = np.zeros(request.size, bool)
        start = 0
        for i, draft in enumerate(drafts):
            own = drawn[start : start + draft.size + 1]
            wrong = np.flatnonzero(own[:-1] != draft)
            size = 1 + (wrong[0] if wrong.size else draft.size)
            tokens[i, :size] = own[:size]
            kept[start : start + size] = True
            if i in states and (discard is None or not discard[start]):
                generator = sampling_metadata.generators[i]
                generator.set_state(states[i])
                for _ in range(size):
                    random_bits(generator)
            start += draft.size + 1
        return SamplerOutput(torch.from_numpy(tokens), _logprobs(sampled, kept))


def _logprobs(sampled: SampledOnDevice, kept: np.ndarray) -> LogprobsTensors | None:
    lists = sampled.tolists()
    if lists is None:
        return None
    ids, values, ranks, _ = lists
    return LogprobsTensors(
        *(torch.from_numpy(x[kept] if len(x) else x) for x in (ids, values, ranks))
    )


def expand(
    metadata: SamplingMetadata, drafts: list[list[int]], request: np.ndarray
) -> SamplingMetadata:
    """Metadata with a row for each draft and bonus token.

    Args:
        metadata: a row a request.
        drafts: of each request.
        request: of each row to be.
    """
    index = torch.from_numpy(request)

    def rows(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x[index]

    outputs = [
        [*output, *draft[:count]]
        for output, draft in zip(metadata.output_token_ids, drafts, strict=False)
        for count in range(len(draft) + 1)
    ]
    owners = enumerate(request.tolist())
    generators, words = {}, {}
    for row, owner in owners:
        if owner in metadata.generators:
            generators[row] = metadata.generators[owner]
        if owner in metadata.bad_words_token_ids:
            words[row] = metadata.bad_words_token_ids[owner]
    return replace(
        metadata,
        temperature=rows(metadata.temperature),
        top_p=rows(metadata.top_p),
        top_k=rows(metadata.top_k),
        generators=generators,
        prompt_token_ids=None
        if metadata.no_penalties
        else rows(metadata.prompt_token_ids),
        frequency_penalties=rows(metadata.frequency_penalties),
        presence_penalties=rows(metadata.presence_penalties),
        repetition_penalties=rows(metadata.repetition_penalties),
        output_token_ids=outputs,
        allowed_token_ids_mask=rows(metadata.allowed_token_ids_mask),
        bad_words_token_ids=words,
        spec_token_ids=None,
        logitsprocs=LogitsProcessors(
            _expanded(processor, request) for processor in metadata.logitsprocs.all
        ),
    )


def _expanded(processor: LogitsProcessor, request: np.ndarray) -> LogitsProcessor:
    """One of vLLM's own, with the state of a request in each of its rows."""
    # Of each row how many drafts are before it.
    place = np.arange(request.size) - np.searchsorted(request, request)
    rows = [*enumerate(zip(request.tolist(), place.tolist(), strict=True))]
    made = copy(processor)
    if isinstance(made, MinPLogitsProcessor):
        made.min_p_cpu = made.min_p_cpu[request]
    elif isinstance(made, LogitBiasLogitsProcessor):
        biases = made.biases
        made.biases = {row: biases[i] for row, (i, _) in rows if i in biases}
    elif isinstance(made, MinTokensLogitsProcessor):
        least = made.min_toks
        made.min_toks = {
            row: least[i]
            for row, (i, drafts) in rows
            if i in least and len(least[i][1]) + drafts < least[i][0]
        }
    return made
