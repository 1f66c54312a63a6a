"""References as users write them, on every path: they write what they are given, and
views of what they make."""

import pytest
import torch

from support import Path, same
from xla_ops.extend import cuda_kernel

pytestmark = pytest.mark.filterwarnings("ignore:.*its reference function runs")


@pytest.fixture(params=["cpu", "lazy", "compiled", "dispatched"])
def path(request):
    return Path(request.param)


def op_of(reference, schema="(Tensor x) -> Tensor"):
    name = reference.__name__
    return cuda_kernel(
        f"__global__ void {name}(float* x, float* y) {{}}",
        name,
        schema,
        grid=1,
        block=32,
        reference=reference,
    )


def writes_its_argument(x):
    x.mul_(2)
    return x


def writes_a_part_of_its_argument(x):
    x[0].zero_()
    return x + 1


def writes_its_arguments_data(x):
    x.data.zero_()
    return x + 1


def fills_zeros(x):
    out = torch.zeros_like(x)
    out[0].copy_(x[1])
    out[1:, 0] = 5
    out.view(-1)[-1] = 9
    return out


def fills_what_it_makes_anew(x):
    out = torch.zeros(x.shape, device=x.device)
    first = torch.tensor([7.0, 8.0, 9.0], device=x.device)
    first[1] = 3
    for row, values in zip(out.unbind(0), x, strict=True):
        row.copy_(values * first)
    return out


def returns_a_part(x):
    return torch.cat([x, x * 2])[1:3]


REFERENCES = (
    writes_its_argument,
    writes_a_part_of_its_argument,
    writes_its_arguments_data,
    fills_zeros,
    fills_what_it_makes_anew,
    returns_a_part,
)


@pytest.mark.parametrize("reference", REFERENCES)
def test_a_reference_may_write(reference, path):
    op, x = op_of(reference), torch.arange(1.0, 7.0).reshape(2, 3)
    wanted = reference(x.clone())
    got, (after,) = path.run(op, x)
    assert same(got, wanted)
    assert same(after, x)
    got, (after,) = path.run(lambda x: op(x * 2) + x, x)
    assert same(got, reference(x * 2) + x) and same(after, x)


def adds(x, a):
    x[1].add_(a)
    x.add_(1)
    return x


def test_a_reference_of_what_is_written_may_write(path):
    op = op_of(adds, "(Tensor(a!) x, float a) -> ()")
    x = torch.arange(1.0, 7.0).reshape(2, 3)
    _, (after,) = path.run(lambda x: op(x, 2.5), x)
    assert same(after, adds(x.clone(), 2.5))


def writes_both(x, y):
    x.add_(1)
    y[0].add_(x[0])
    return x, y


def test_what_is_not_written_stays(path):
    op = op_of(writes_both, "(Tensor(a!) x, Tensor y) -> Tensor")
    x, y = torch.arange(1.0, 13.0).reshape(2, 2, 3)
    new, wanted = writes_both(x.clone(), y.clone())
    got, (x_after, y_after) = path.run(op, x, y)
    assert same(got, wanted) and same(x_after, new) and same(y_after, y)


def returns_one_twice(x):
    x[0] = 1
    return x, x


def test_one_result_twice_is_two(path):
    op = op_of(returns_one_twice, "(Tensor x) -> (Tensor, Tensor)")
    x = torch.zeros(2, 3)

    def step(x):
        a, b = op(x)
        a.add_(1)
        return a, b

    (a, b), (after,) = path.run(step, x)
    assert same(a, b + 1) and same(b[0], torch.ones(3)) and same(after, x)
