"""Filters and draws: which tokens can come, how often, and from which seed."""

import math

import numpy as np
import pytest
import torch
import torch_xla
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from sampling_batch import metadata_of, padded, request
from xla_ops.vllm import sampling
from xla_ops.vllm.sampler import VARIANTS, DeviceSampler

CPU = torch.device("cpu")


def params_of(
    rows, vocab, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0, uniform=0
):
    """Params of rows alike, but for their uniform numbers, of UNIFORM_BITS bits."""
    params = np.zeros((sampling.NUM_PARAMS, rows), np.int32)
    floats = params.view(np.float32)
    floats[sampling.TEMPERATURE] = temperature
    params[sampling.TOP_K] = vocab if top_k is None else top_k
    floats[sampling.TOP_P] = top_p
    floats[sampling.LOG_MIN_P] = math.log(min_p) if min_p else -math.inf
    uniform = np.broadcast_to(np.asarray(uniform, np.int64), rows)
    params[sampling.UNIFORM_HIGH] = uniform >> 24
    params[sampling.UNIFORM_LOW] = uniform & ((1 << 24) - 1)
    return torch.from_numpy(params)


def grid(rows):
    """Uniform numbers in the middle of equal parts of [0, 1)."""
    return ((np.arange(rows) + 0.5) / rows * 2**sampling.UNIFORM_BITS).astype(np.int64)


def variants(top_k, top_p):
    """Those that promise to serve a row."""
    if top_k is None and top_p == 1:
        return VARIANTS
    if top_k is not None and top_k <= sampling.SMALL_K:
        return ("topk", "search2") if top_p < 1 else ("topk", "search", "search2")
    return ("search", "search2") if top_k is None or top_p == 1 else ("search2",)


def support(logits, variant, temperature, top_k, top_p, min_p):
    """The tokens kept, by the filtered logits."""
    params = params_of(
        logits.shape[0], logits.shape[1], temperature, top_k, top_p, min_p
    )
    _, processed = sampling.sample(logits, params, variant, with_processed=True)
    return processed > -math.inf


def exact_support(logits, temperature, top_k, top_p, min_p):
    """vLLM's filters in double, and which tokens rounding may decide either way."""
    z = logits.double() / np.float32(temperature).item()
    probs = z.softmax(-1)
    top = probs.amax(-1, keepdim=True)
    close = torch.zeros_like(z, dtype=torch.bool)
    if min_p:
        close |= (probs / top - min_p).abs() < 1e-5 * min_p
        z = z.masked_fill(probs < top * min_p, -math.inf)
    if top_k is not None:
        z = apply_top_k_top_p(z, torch.full(z.shape[:1], top_k), None)
    if top_p < 1:
        probs, order = z.softmax(-1).sort(dim=-1, stable=True)
        # The mass of the tokens after each; those begin inside of top-p that are kept.
        total = probs.cumsum(-1)
        after = total[:, -1:] - total
        keep = after < np.float32(top_p).item()
        keep[:, -1] = True
        unsure = (after - top_p).abs() < 1e-5
        unsure[:, -1] = False
        # Of tokens of one value, any may be the one.
        equal = (probs.unsqueeze(-1) == probs[:, unsure.any(0)].unsqueeze(1)).any(-1)
        back = order.argsort(-1)
        close |= (unsure | (equal & unsure.any(-1, keepdim=True))).gather(-1, back)
        z = z.masked_fill(~keep.gather(-1, back), -math.inf)
    return z > -math.inf, close


@settings(max_examples=150)
@given(
    vocab=st.sampled_from([2, 31, 129, 1000]),
    seed=st.integers(0, 999),
    ties=st.booleans(),
    banned=st.booleans(),
    temperature=st.sampled_from([1e-2, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([None, 1, 3, 64, 65, 500, "vocab"]),
    top_p=st.sampled_from([1.0, 1e-9, 0.3, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
)
def test_support_is_vllms(vocab, seed, ties, banned, temperature, top_k, top_p, min_p):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, vocab, generator=generator) * 2
    if ties:
        logits = logits.round()
    if banned:
        logits[:, 1::3] = -math.inf
    top_k = vocab - 1 if top_k == "vocab" else top_k
    top_k = min(top_k, vocab - 1) if top_k else None
    expected, close = exact_support(logits, temperature, top_k, top_p, min_p)
    for variant in variants(top_k, top_p):
        got = support(logits, variant, temperature, top_k, top_p, min_p)
        got &= logits > -math.inf
        wrong = (got != expected) & ~close & (logits > -math.inf)
        # float32 gives the far tail no weight, in vLLM too.
        assert not wrong.any(), (variant, wrong.nonzero())
        assert got.any(-1).all()


@settings(max_examples=60)
@given(
    vocab=st.sampled_from([31, 300]),
    seed=st.integers(0, 999),
    ties=st.booleans(),
    temperature=st.sampled_from([0.0, 1e-6, 1e-2, 0.7, 1.5]),
    top_k=st.sampled_from([None, 2, 20]),
    top_p=st.sampled_from([1.0, 0.8]),
)
def test_a_row_does_not_depend_on_the_variant(
    vocab, seed, ties, temperature, top_k, top_p
):
    """Its batch decides which program runs."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, vocab, generator=generator) * 2
    logits = logits.round() if ties else logits
    params = params_of(40, vocab, temperature, top_k, top_p, uniform=grid(40))
    tokens = [
        sampling.sample(logits, params, v)[0].tolist() for v in variants(top_k, top_p)
    ]
    assert all(t == tokens[0] for t in tokens)
    if temperature < 1e-5:
        assert tokens[0] == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "top_k, top_p, min_p",
    [(None, 1.0, 0), (None, 1.0, 0.1), (5, 1.0, 0), (40, 0.8, 0), (None, 0.9, 0.01)],
)
@pytest.mark.parametrize("vocab", [10, 300])
def test_tokens_come_as_often_as_they_should(vocab, top_k, top_p, min_p):
    """Exactly: an even grid of uniform numbers leaves at most one draw to rounding."""
    draws = 4096
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(3)) * 2
    top_k = None if top_k is None or top_k >= vocab else top_k
    variant = variants(top_k, top_p)[0]
    kept, _ = exact_support(logits[None], 0.8, top_k, top_p, min_p)
    probs = (logits.double() / 0.8).masked_fill(~kept[0], -math.inf).softmax(-1)
    params = params_of(draws, vocab, 0.8, top_k, top_p, min_p, grid(draws))
    rows = logits.expand(draws, -1).contiguous()
    tokens = sampling.sample(rows, params, variant)[0]
    counts = torch.bincount(tokens, minlength=vocab)
    assert (counts - probs * draws).abs().max() < 1.01
    assert (counts[~kept[0]] == 0).all()


def test_unseeded_requests_are_random():
    """A chi-square test of what the sampler draws itself."""
    vocab, rows, steps = 20, 64, 60
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(0))
    batch = metadata_of([request(temperature=1.0)] * rows, vocab)
    sampler = DeviceSampler(vocab, rows, CPU, seed=11)
    counts = torch.zeros(vocab)
    for _ in range(steps):
        step = sampler(logits.expand(rows, -1), None, batch, rows)
        counts += torch.bincount(step.cpu()[:, 0], minlength=vocab)
    expected = logits.softmax(-1) * rows * steps
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert statistic < 43.8  # 19 degrees of freedom, one in a thousand
    again = DeviceSampler(vocab, rows, CPU, seed=11)
    other = DeviceSampler(vocab, rows, CPU, seed=12)
    first, second, third = (
        s(logits.expand(rows, -1), None, batch, rows).tolist()
        for s in (again, other, DeviceSampler(vocab, rows, CPU, seed=11))
    )
    assert first == third != second


def test_ends_of_the_distribution():
    """The first and the last uniform number give tokens that have a weight."""
    logits = torch.full((2, 300), -math.inf)
    logits[:, [7, 130, 299]] = torch.tensor([0.0, 1.0, -1.0])
    last = (1 << sampling.UNIFORM_BITS) - 1
    params = params_of(2, 300, uniform=[0, last])
    for variant in VARIANTS:
        assert sampling.sample(logits, params, variant)[0].tolist() == [7, 299]
    logits[:, 200:] = -math.inf
    assert sampling.sample(logits, params, "plain")[0].tolist() == [7, 130]


def test_rows_without_any_token():
    logits = torch.full((2, 300), -math.inf)
    for variant in VARIANTS:
        tokens, *_ = sampling.sample(
            logits, params_of(2, 300, uniform=1 << 40), variant
        )
        assert tokens.tolist() == [0, 0]


@settings(max_examples=25)
@given(
    st.lists(
        st.fixed_dictionaries(
            dict(temperature=st.sampled_from([0.3, 1.0, 1.7])),
            optional=dict(
                top_k=st.sampled_from([1, 10, 70]),
                top_p=st.sampled_from([0.1, 0.9]),
                min_p=st.sampled_from([0.05, 0.5]),
                presence_penalty=st.just(1.0),
                logit_bias=st.just({3: 5.0}),
                logprobs=st.just(2),
            ),
        ),
        min_size=1,
        max_size=7,
    ),
    st.integers(0, 99),
)
def test_a_seed_gives_its_text_in_any_batch(others, seed):
    vocab, steps = 150, 4
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(steps, 8, vocab, generator=generator) * 2

    def tokens(kinds, rows):
        batch = [request(seed=seed + i, **kind) for i, kind in kinds]
        metadata = metadata_of(batch, vocab)
        sampler = DeviceSampler(vocab, 8, CPU, seed=len(kinds))
        out = []
        for step in range(steps):
            chosen = sampler(padded(logits[step, rows], 8), None, metadata, len(rows))
            out.append(chosen.cpu()[:, 0].tolist())
        return list(zip(*out, strict=True))

    kinds = list(enumerate(others))
    together = tokens(kinds, list(range(len(kinds))))
    for i, kind in kinds:
        assert tokens([(i, kind)], [i]) == [together[i]]


def test_a_discarded_row_uses_up_no_random_number():
    vocab = 100
    logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(0))
    batch = [request(temperature=1.0, seed=i) for i in range(2)]

    def second(discards):
        metadata = metadata_of(batch, vocab)
        sampler = DeviceSampler(vocab, 2, CPU)
        for discard in discards:
            step = sampler(logits, None, metadata, 2, discard=discard)
        return step.tolist()

    plain = second([None])
    assert second([[True, True], [True, False], None])[0] == plain[0]
    assert second([[True, True], [True, False], [True, True]]) != plain


@pytest.mark.parametrize("k", [1, 20, 64])
@pytest.mark.parametrize("n", [70, 1000, 5003, 128_256])
def test_top_values(n, k):
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n))
    x[1] = x[1].round()
    x[2, 3:] = -math.inf
    values, places = sampling.top_values(x, k)
    expected = torch.topk(x, k).values.clamp(min=sampling._LOWEST)
    assert torch.equal(values, expected)
    assert torch.equal(x.clamp(min=sampling._LOWEST).gather(1, places), values)
    assert all(len(set(row)) == k for row in places.tolist())


def test_the_device_filters_and_draws_as_the_host():
    """XLA's programs against the same functions of CPU tensors."""
    device = torch_xla.device()
    vocab, rows = 1000, 16
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(rows, vocab, generator=generator) * 2
    logits[::2] = logits[::2].round()
    logits[:, ::7] = -math.inf
    cases = dict(
        plain=(None, 1.0, 0.02),
        topk=(12, 0.7, 0.0),
        search=(None, 0.6, 0.0),
        search2=(200, 0.95, 0.001),
    )
    for variant, (top_k, top_p, min_p) in cases.items():
        params = params_of(rows, vocab, 0.9, top_k, top_p, min_p, grid(rows))
        expected = sampling.sample(logits, params, variant, True)
        got = sampling.sample(logits.to(device), params.to(device), variant, True)
        assert torch.equal(got[0].cpu(), expected[0]), variant
        kept, wanted = got[1].cpu() > -math.inf, expected[1] > -math.inf
        assert torch.equal(kept, wanted), variant


@pytest.mark.parametrize(
    "value", [-math.inf, -3.4e38, -1.5, -1e-40, -0.0, 0.0, 1e-40, 2.5, 3.4e38]
)
def test_the_search_ends_at_any_float(value):
    device = torch_xla.device()
    value = torch.tensor(value).item()
    z = torch.full((1, 9), value)
    z[0, 4:] = -math.inf
    one = torch.ones(1, 1)
    for z_on, one_on in ((z, one), (z.to(device), one.to(device))):
        top = z_on.amax(-1, keepdim=True)
        t = sampling._search(z_on, one_on > 0, top, one_on * 3).cpu()
        # A device may take denormal numbers for 0, so they bound nothing.
        if 0 < abs(value) < torch.finfo(torch.float32).tiny:
            assert abs(t.item()) <= torch.finfo(torch.float32).tiny
        else:
            assert t.item() == value
