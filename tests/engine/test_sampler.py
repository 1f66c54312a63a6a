"""The device's sampler against vLLM's own, step by step."""

import numpy as np
import pytest
import torch
import torch_xla
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor
from vllm.v1.sample.sampler import Sampler

from sampling_batch import metadata_of, padded, random_bits, request
from xla_ops.programs.replay import compile_calls, replay
from xla_ops.vllm import bitmasks
from xla_ops.vllm.edits import Edits
from xla_ops.vllm.sampled import SampledOnDevice
from xla_ops.vllm.sampler import LOGPROBS_MODES, DeviceSampler

BUCKET, LARGEST = 8, 16


class Counted:
    """A maker of programs that counts them and runs them lazily."""

    def __init__(self):
        self.names = []

    def __call__(self, name, function):
        self.names.append(name)
        return function


@pytest.fixture(params=["cpu", "xla"])
def device(request):
    return torch.device("cpu") if request.param == "cpu" else torch_xla.device()


def logits_of(seed, rows, vocab, ties=False):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * 3
    return logits.round() if ties else logits


def sampled(device, logits, metadata, sampler=None, bits=None, **options):
    sampler = sampler or DeviceSampler(logits.shape[1], LARGEST, device, **options)
    rows = logits.shape[0]
    on_device = padded(logits, BUCKET).to(device)
    return sampler(on_device, None, metadata, rows, grammar_bitmask=bits)


def vllm_sampled(logits, metadata, bits=None, mode="raw_logprobs"):
    logits = logits.clone()
    if bits is not None:
        allowed = np.unpackbits(bits.view(np.uint8), axis=-1, bitorder="little")
        logits[torch.from_numpy(allowed[:, : logits.shape[1]] == 0)] = -torch.inf
    return Sampler(mode)(logits, metadata)


EVERY_EDIT = [
    request(temperature=0, logprobs=5),
    request(temperature=0, repetition_penalty=1.7, output=[3, 3, 9]),
    request(temperature=0, frequency_penalty=0.8, output=[5, 5, 7], prompt=[5] * 9),
    request(temperature=0, presence_penalty=-1.5, output=[8], repetition_penalty=0.6),
    request(temperature=0, logit_bias={4: 30.0, 6: -50.0}, repetition_penalty=1.3),
    request(temperature=0, bad_words=[[2], [7, 3], [9, 9, 1]], output=[9, 9]),
    request(temperature=0, allowed=[11, 12, 30]),
    request(temperature=0, min_tokens=4, stop_token_ids=[0, 5, 13]),
]


@pytest.mark.parametrize("mode", LOGPROBS_MODES)
def test_every_edit_is_vllms(device, mode):
    # 1000 tokens are more than a block, and neither is a multiple of 32.
    for seed, vocab in ((0, 33), (1, 1000), (2, 1000)):
        logits = logits_of(seed, 8, vocab)
        bits = random_bits(np.random.default_rng(seed), 8, vocab)
        # A grammar and allowed ids may leave nothing; not here.
        bits[6, 0] |= 1 << 11
        expected = vllm_sampled(logits, metadata_of(EVERY_EDIT, vocab), bits, mode)
        metadata = metadata_of(EVERY_EDIT, vocab)
        got = sampled(device, logits, metadata, bits=bits, logprobs_mode=mode)
        assert got.tolist() == expected.sampled_token_ids.tolist()
        logprobs, theirs = got.tolists(), expected.logprobs_tensors.tolists()
        np.testing.assert_allclose(logprobs.logprobs, theirs.logprobs, atol=2e-5)
        np.testing.assert_array_equal(
            logprobs.sampled_token_ranks, theirs.sampled_token_ranks
        )
        finite = np.isfinite(theirs.logprobs)
        np.testing.assert_array_equal(
            logprobs.logprob_token_ids[finite], theirs.logprob_token_ids[finite]
        )
        assert logprobs.logprob_token_ids.max() < vocab


def test_edits_change_what_is_greedy(device):
    vocab = 64
    logits = logits_of(0, 8, vocab)
    plain = logits.argmax(-1)
    got = sampled(device, logits, metadata_of(EVERY_EDIT, vocab)).cpu()[:, 0]
    assert (got != plain).any()


def one_edit(i):
    return st.fixed_dictionaries(
        {},
        optional=dict(
            repetition_penalty=st.sampled_from([0.5, 1.1, 2.0]),
            frequency_penalty=st.sampled_from([-2.0, 0.5, 2.0]),
            presence_penalty=st.sampled_from([-2.0, 0.5, 2.0]),
            logit_bias=st.dictionaries(
                st.integers(0, 40), st.sampled_from([-100.0, -1.0, 2.5, 100.0])
            ),
            min_tokens=st.integers(1, 5),
            stop_token_ids=st.lists(st.integers(0, 40), max_size=4),
            bad_words=st.lists(
                st.lists(st.integers(0, 5), min_size=1, max_size=3), max_size=4
            ),
            output=st.lists(st.integers(0, 5), max_size=8),
            prompt=st.lists(st.integers(0, 40), min_size=1, max_size=8),
            allowed=st.lists(st.integers(0, 40), min_size=1, max_size=8),
        ),
    ).map(lambda kw: request(temperature=0, **kw))


@settings(max_examples=80)
@given(st.lists(one_edit(0), min_size=1, max_size=8), st.integers(0, 99), st.booleans())
def test_mixed_edits(requests, seed, ties):
    vocab = 41
    logits = logits_of(seed, len(requests), vocab, ties)
    logits[:, ::5] = -torch.inf
    expected = vllm_sampled(logits, metadata_of(requests, vocab))
    got = sampled(torch.device("cpu"), logits, metadata_of(requests, vocab))
    # Rows that nothing is left of are anybody's.
    assert got.tolist() == expected.sampled_token_ids.tolist()


@settings(max_examples=60)
@given(st.lists(one_edit(0), min_size=2, max_size=8), st.integers(0, 99))
def test_a_pending_token_counts_as_if_it_were_known(requests, seed):
    """Under async scheduling the last token is on the device only."""
    vocab, rows = 41, len(requests)
    cpu = torch.device("cpu")
    first, second = logits_of(seed, rows, vocab), logits_of(seed + 1, rows, vocab)
    second[:, :6] += 6  # tokens of the bad words and the outputs
    first[:, :6] += 6
    sampler = DeviceSampler(vocab, LARGEST, cpu)
    metadata = metadata_of(requests, vocab)
    step = sampled(cpu, first, metadata, sampler)
    known = [row[0] for row in step.tokens[:rows].unsqueeze(-1).tolist()]
    for _, _, output, _ in requests:
        output.append(-1)  # as _bookkeeping_sync does
    pending = sampled(cpu, second, metadata_of(requests, vocab), sampler).tolist()
    assert sampler.host_waits == 0
    for (_, _, output, _), token in zip(requests, known, strict=True):
        output[-1] = token
    expected = vllm_sampled(second, metadata_of(requests, vocab))
    for *_, output, _ in requests:
        output.pop()
    assert pending == expected.sampled_token_ids.tolist()


def test_a_bad_word_may_end_a_pending_token(device):
    """[3, 4, 5] is banned: the 4 that the last step may have sampled is pending."""
    vocab = 40
    words = [[3, 4, 5], [4, 6], [9, 5]]
    batch = [
        request(temperature=0, output=[before], bad_words=words) for before in (3, 7, 3)
    ]
    first = torch.zeros(3, vocab)
    first[[0, 1, 2], [4, 4, 8]] = 1.0
    second = torch.zeros(3, vocab)
    second[:, 5], second[:, 6], second[:, 7] = 3.0, 2.0, 1.0
    metadata = metadata_of(batch, vocab)
    sampler = DeviceSampler(vocab, LARGEST, device)
    sampled(device, first, metadata, sampler)
    for _, _, output, _ in batch:
        output.append(-1)
    got = sampled(device, second, metadata, sampler)
    assert sampler.host_waits == 0
    # After 3 4: neither 5 nor 6. After 7 4: not 6. After 3 8: anything.
    assert got.tolist() == [[7], [5], [5]]


@pytest.mark.parametrize("bad_words", [None, [[0]]])
@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_token_that_another_thread_fetches_counts_once(when, bad_words, monkeypatch):
    """Whether it comes while the first, the second or no row is looked at."""
    vocab, cpu = 40, torch.device("cpu")
    asked = dict(temperature=0, frequency_penalty=2.0, bad_words=bad_words)
    batch = [request(**asked) for _ in range(2)]
    logits = torch.zeros(2, vocab)
    # The first row says 5 again after one penalty and not after two, the second row
    # not after one.
    logits[:, 5], logits[:, 6] = 6.0, torch.tensor([3.0, 5.0])
    sampler = DeviceSampler(vocab, LARGEST, cpu)
    sampled(cpu, logits, metadata_of(batch, vocab), sampler)
    histories = []

    def history(*arguments):
        made = Edits._history(sampler._edits, *arguments)
        histories.append(made)
        if len(histories) == when + 1:
            sampler._last[-1].fetch()
        return made

    monkeypatch.setattr(sampler._edits, "_history", history)
    for _, _, output, _ in batch:
        output.append(-1)
    got = sampled(cpu, logits, metadata_of(batch, vocab), sampler)
    assert len(histories) == 2
    assert got.tolist() == [[5], [6]]


def test_fetching_fills_in_what_was_pending(device):
    vocab = 50
    batch = [request(temperature=0, frequency_penalty=1.0) for _ in range(3)]
    outputs = [output for _, _, output, _ in batch]
    sampler = DeviceSampler(vocab, LARGEST, device)
    metadata, steps = metadata_of(batch, vocab), []
    for seed in range(4):
        steps.append(sampled(device, logits_of(seed, 3, vocab), metadata, sampler))
        for output in outputs:
            output.append(-1)
        if seed:
            steps[seed - 1].fetch()  # the engine is one step behind
    assert sampler.host_waits == 0
    steps[-1].fetch()
    tokens = [[int(step.cpu()[row, 0]) for step in steps] for row in range(3)]
    assert outputs == tokens
    # Nobody fetched: the sampler must wait, and be right all the same.
    sampler, steps = DeviceSampler(vocab, LARGEST, device), []
    for output in outputs:
        output.clear()
    for seed in range(4):
        steps.append(sampled(device, logits_of(seed, 3, vocab), metadata, sampler))
        for output in outputs:
            output.append(-1)
    for step in steps:
        step.fetch()
    assert outputs == tokens
    assert sampler.host_waits == 1  # at the third step


def test_many_edits_take_several_rounds(monkeypatch):
    from xla_ops.vllm import edits

    monkeypatch.setattr(edits, "SIZES", ((4, 2), (16, 2)))
    vocab, cpu = 64, torch.device("cpu")
    rng = np.random.default_rng(0)
    batch = [
        request(
            temperature=0,
            prompt=rng.integers(0, vocab, 12).tolist(),
            output=rng.integers(0, vocab, size).tolist(),
            repetition_penalty=1.4,
            presence_penalty=1.0,
            min_tokens=60,
            stop_token_ids=[1, 2, 3],
        )
        for size in (0, 5, 40, 50, 2)  # two rows do not fit into one round
    ]
    logits = logits_of(0, 5, vocab)
    sampler = DeviceSampler(vocab, LARGEST, cpu)
    sampler._edits._sizes = edits.SIZES
    for _ in range(3):
        expected = vllm_sampled(logits, metadata_of(batch, vocab))
        step = sampled(cpu, logits, metadata_of(batch, vocab), sampler)
        for _, _, output, _ in batch:
            output.append(-1)
        later = sampled(cpu, logits, metadata_of(batch, vocab), sampler)
        assert step.tolist() == expected.sampled_token_ids.tolist()
        expected = vllm_sampled(logits, metadata_of(batch, vocab))
        assert later.tolist() == expected.sampled_token_ids.tolist()
        logits = logits.roll(7, 1)


def test_logprobs_of_every_token(device):
    vocab = 200
    logits = logits_of(1, 4, vocab)
    for number in (0, 7, 30, -1):
        batch = [request(temperature=0, logprobs=number)] * 4
        got = sampled(device, logits, metadata_of(batch, vocab), max_logprobs=-1)
        theirs = vllm_sampled(logits, metadata_of(batch, vocab)).logprobs_tensors
        ours, theirs = got.tolists(), theirs.tolists()
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-5)
        assert ours.logprobs.shape == theirs.logprobs.shape
        if number >= 0:
            np.testing.assert_array_equal(
                ours.logprob_token_ids, theirs.logprob_token_ids
            )
            np.testing.assert_array_equal(
                ours.sampled_token_ranks, theirs.sampled_token_ranks
            )


class Only(AdapterLogitsProcessor):
    """Lets a request that asks for it have one token only."""

    def __init__(self):
        super().__init__(None, torch.device("cpu"), False)

    def is_argmax_invariant(self):
        return False

    def new_req_logits_processor(self, params):
        if not params.extra_args:
            return None

        def only(output, logits):
            token = params.extra_args["only"] + len(output)
            return torch.full_like(logits, -torch.inf).index_fill(
                0, torch.tensor(token), logits[token]
            )

        return only


def test_a_row_of_the_host_leaves_the_others_alone(device):
    vocab = 300
    logits = logits_of(2, 4, vocab)
    plain = [
        request(temperature=1.0, seed=1, logprobs=3),
        request(temperature=0.7, seed=2, top_k=5),
        request(temperature=0.9, seed=3, top_p=0.8, presence_penalty=1.0),
        request(temperature=0),
    ]
    alone = sampled(device, logits, metadata_of(plain, vocab))
    batch = list(plain)
    batch[1] = request(temperature=0.7, seed=2, top_k=5, extra_args={"only": 17})
    sampler = DeviceSampler(vocab, LARGEST, device)
    metadata = metadata_of(batch, vocab, [Only()])
    assert sampler.accepts(metadata, 4) == [1]
    got = sampled(device, logits, metadata, sampler)
    assert sampler.host_rows == 1
    assert got.tolist() == [alone.tolist()[0], [17], *alone.tolist()[2:]]
    assert got.tolists().logprob_token_ids[1, 0] == 17
    keep = [0, 2, 3]
    np.testing.assert_allclose(
        got.tolists().logprobs[keep], alone.tolists().logprobs[keep], atol=1e-6
    )


def test_host_and_device_draw_the_same(device):
    vocab, cpu = 500, torch.device("cpu")

    class Nothing(Only):
        def new_req_logits_processor(self, params):
            return lambda output, logits: logits

    batch = [
        request(temperature=1.3, seed=5, repetition_penalty=1.2, output=[4]),
        request(temperature=0.8, seed=6, top_k=20, top_p=0.9),
        request(temperature=0.8, seed=7, top_p=0.5, logit_bias={9: 3.0}),
        request(temperature=0.8, seed=8, min_p=0.1, bad_words=[[3]]),
        request(temperature=0),
    ]
    for seed in range(5):
        logits = logits_of(seed, 5, vocab)
        sampler = DeviceSampler(vocab, LARGEST, device)
        hosts = sampled(device, logits, metadata_of(batch, vocab, [Nothing()]), sampler)
        assert sampler.host_rows == 5
        assert (
            hosts.tolist() == sampled(cpu, logits, metadata_of(batch, vocab)).tolist()
        )


def test_programs_are_those_listed(device):
    vocab = 100
    made = Counted()
    sampler = DeviceSampler(vocab, LARGEST, device, made, max_logprobs=-1)
    sampler.warm_up(BUCKET)
    assert len(made.names) == len(set(made.names)) == len(sampler.programs(BUCKET))
    for name in ("plain", "top_k", "top_p", "both", "edits"):
        kind = dict(
            plain={},
            top_k=dict(top_k=3),
            top_p=dict(top_p=0.5),
            both=dict(top_k=80, top_p=0.5),
            edits=dict(logit_bias={1: 1.0}, allowed=[1, 2]),
        )[name]
        for number in (None, 2, -1):
            batch = [request(temperature=1.0, logprobs=number, **kind)] * 3
            metadata = metadata_of(batch, vocab, [Only()])
            sampled(device, logits_of(0, 3, vocab), metadata, sampler).fetch()
    assert sampler.late_programs == []


def test_argmax_saves_a_greedy_batch_its_program():
    vocab, cpu = 40, torch.device("cpu")
    made = Counted()
    sampler = DeviceSampler(vocab, LARGEST, cpu, made)
    logits = padded(logits_of(0, 3, vocab), BUCKET)
    argmax = torch.arange(LARGEST, dtype=torch.int32)
    batch = [request(temperature=0)] * 3
    got = sampler(logits, argmax, metadata_of(batch, vocab), 3)
    assert got.tolist() == [[0], [1], [2]]
    assert made.names == []


def test_what_it_refuses():
    with pytest.raises(ValueError, match="logprobs_mode must be one of raw_logprobs"):
        DeviceSampler(40, 8, "cpu", logprobs_mode="none")
    with pytest.raises(ValueError, match="vocab_size must be at most"):
        DeviceSampler((1 << 24) + 1, 8, "cpu")
    sampler = DeviceSampler(40, 8, "cpu")
    batch = metadata_of([request(temperature=0)], 40)
    with pytest.raises(ValueError, match="num_rows must be between 1 and"):
        sampler(torch.zeros(4, 40), None, batch, 5)


def test_bitmasks():
    allowed = np.random.default_rng(0).random((3, 45)) < 0.5
    bits = bitmasks.pack(allowed)
    unpacked = np.unpackbits(bits.view(np.uint8), axis=-1, bitorder="little")
    np.testing.assert_array_equal(unpacked[:, :45], allowed)
    assert unpacked[:, 45:].all()
    given = np.arange(4, dtype=np.int32)[:, None].repeat(2, 1)
    arranged = bitmasks.arrange(
        given, ["b", "gone", "a"], {"a": 3, "b": 0}, 5, {"b": 1}
    )
    assert arranged[:, 0].tolist() == [0, 1, -1, 3, -1]


def random_requests(rng, rows, extras):
    """Of every way to sample; each row's own seed, so that draws are its own."""
    ways = [
        dict(temperature=0),
        dict(temperature=0.8),
        dict(temperature=1.0, top_k=5),
        dict(temperature=1.2, top_p=0.7),
        dict(temperature=0.9, top_k=20, top_p=0.9, min_p=0.05),
    ]
    return [
        request(
            **ways[rng.integers(len(ways))],
            **extras[rng.integers(len(extras))],
            seed=int(rng.integers(1 << 30)),
        )
        for _ in range(rows)
    ]


def test_what_goes_by_shared_memory_is_what_transfers_bring():
    """Steps of many sizes, read late; nobody fetches a tensor of tokens."""
    vocab, device, rng = 70, torch_xla.device(), np.random.default_rng(3)
    edited = [
        {},
        dict(repetition_penalty=1.4, output=[3, 3, 9]),
        dict(frequency_penalty=0.8, presence_penalty=0.3, output=[5, 5, 7]),
        dict(logit_bias={4: 3.0, 69: -2.0}),
        dict(bad_words=[[2], [9, 9, 1]], output=[9, 9]),
        dict(allowed=[11, 12, 30, 69]),
    ]

    def make(is_fed):
        return DeviceSampler(
            vocab,
            LARGEST,
            device,
            lambda name, function: replay(function),
            compile_calls=compile_calls,
            seed=5,
            is_fed=is_fed,
        )

    fed, plain = make(True), make(False)
    for sampler in (fed, plain):
        sampler.warm_up(BUCKET)
    late = []
    for step in range(30):
        rows = int(rng.integers(1, BUCKET + 1))
        extras = edited if step % 2 else edited[:1]
        requests = random_requests(rng, rows, extras)
        logits = logits_of(step, rows, vocab)
        bits = None
        if step % 2:
            bits = bitmasks.pack(rng.random((rows, vocab)) < 0.8)
        both = [
            sampled(device, logits, metadata_of(requests, vocab), sampler, bits)
            for sampler in (fed, plain)
        ]
        late.append(both)
        if len(late) > 2:
            got, expected = late.pop(0)
            assert got.tolist() == expected.tolist()
    for got, expected in late:
        assert got._read is not None and expected._read is None
        assert got.tokens[: got.shape[0]].tolist() == got.cpu()[:, 0].tolist()
        assert got.tolist() == expected.tolist()
    assert not fed.late_programs


def test_tokens_of_a_step_that_could_not_be_started(monkeypatch):
    """What torch_xla says of them is about something else."""
    tokens = torch.zeros(4, dtype=torch.int32).to("xla")
    sampled = SampledOnDevice(tokens, 2, read=lambda rows: None)
    assert sampled.fetch().tolist() == [[0], [0]]
    monkeypatch.setattr("xla_ops.vllm.sampled.is_lost", lambda tensor: True)
    lost = SampledOnDevice(tokens, 2, read=lambda rows: None)
    with pytest.raises(RuntimeError, match="one whose program could not be started"):
        lost.fetch()
