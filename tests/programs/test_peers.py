"""Collectives through GPUs' memory, as far as they go without GPUs.

What they compute, tests/gpu/check_peers.py looks at on GPUs.
"""

import contextlib
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch_xla
import torch_xla.core.xla_model as xm

from xla_ops.core import handlers, paths
from xla_ops.core.errors import Problem
from xla_ops.programs import peers, processes

TARGET = "xla_ops.peer_collective"


@pytest.fixture
def group(monkeypatch):
    """Of two, on a client that has no such handler: programs are looked at, not run."""
    monkeypatch.setattr(handlers, "available", lambda platform, target: True)
    # The CPU client is one of one, for which torch_xla leaves collectives out.
    monkeypatch.setattr(
        xm,
        "all_reduce",
        lambda kind, x: torch_xla._XLAC._xla_all_reduce(kind, x, 1.0, [], True),
    )
    yield processes.PeerGroup(0, 2, dist.HashStore(), 5)
    # Collectives of a test that nothing ran would be part of the next one's programs.
    torch_xla._XLAC._set_all_reduce_token(str(torch_xla.device()), None)


def hlo_of(*tensors):
    return torch_xla._XLAC._get_xla_tensors_hlo(list(tensors))


def put(*shape, dtype=torch.float32):
    return torch.ones(shape).to(dtype).to(torch_xla.device())


def test_calls_follow_each_other(group):
    x, y = put(4, 8), put(4, 8)
    with group.in_order():
        first = group.all_reduce(x)
        second = group.all_reduce(y)  # needs nothing of the first
        third = group.all_gather(x)
    hlo = hlo_of(first, second, third)
    calls = re.findall(rf'custom-call\((.*?)\), custom_call_target="{TARGET}"', hlo)
    assert len(calls) == 3
    assert ["f32[0]" in call for call in calls] == [True, False, False]
    assert hlo.count("gathers = true") == 1
    assert "all-reduce" not in hlo and "all-gather" not in hlo


NORM = "xla_ops.peer_add_rms_norm"


def test_the_norm_of_a_sum_is_one_call_in_the_order(group):
    x, residual, weight = put(4, 8), put(4, 8), put(8)
    with group.in_order():
        first = group.all_reduce(x)
        second, total = group.all_reduce_add_rms_norm(x, residual, weight, 1e-3)
        third = group.all_reduce(x)
        fourth, _ = group.all_reduce_add_rms_norm(x, residual, weight)
    assert second.shape == total.shape == x.shape and fourth.dtype == x.dtype
    hlo = hlo_of(first, second, total, third, fourth)
    assert hlo.count(f'"{TARGET}"') == hlo.count(f'"{NORM}"') == 2
    assert "rms_norm_functional" not in hlo and "xla_ops.fused_add" not in hlo
    assert hlo_of(third).count(NORM) == 1  # what it comes after
    raised = pytest.raises(RuntimeError, match="all_reduce: has no gradient")
    with raised, torch.enable_grad(), group.in_order():
        group.all_reduce_add_rms_norm(x.clone().requires_grad_(), residual, weight)


@pytest.mark.parametrize(
    "x, residual, weight, dtype",
    [
        ((4, 8), (1, 8), (8,), torch.float32),  # spread over rows
        ((2, 8200), (2, 8200), (8200,), torch.bfloat16),  # a long row
        ((4, 3), (4, 3), (3,), torch.float32),  # no whole units
        ((1 << 10, 512), (1 << 10, 512), (512,), torch.float32),  # many rows
    ],
)
def test_the_norm_of_other_sums_is_another_call(group, x, residual, weight, dtype):
    given = [put(*shape, dtype=dtype) for shape in (x, residual, weight)]
    assert not peers.can_norm(*given, 2)
    if x != residual:
        raised = pytest.raises(ValueError, match="residual must have shape")
        with raised, group.in_order():
            group.all_reduce_add_rms_norm(*given)
        return
    with group.in_order():
        out, _ = group.all_reduce_add_rms_norm(*given)
    hlo = hlo_of(out)
    assert NORM not in hlo and "xla_ops.fused_add_rms_norm" in hlo


def test_what_is_nested_keeps_its_place(group):
    with group.in_order():
        first = group.all_reduce(put(4, 8))
        with group.in_order():
            second = group.all_reduce(put(4, 8))
        third = group.all_reduce(put(4, 8))
    assert group._last is None
    for before, after in ((first, second), (second, third)):
        assert hlo_of(after).count(TARGET) == hlo_of(before).count(TARGET) + 1


def test_what_has_no_element_takes_no_place(group):
    """XLA takes it out of the program: who waited for it would wait for nothing."""
    with group.in_order():
        first = group.all_reduce(put(4, 8))
        nothing = group.all_reduce(put(0, 8))
        last = group.all_reduce(put(4, 8))
    assert list(nothing.shape) == [0, 8]
    hlo = hlo_of(last)
    assert hlo.count(TARGET) == 2 and "all-" not in hlo
    assert hlo_of(first).count(TARGET) == 1


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("rows", [0, 4, 1 << 18])
@pytest.mark.parametrize("call", ["all_reduce", "all_gather"])
def test_a_gradient_is_refused(group, ordered, rows, call):
    x = put(rows, 2).requires_grad_()
    order = group.in_order() if ordered else contextlib.nullcontext()
    wrong = f"processes.{call}: has no gradient: x requires one; use torch.no_grad"
    raised = pytest.raises(RuntimeError, match=wrong)
    with raised, torch.enable_grad(), order:
        getattr(group, call)(x)
    if call == "all_reduce":
        with torch.no_grad(), group.in_order():
            assert group.all_reduce(x).shape == x.shape


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("shape, dim", [((4, 8), 2), ((4, 8), -3), ((), 0)])
def test_a_dimension_that_is_not_there(group, ordered, shape, dim):
    wrong = f"processes: dim must be .* has {len(shape)}, got {dim}"
    order = group.in_order() if ordered else contextlib.nullcontext()
    with pytest.raises(IndexError, match=wrong), order:
        group.all_gather(put(*shape), dim)


def test_each_program_begins_anew(group):
    for _ in range(2):
        with group.in_order():
            hlo = hlo_of(group.all_reduce(put(4, 8)))
        assert hlo.count("f32[0]{0} ") > 0


def test_what_does_not_fit_is_xlas_and_keeps_its_place(group):
    most = peers.most_bytes(2) // 4
    few, many = put(4, 8), put(most + 2)
    with group.in_order():
        first = group.all_reduce(few)
        second = group.all_reduce(many)
        third = group.all_reduce(few)
    hlo = hlo_of(first, second, third)
    assert hlo.count(f'custom_call_target="{TARGET}"') == 2
    # The second one's input waits for the first, and the third for the second's sum.
    assert "opt-barrier" in hlo
    (reduced,) = re.findall(r"%([\w.-]+) = .*? all-reduce\(", hlo)
    gets = re.findall(rf"%([\w.-]+) = \S+ get-tuple-element\(.*?%{reduced}\)", hlo)
    calls = re.findall(r"call\(([^)]*)\), to_apply=%main", hlo)
    assert any(f"%{name}" in calls[-1] for name in [reduced, *gets])


def test_without_an_order_it_is_xlas(group):
    hlo = hlo_of(group.all_reduce(put(4, 8)))
    assert TARGET not in hlo and "all-reduce(" in hlo


def test_other_ranks_calls_are_compared(group):
    theirs = json.dumps(["all_reduce of float32[4, 8]"])
    group._store.set("xla_ops/collectives/0/1", theirs)
    wrong = "got all_gather in dimension 0 of float32"
    with pytest.raises(RuntimeError, match=wrong), group.in_order():
        group.all_gather(put(4, 8))


@pytest.mark.parametrize(
    "shape, dtype, size, sums, gathers",
    [
        ((4096,), torch.bfloat16, 2, True, True),
        ((64, 4096), torch.bfloat16, 2, True, True),
        ((1 << 18,), torch.float32, 2, True, False),  # no room to pad
        (((1 << 18) + 2,), torch.float32, 2, False, False),
        ((1 << 18,), torch.float32, 3, False, False),
        ((1 << 17,), torch.float32, 3, True, False),
        ((3,), torch.float32, 2, False, True),
        ((3,), torch.int64, 2, False, True),
        ((7,), torch.bool, 2, False, True),
        ((0, 8), torch.float32, 2, False, False),
        ((8,), torch.complex64, 2, False, False),
    ],
)
def test_what_fits(shape, dtype, size, sums, gathers):
    x = torch.empty(shape, dtype=dtype, device="meta")
    assert peers.can_sum(x, size) is sums
    assert peers.can_gather(x, size) is gathers


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.bfloat16, torch.int64])
def test_a_gather_has_its_shape(group, shape, dtype):
    x = put(*shape, dtype=dtype)
    with group.in_order():
        for dim in (0, -1):
            out = group.all_gather(x, dim)
            wanted = list(shape)
            wanted[dim] *= 2
            assert (list(out.shape), out.dtype) == (wanted, dtype)


@pytest.mark.parametrize(
    "size, local_size, can_be",
    [
        (2, 2, True),
        (8, 8, True),
        (9, 9, False),
        (4, 2, False),
        (1, 1, False),
    ],
)
def test_where_it_can_be(size, local_size, can_be):
    assert peers.can_be(size, local_size) is can_be


RANK = """
import json, os, sys, warnings
import torch.distributed as dist
from xla_ops.programs import peers

dist.init_process_group("gloo")
rank = dist.get_rank()
{body}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        group = peers.open_group(dist.group.WORLD, rank)
    except ValueError as error:
        group = str(error)
said = [str(w.message) for w in caught]
os.write(1, (json.dumps({{"rank": rank, "found": [group, said]}}) + "\\n").encode())
os._exit(0)
"""


def opened(tmp_path, body):
    """What two processes get, by rank."""
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(body=body))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", "2", str(script)]
    found = subprocess.run(
        command,
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    rows = [json.loads(row) for row in found.stdout.splitlines() if row[:1] == "{"]
    return [row["found"] for row in sorted(rows, key=lambda row: row["rank"])]


def test_without_a_gpu_nccl_remains(tmp_path):
    for group, said in opened(tmp_path, ""):
        assert group is None
        (warning,) = said
        assert "are NCCL's" in warning and f"{peers.VARIABLE}=0" in warning


def test_all_have_it_or_none(tmp_path):
    body = """
def ask(what, request, num_results):
    if what == "open" and rank == 1:
        raise ValueError("another rank's memory cannot be opened: no")
    return [3, *range(8)] if what == "make" else [1]
peers._ask = ask
"""
    (first, said), (second, said_there) = opened(tmp_path, body)
    assert first is None and second is None
    assert said == [] and "cannot be opened: no" in said_there[0]


def test_what_one_process_lacks_none_waits_for(tmp_path):
    body = """
def ask(what, request, num_results):
    if rank == 1:
        raise Problem("libxla_ops_peer_collective_cuda.so was cut short", "reinstall")
    return [3, *range(8)]
from xla_ops.core.errors import Problem
peers._ask = ask
"""
    (first, said), (second, said_there) = opened(tmp_path, body)
    assert first is None and second is None
    assert said == [] and "was cut short: reinstall" in said_there[0]


@pytest.mark.parametrize("value", ["0", "false", "maybe"])
def test_the_setting_of_one_process_is_all_processes(tmp_path, value):
    body = f"""
peers._ask = lambda what, request, num_results: [3, *range(8)]
if rank == 1:
    os.environ[peers.VARIABLE] = "{value}"
"""
    wrong = f"{peers.VARIABLE} must be 1, 0, true or false, got 'maybe'"
    group = wrong if value == "maybe" else None
    assert opened(tmp_path, body) == [[group, []]] * 2


@pytest.mark.parametrize("library", ["peer_collective_cuda", "host_collective_cpu"])
def test_a_library_that_was_cut_short_is_named(tmp_path, monkeypatch, library):
    """Loading it would end the process."""
    data = (paths.LIB / "libxla_ops_host_collective_cpu.so").read_bytes()
    (tmp_path / f"libxla_ops_{library}.so").write_bytes(data[:9000])
    monkeypatch.setattr(paths, "LIB", tmp_path)
    uses = {
        "peer_collective_cuda": lambda: peers._ask("make", (0, 0, 2, 1 << 20, 9), 9),
        "host_collective_cpu": lambda: processes.HostGroup(0, 1, "file"),
    }
    with pytest.raises(Problem, match="was cut short: it has 9000 of .* reinstall"):
        uses[library]()


def test_handles_come_by_rank(tmp_path):
    body = """
def ask(what, request, num_results):
    if what == "make":
        assert request[:3] == (rank, rank, 2), request
        return [3, *(100 * rank + i for i in range(8))]
    assert request == (3, *range(8), *range(100, 108), *[0] * 48), request
    return [1]
peers._ask = ask
"""
    assert opened(tmp_path, body) == [[3, []], [3, []]]
