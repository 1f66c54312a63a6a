"""What a replayed function is given beside tensors (programs/arguments.py).

A program is kept by it: what a function could tell apart is two programs, and what may
change later is no argument.
"""

import collections
import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
import torch_xla
from torch.utils import _pytree as pytree

from xla_ops.programs.replay import replay


def xla(*values):
    return torch.tensor(values).to(torch_xla.device())


@dataclasses.dataclass(frozen=True)
class Scale:
    factor: object


class Tuple(tuple):
    """Of no form that torch's pytree knows."""


VALUES = {
    "float": (lambda value: value, lambda held: held),
    "NumPy": (np.float32, lambda held: held),
    "dataclass": (Scale, lambda held: held.factor),
    "of NumPy": (lambda value: Scale(np.float64(value)), lambda held: held.factor),
    "frozenset": (lambda value: frozenset([value]), lambda held: next(iter(held))),
    "tuple": (lambda value: Tuple([value]), lambda held: held[0]),
    "nested": (lambda value: Scale(Scale(value)), lambda held: held.factor.factor),
}


@pytest.mark.parametrize("kind", VALUES)
def test_zeros_of_either_sign_are_two_values(kind):
    hold, read = VALUES[kind]
    f = replay(lambda x, held: x * read(held))
    x = xla(1.0)
    for zero in (0.0, -0.0, 0.0, -0.0):
        negative = torch.signbit(f(x, hold(zero)).cpu()).item()
        assert negative == (str(zero) == "-0.0")
    assert f.num_programs == 2
    for _ in range(2):
        assert f(x, hold(float("nan"))).isnan().item()
    assert f.num_programs == 3


@pytest.mark.parametrize("kind", ["float", "dataclass", "frozenset", "tuple"])
def test_an_int_a_bool_and_a_float_are_three_values(kind):
    hold, read = VALUES[kind]
    f = replay(lambda x, held: x * read(held))
    dtypes = [f(xla(2), hold(one)).dtype for one in (1, 1.0, True, 1)]
    assert dtypes == [torch.int64, torch.float32, torch.int64, torch.int64]
    assert f.num_programs == 3


class Cache:
    """As transformers' caches are: a class of its own that torch's pytree knows."""

    def __init__(self, keys):
        self.keys = keys


pytree.register_pytree_node(
    Cache, lambda cache: ([cache.keys], None), lambda leaves, _: Cache(*leaves)
)


@pytest.mark.parametrize("name", [None, "cache"])
def test_trees_of_other_classes(name):
    """By position and by name; a tensor in one is an argument like any other."""
    f = replay(lambda x, cache: cache.keys.add_(x) * 10)
    cache, x = Cache(xla(1, 2)), xla(1, 1)
    for i in (1, 2):
        result = f(x, **{name: cache}) if name else f(x, cache)
        assert cache.keys.tolist() == [1 + i, 2 + i]
        assert result.tolist() == [10 + 10 * i, 20 + 10 * i]
    cache.keys = xla(5, 5)
    assert (f(x, **{name: cache}) if name else f(x, cache)).tolist() == [60, 60]
    assert f.num_programs == 1
    queue = replay(lambda values: values[0] - values[1])
    assert queue(collections.deque([xla(5), xla(2)])).item() == 3


class Plain:
    def __init__(self, value):
        self.value = value


class Slots:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


@dataclasses.dataclass(eq=False)
class Identity:
    value: object


HOLDERS = [Plain, Slots, Identity]


@pytest.mark.parametrize("kind", HOLDERS)
@pytest.mark.parametrize("name", [None, "held"])
def test_what_is_hashed_by_its_identity_is_refused(kind, name):
    """It could change, and the program would not."""
    f = replay(lambda x, held: x * held.value)
    with pytest.raises(TypeError) as error:
        f(xla(1), **{name: kind(2)}) if name else f(xla(1), kind(2))
    assert str(error.value) == (
        "replay: an argument must be a tensor, a value or a tree of them, got"
        f" {kind.__name__}, which is hashed by its identity, whatever it holds; give"
        " what the function reads of it"
    )
    assert f.num_programs == 0


@pytest.mark.parametrize("make", [Scale, Plain, Identity, lambda t: Tuple([t])])
def test_what_holds_tensors_is_refused(make):
    f = replay(lambda x, held: x * 2)
    with pytest.raises(TypeError, match="replay: .*, which holds tensors; give its"):
        f(xla(1), make(xla(2)))


@dataclasses.dataclass
class Mutable:
    value: object


@pytest.mark.parametrize("make", [Mutable, list, lambda v: Scale([v]), np.asarray])
def test_what_cannot_be_hashed_is_refused(make):
    f = replay(lambda x, held: x * 2)
    held = Tuple([make([1])])
    with pytest.raises(TypeError, match="^replay: an argument must be .*, got Tuple$"):
        f(xla(1), held)


def test_a_module_is_refused():
    model = torch.nn.Linear(1, 1).to(torch_xla.device())
    with torch.no_grad():
        f = replay(lambda model, x: model(x))
        with pytest.raises(TypeError, match=r"got Linear, which holds .* in `state`"):
            f(model, xla(1.0))


def test_what_stays_as_it_is_may_be_known_by_its_identity():
    sentinel = object()
    f = replay(lambda x, *given: x.to(given[0]) * 2)
    for given in (torch.float32, torch.strided, torch.sin, sum, Plain, sentinel, math):
        result = f(xla(1), torch.float64, given)
        assert result.dtype == torch.float64 and result.item() == 2
    assert f.num_programs == 7


def test_a_tensor_closed_over_that_was_updated_is_named():
    """torch_xla gave the buffer away, which the program has for a constant."""
    weight = xla(2.0, 3.0)
    f = replay(lambda x: x * weight)
    x = xla(1.0, 1.0)
    assert f(x).tolist() == [2, 3]
    weight.add_(1)
    torch_xla.sync()
    with pytest.raises(RuntimeError) as error:
        f(x)
    assert str(error.value) == (
        "xla_ops: a tensor that a compiled function closes over must stay as it is, got"
        " one that was updated in place, of shape [2]; give it as an argument, or name"
        " it in replay's `state`"
    )
    assert x.tolist() == [1, 1] and weight.tolist() == [3, 4]


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)
        self.step = replay(self.layer_of, state=[self])

    def layer_of(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    "copy", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_has_programs_of_its_own(copy):
    model, x = Model().to(torch_xla.device()), xla(1.0, 2.0)
    with torch.no_grad():
        first = model.step(x)
        other = copy(model)
        assert other.step.num_programs == 0
        other.layer.weight.zero_()
        assert torch.equal(other.step(x).cpu(), other.layer.bias.cpu())
        torch.testing.assert_close(model.step(x).cpu(), first.cpu())
    assert model.step.num_programs == other.step.num_programs == 1


def test_deterministic_algorithms_are_another_program():
    f = replay(lambda x: x + torch.are_deterministic_algorithms_enabled())
    x = xla(1)
    try:
        for wanted in (False, True, False):
            torch.use_deterministic_algorithms(wanted)
            assert f(x).item() == 1 + wanted
    finally:
        torch.use_deterministic_algorithms(False)
