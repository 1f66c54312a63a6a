"""Steps with drafts against steps without any."""

import numpy as np
import pytest
import torch
import torch_xla
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.sample.rejection_sampler import RejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from sampling_batch import metadata_of, padded, request
from xla_ops.vllm.rejection import DeviceRejectionSampler
from xla_ops.vllm.sampler import DeviceSampler

CPU, ROWS = torch.device("cpu"), 32


class Custom(LogitsProcessor):
    """A user's own."""

    def __init__(self):
        pass

    def apply(self, logits):
        return logits

    def is_argmax_invariant(self):
        return True

    def update_state(self, batch_update):
        pass


def step(logits, drafts, metadata, sampler=None, device=CPU, **more):
    sampler = sampler or DeviceSampler(logits.shape[1], ROWS, device)
    spec = SpecDecodeMetadata.make_dummy(drafts, CPU)
    on_device = padded(logits, ROWS).to(device)
    return DeviceRejectionSampler(sampler)(spec, None, on_device, metadata, **more)


def parsed(output, vocab):
    return RejectionSampler.parse_output(output.sampled_token_ids, vocab)[0]


@settings(max_examples=60)
@given(
    st.lists(
        st.fixed_dictionaries(
            dict(output=st.lists(st.integers(0, 4), max_size=4)),
            optional=dict(
                repetition_penalty=st.sampled_from([0.5, 2.0]),
                frequency_penalty=st.sampled_from([-1.0, 1.0]),
                bad_words=st.just([[2, 1], [3], [0, 0]]),
                allowed=st.just([1, 2, 4]),
                logit_bias=st.just({2: 3.0, 4: -1.0}),
                min_tokens=st.sampled_from([2, 5]),
                stop_token_ids=st.just([0, 3]),
            ),
        ),
        min_size=1,
        max_size=5,
    ),
    st.data(),
)
def test_greedy_steps_are_vllms_one_by_one(kinds, data):
    vocab = 6
    requests = [request(temperature=0, logprobs=2, **kind) for kind in kinds]
    drafts = [
        data.draw(st.lists(st.integers(0, 4), max_size=4), label="draft")
        for _ in requests
    ]
    total = sum(len(d) + 1 for d in drafts)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    logits = torch.randn(total, vocab, generator=generator)
    expected, logprobs, start = [], [], 0
    for (params, prompt, output, allowed), draft in zip(requests, drafts, strict=True):
        tokens = []
        for position in range(len(draft) + 1):
            alone = (params, prompt, [*output, *draft[:position]], allowed)
            row = logits[start + position][None].clone()
            theirs = Sampler()(row, metadata_of([alone], vocab))
            tokens.append(int(theirs.sampled_token_ids))
            logprobs.append(theirs.logprobs_tensors.logprobs)
            if position < len(draft) and tokens[-1] != draft[position]:
                break
        expected.append(tokens)
        start += len(draft) + 1
    got = step(logits, drafts, metadata_of(requests, vocab))
    assert got.sampled_token_ids.shape == (len(drafts), max(map(len, drafts)) + 1)
    assert parsed(got, vocab) == expected
    torch.testing.assert_close(got.logprobs_tensors.logprobs, torch.cat(logprobs))


def test_drafts_are_accepted_as_often_as_they_are_likely():
    vocab, requests = 8, 4000
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(1))
    probs = logits.softmax(-1)
    batch = metadata_of([request(temperature=1.0)] * requests, vocab)
    sampler = DeviceSampler(vocab, 2 * requests, CPU, seed=3)
    spec = SpecDecodeMetadata.make_dummy([[5]] * requests, CPU)
    rows = logits.expand(2 * requests, -1)
    tokens = DeviceRejectionSampler(sampler)(spec, None, rows, batch).sampled_token_ids
    first = torch.bincount(tokens[:, 0], minlength=vocab)
    statistic = ((first - probs * requests) ** 2 / (probs * requests)).sum()
    assert statistic < 24.3  # 7 degrees of freedom, one in a thousand
    accepted = tokens[:, 0] == 5
    assert ((tokens[:, 1] >= 0) == accepted).all()
    bonus = torch.bincount(tokens[accepted, 1], minlength=vocab)
    wanted = probs * int(accepted.sum())
    assert ((bonus - wanted) ** 2 / wanted).sum() < 24.3


@pytest.mark.parametrize("on", ["cpu", "xla"])
def test_a_seeded_text_is_the_same_with_drafts(on):
    """However many drafts there are, and however many are right."""
    device = torch_xla.device() if on == "xla" else CPU
    vocab, length = 12, 10
    logits = torch.randn(length + 6, vocab, generator=torch.Generator().manual_seed(0))
    kinds = dict(temperature=1.2, seed=4, top_k=8, min_p=0.05, presence_penalty=0.5)
    metadata = metadata_of([request(**kinds)], vocab)
    sampler, (plain,) = DeviceSampler(vocab, ROWS, device), metadata.output_token_ids
    for at in range(length):
        row = padded(logits[at : at + 1], ROWS).to(device)
        plain += sampler(row, None, metadata, 1).cpu()[0].tolist()

    rng = np.random.default_rng(0)
    metadata = metadata_of([request(**kinds)], vocab)
    (text,) = metadata.output_token_ids
    sampler = DeviceSampler(vocab, ROWS, device)
    accepted = 0
    while len(text) < length:
        right = plain[len(text) : len(text) + int(rng.integers(0, 4))]
        draft = [*right, *rng.integers(0, vocab, 2).tolist()]
        rows = logits[len(text) : len(text) + len(draft) + 1]
        # A prompt that goes on, of which the draws must not count, comes between.
        step(rows, [draft], metadata, sampler, device, discard=[True])
        got = parsed(step(rows, [draft], metadata, sampler, device), vocab)[0]
        accepted += len(got) - 1
        text += got
    assert text[:length] == plain
    assert accepted


def test_what_it_refuses():
    batch = metadata_of([request(temperature=0)], 9)
    spec = SpecDecodeMetadata.make_dummy([[1]], CPU)
    sampler = DeviceRejectionSampler(DeviceSampler(9, ROWS, CPU))
    with pytest.raises(ValueError, match="draft_probs must be None"):
        sampler(spec, torch.zeros(1, 9), torch.zeros(2, 9), batch)
    batch = metadata_of([request(temperature=0)], 9, [Custom()])
    with pytest.raises(ValueError, match="must be vLLM's own .+, got Custom"):
        sampler(spec, None, torch.zeros(2, 9), batch)
