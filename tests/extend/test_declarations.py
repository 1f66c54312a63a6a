"""What a declaration of a user's kernel may be, and what is wrong with one."""

import numpy as np
import pytest
import torch

import xla_ops
from support import Path, same
from user_kernels import make_scale

pytestmark = pytest.mark.filterwarnings("ignore:.*its reference function runs")


@pytest.fixture(params=["cpu", "lazy", "compiled"])
def path(request):
    return Path(request.param)


NAMES = ("check", "call", "scalars", "check_", "call__", "self", "k", "make", "donor")


@pytest.mark.parametrize("name", NAMES)
def test_any_name_is_as_good(name, path):
    """Of an argument and of the function; those of the code that makes it are, too."""

    def make(schema, name="k"):
        return xla_ops.extend.cuda_kernel(
            f"__global__ void {name}(float* x) {{}}",
            name,
            schema,
            grid=1,
            block=1,
            reference=lambda x, n: x * n,
        )

    x = torch.randn(2, 3)
    plain = "(Tensor x, int n) -> Tensor"
    for schema in (f"(Tensor {name}, float n) -> Tensor", plain):
        f = make(schema)
        got, _ = path.run(lambda x, f=f: f(x, 2), x)
        assert same(got, x * 2)
    for schema in (f"(Tensor x, int {name}) -> Tensor", plain):
        f = make(schema, name)
        got, _ = path.run(lambda x, f=f: f(x, 2), x)
        assert same(got, x * 2) and f.__name__ == name


@pytest.mark.parametrize(
    "given, message",
    [
        ({"schema": "(Tensor x, Tensor x) -> Tensor"}, "schema must name none twice"),
        ({"schema": "(Tensor lambda) -> Tensor"}, "schema must name its .* got lambda"),
        ({"schema": "(Tensor x, int n=99999999999999999999) -> Tensor"}, "schema must"),
        ({"schema": "(Tensor x, float n=1e999) -> Tensor"}, "schema must be one of"),
        ({"schema": "(Tensor(a!) donor) -> ()"}, "schema must name its .* got donor"),
        ({"name": 3}, "name must be given"),
        ({"name": "é"}, "name must be one of Python's, of ASCII, got 'é'"),
        ({"kernel": "class"}, "name must be one of Python's, of ASCII, got 'class'"),
        ({"options": "--use_fast_math"}, "options must be a list of strs, got '--use"),
        ({"options": None}, "options must be a list of strs, got None"),
        ({"options": [3]}, r"options must be a list of strs, got \[3\]"),
        ({"gradient": 3}, "gradient must be a Gradient or None, got 3"),
        ({"splits": 3}, "splits must be a Rule, a function or None, got 3"),
        ({"rule": None}, "rule must be a function, got None"),
    ],
)
def test_wrong_declarations_are_named(given, message):
    declared = {"kernel": "k", "schema": "(Tensor x) -> Tensor", "grid": 1, "block": 1}
    with pytest.raises(ValueError, match=message):
        xla_ops.extend.cuda_kernel("__global__", **declared | given)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"results": lambda x: x.like((-1, 3))}, r"have shapes .*, got \(-1, 3\)"),
        ({"results": lambda x: x.like((2.0, 3))}, r"have shapes .*, got \(2.0, 3\)"),
        ({"results": lambda x: x.like(dtype=3)}, "results must have dtypes, got 3"),
        ({"kernel": lambda x: 3, "name": "k"}, "kernel must give a str, got 3"),
    ],
)
def test_wrong_answers_of_functions_are_named(given, message, path):
    declared = {"kernel": "k", "schema": "(Tensor x) -> Tensor", "grid": 1, "block": 1}
    wrong = xla_ops.extend.cuda_kernel(
        "__global__", reference=lambda x: x, **declared | given
    )
    with pytest.raises(ValueError, match=message):
        wrong(torch.ones(2, 3))


def test_sizes_may_be_numpys(path):
    x = torch.randn(2, 300)
    scale = make_scale(grid=lambda x, a: np.int64(3), block=(np.int32(256),))
    got, _ = path.run(scale, x, 0.5)
    assert same(got, 0.5 * x)
    for wrong in (np.bool_(True), np.float64(1), np.int64(0)):
        with pytest.raises(ValueError, match="^scale: grid must be one to three ints"):
            make_scale(grid=wrong)(x)
