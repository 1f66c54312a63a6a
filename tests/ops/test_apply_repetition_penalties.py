"""xla_ops.apply_repetition_penalties_: values, masks, views, errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import xla_ops
from support import Path, assert_close_to_exact

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def expected(logits, prompt, output, penalties):
    """The definition in logits' dtype, which rounds once."""
    p = penalties[:, None]
    penalised = torch.where(logits > 0, logits / p, logits * p)
    return torch.where(prompt | output, penalised, logits)


def batch(seqs, vocab, dtype=torch.float32, share=0.2):
    logits = (3 * torch.randn(seqs, vocab)).to(dtype)
    prompt, output = (torch.rand(seqs, vocab) < share for _ in range(2))
    return logits, prompt, output, (0.7 + torch.rand(seqs)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.01, 0.9])
@pytest.mark.parametrize(
    "seqs, vocab", [(1, 1), (7, 1), (3, 7), (5, 257), (2, 4096), (64, 1003)]
)
def test_numerics(path, seqs, vocab, share, dtype):
    args = batch(seqs, vocab, dtype, share)
    result, (logits, *masks, penalties) = path.run(
        xla_ops.apply_repetition_penalties_, *args
    )
    assert result is None and logits.dtype == dtype
    wanted = expected(*args)
    exact = expected(args[0].double(), *args[1:3], args[3].double())
    assert_close_to_exact(logits, wanted, exact)
    # One rounding of one operation: there is no other right result.
    assert torch.equal(logits, wanted)
    for before, after in zip(args[1:], (*masks, penalties), strict=True):
        assert torch.equal(before, after)


def test_special_values(path):
    logits = torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.0, 2.0, torch.nan]])
    marked = torch.tensor([[True] * 5 + [False]])
    _, (got, *_) = path.run(
        xla_ops.apply_repetition_penalties_, logits, marked, ~marked, torch.ones(1) * 2
    )
    assert got[0, 0].isnan() and got[0, 5].isnan()
    # Either mask marks.
    assert got[0, 1:5].tolist() == [math.inf, -math.inf, 0.0, 1.0]


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)])
def test_nothing_to_do(path, shape):
    args = batch(*shape)
    _, (logits, *_) = path.run(xla_ops.apply_repetition_penalties_, *args)
    assert logits.shape == shape


def test_later_reads_see_the_update(path):
    args = batch(4, 40)

    def call(logits, *rest):
        before = logits * 1
        xla_ops.apply_repetition_penalties_(logits, *rest)
        return before, logits + 1

    (before, plus_one), (after, *_) = path.run(call, *args)
    assert torch.equal(before, args[0])
    assert torch.equal(after, expected(*args))
    assert torch.equal(plus_one, after + 1)


VIEWS = {
    "rows": ((9, 40), lambda t: t[2:6]),
    "columns": ((4, 50), lambda t: t[:, 5:45]),
    "transposed": ((40, 4), lambda t: t.t()),
    "flat": ((160,), lambda t: t.view(4, 40)),
}


@pytest.mark.parametrize("view", VIEWS)
def test_writes_through_views(path, view):
    shape, take = VIEWS[view]
    base, (_, *rest) = torch.randn(shape), batch(4, 40)

    def call(base, *rest):
        xla_ops.apply_repetition_penalties_(take(base), *rest)
        return base + 1

    wanted = base.clone()
    take(wanted).copy_(expected(take(base), *rest))
    plus_one, (after, *_) = path.run(call, base, *rest)
    assert torch.equal(after, wanted)
    assert torch.equal(plus_one, wanted + 1)


def test_a_temporary_is_updated_without_a_copy(hlo_dump):
    """Logits that the program computes are overwritten where they are."""
    from support import copies_of, programs_with

    hidden, weight = torch.randn(5, 16), torch.randn(16, 333)
    _, prompt, output, penalties = batch(5, 333)

    def call(hidden, weight, *rest):
        logits = hidden @ weight
        xla_ops.apply_repetition_penalties_(logits, *rest)
        return logits.argmax(-1)

    got, _ = Path("compiled").run(call, hidden, weight, prompt, output, penalties)
    logits = expected(hidden @ weight, prompt, output, penalties)
    assert torch.equal(got, logits.argmax(-1))
    (program,) = programs_with((5, 333), hlo_dump)
    assert not [c for c in copies_of((5, 333), program) if " copy" in c]


@settings(max_examples=60)
@given(
    seqs=st.integers(0, 9),
    vocab=st.integers(0, 70),
    dtype=st.sampled_from(DTYPES),
    share=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    seed=st.random_module(),
)
def test_any_shape(seqs, vocab, dtype, share, seed):
    args = batch(seqs, vocab, dtype, share)
    _, (logits, *_) = Path("cpu").run(xla_ops.apply_repetition_penalties_, *args)
    assert torch.equal(logits, expected(*args))


MASK = torch.zeros(4, 8, dtype=torch.bool)
GOOD = {
    "logits": torch.ones(4, 8),
    "prompt_mask": MASK,
    "output_mask": MASK,
    "repetition_penalties": torch.ones(4),
}


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"logits": torch.ones(4, 8).int()},
            "logits must be float32, float16 or bfloat16, got int32",
        ),
        (
            {"logits": torch.ones(4)},
            "logits must have shape [num_seqs, vocab_size], got [4]",
        ),
        ({"prompt_mask": MASK.to(torch.uint8)}, "prompt_mask must be bool, got uint8"),
        (
            {"prompt_mask": torch.zeros(4, 9, dtype=torch.bool)},
            "prompt_mask must have shape [4, 8], got [4, 9]",
        ),
        ({"output_mask": MASK.float()}, "output_mask must be bool, got float32"),
        (
            {"output_mask": MASK[:3].clone()},
            "output_mask must have shape [4, 8], got [3, 8]",
        ),
        (
            {"repetition_penalties": torch.ones(4).half()},
            "repetition_penalties must be float32, got float16",
        ),
        (
            {"repetition_penalties": torch.ones(4, 1)},
            "repetition_penalties must have shape [4], got [4, 1]",
        ),
    ],
)
def test_errors(path, changes, message):
    with pytest.raises(Exception) as error:
        path.run(lambda g: xla_ops.apply_repetition_penalties_(**g), GOOD | changes)
    assert "apply_repetition_penalties_: " + message in str(error.value)


def test_wrong_type():
    with pytest.raises(TypeError, match="logits must be a tensor, got list"):
        xla_ops.apply_repetition_penalties_(**GOOD | {"logits": [1.0]})
