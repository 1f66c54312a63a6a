"""The mutable fronts in general, through rms_norm's: where a result may be written."""

import pytest
import torch

import xla_ops
from support import same
from xla_ops import _runtime

EPS = 1e-5


def rms_norm_into(result, x, w):
    torch.ops.xla_ops.rms_norm(result, x, w, EPS)


def inputs(rows=5, hidden=24):
    return torch.randn(rows, hidden), torch.randn(hidden)


def test_writes_the_result(path):
    x, w = inputs()
    wanted = xla_ops.rms_norm(x, w, EPS)
    _, (result, after, _) = path.run(rms_norm_into, torch.full_like(x, torch.nan), x, w)
    assert same(result, wanted)
    assert same(after, x)


def test_result_is_an_input(path):
    x, w = inputs()

    def in_place(x, w):
        rms_norm_into(x, x, w)
        return x + 1

    plus_one, (after, _) = path.run(in_place, x, w)
    assert same(after, xla_ops.rms_norm(x, w, EPS))
    assert same(plus_one, after + 1)


@pytest.mark.parametrize("which", ["rows", "columns", "transposed", "overlap"])
def test_result_is_a_view(path, which):
    x, w = inputs()
    wanted = xla_ops.rms_norm(x, w, EPS)

    def into_view(base, x, w):
        if which == "rows":
            rms_norm_into(base[2:7], x, w)
        elif which == "columns":
            rms_norm_into(base[:5, 1:25], x, w)
        elif which == "transposed":
            rms_norm_into(base.view(32, 9).t()[2:7, 4:28], x, w)
        else:
            base[:5, :24] = x
            flat = base.view(-1)
            source = base[:5, :24]
            rms_norm_into(flat[7 : 7 + 120].view(5, 24), source, w)

    base = torch.full((9, 32), 7.0)
    expected = base.clone()
    if which == "rows":
        base, expected = base[:, :24].clone(), expected[:, :24].clone()
        expected[2:7] = wanted
    elif which == "columns":
        expected[:5, 1:25] = wanted
    elif which == "transposed":
        expected.view(32, 9).t()[2:7, 4:28] = wanted
    else:
        expected[:5, :24] = x
        expected.view(-1)[7 : 7 + 120] = wanted.reshape(-1)
    _, (after, *_) = path.run(into_view, base, x, w)
    assert same(after, expected)


def test_views_of_the_result_see_it(path):
    x, w = inputs()

    def through_view(result, x, w):
        row = result[3]
        rms_norm_into(result, x, w)
        return row * 2

    doubled, (result, *_) = path.run(through_view, torch.zeros_like(x), x, w)
    assert same(result, xla_ops.rms_norm(x, w, EPS))
    assert same(doubled, 2 * result[3])


def test_twice_in_a_row(path):
    x, w = inputs()

    def twice(result, x, w):
        rms_norm_into(result, x, w)
        rms_norm_into(result, result, w)

    once = xla_ops.rms_norm(x, w, EPS)
    _, (result, *_) = path.run(twice, torch.zeros_like(x), x, w)
    assert same(result, xla_ops.rms_norm(once, w, EPS))


def test_no_tokens(path):
    _, (result, *_) = path.run(
        rms_norm_into, torch.empty(0, 8), torch.empty(0, 8), torch.ones(8)
    )
    assert result.shape == (0, 8)


@pytest.mark.parametrize("direct", [True, False])
def test_plain_results_are_written_by_the_handler(monkeypatch, direct):
    """A dense result is the handler's own; a strided one needs a copy."""
    written = []

    def call(*args):
        written.extend(address for address, *_ in args[4])
        return real(*args)

    real = _runtime.call
    monkeypatch.setattr(_runtime, "call", call)
    x, w = inputs()
    result = torch.empty_like(x) if direct else torch.empty(5, 48)[:, :24]
    rms_norm_into(result, x, w)
    assert (written == [result.data_ptr()]) == direct
    assert same(result, xla_ops.rms_norm(x, w, EPS))


@pytest.mark.parametrize(
    "result, message",
    [
        (
            torch.empty(5, 24, dtype=torch.float16),
            "rms_norm: result must be float32, got float16",
        ),
        (
            torch.empty(4, 24),
            "rms_norm: result must have shape [5, 24], got [4, 24]",
        ),
    ],
)
def test_errors(path, result, message):
    with pytest.raises(Exception) as error:
        path.run(rms_norm_into, result, *inputs())
    assert message in str(error.value)


def add_norm_into(x, residual, weight):
    torch.ops.xla_ops.fused_add_rms_norm(x, residual, weight, EPS)


@pytest.mark.parametrize(
    "write, message",
    [
        (
            lambda row, x, w: rms_norm_into(row.expand(5, 24), x, w),
            "rms_norm: result must be dense in its last dimension and free of"
            r" overlaps, got strides \[0, 1\]",
        ),
        (
            lambda row, x, w: add_norm_into(x, x, w),
            r"fused_add_rms_norm: residual must not share memory with input, got"
            r" shapes \[5, 24\] and \[5, 24\] of one tensor",
        ),
        (
            lambda row, x, w: add_norm_into(x[1:], x[:-1], w),
            "fused_add_rms_norm: residual must not share memory with input",
        ),
    ],
    ids=["expanded", "twice", "overlapping"],
)
def test_no_element_is_written_twice(path, write, message):
    x, w = inputs()
    with pytest.raises(Exception, match=message):
        path.run(write, torch.zeros(1, 24), x, w)


def test_parts_of_one_tensor_are_written(path):
    both, w = torch.randn(5, 48), torch.ones(24)

    def f(both, w):
        add_norm_into(both[:, :24], both[:, 24:], w)

    _, (after, _) = path.run(f, both, w)
    wanted = xla_ops.fused_add_rms_norm(both[:, :24], both[:, 24:], w, EPS)
    assert same(after, torch.cat(wanted, dim=1))


def test_a_subclass_of_tensor_takes_the_result():
    class Subclass(torch.Tensor):
        pass

    x, w = inputs()
    result = torch.empty(24, 5).t()
    rms_norm_into(result.as_subclass(Subclass), x, w)
    assert same(result, xla_ops.rms_norm(x, w, EPS))
