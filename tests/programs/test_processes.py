"""Collectives between processes, each with the CPU client, by torch.distributed.run."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

import pytest
import torch
import torch_xla

from xla_ops.programs import processes

RANK = """
import json, os, sys, time
import torch, torch.distributed as dist, torch_xla
import torch_xla.debug.metrics as met
from xla_ops.programs import processes
from xla_ops.programs.replay import replay

dist.init_process_group("gloo")
group = processes.join(dist.group.WORLD)
rank, size = dist.get_rank(), dist.get_world_size()
device = torch_xla.device()
{body}
# At once, or the ranks' lines would mix.
os.write(1, (json.dumps({{"rank": rank, **found}}) + "\\n").encode())
os._exit(0)
"""


def start(tmp_path, body, size=2):
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(body=body))
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node", str(size), script),
        ],
        env=dict(os.environ, OMP_NUM_THREADS="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    rows = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return sorted(rows, key=lambda row: row["rank"]), err


VALUES = """
def given(r, dtype):
    return (torch.arange(24).view(2, 3, 4) % 5 + 8 * r).to(dtype)

found = {{}}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x = given(rank, dtype).to(device)
    wholes = [given(r, dtype) for r in range(size)]

    def both(x):
        with group.in_order():
            # Neither needs the other's result.
            return group.all_reduce(x), group.all_gather(x, -1), group.all_gather(x)

    want = sum(wholes), torch.cat(wholes, -1), torch.cat(wholes)
    for name, function in (
        ("lazily", both),
        ("replayed", replay(both)),
        ("openxla", torch.compile(both, backend="openxla", fullgraph=True)),
    ):
        for _ in range(3):
            got = [t.cpu() for t in function(x)]
            right = all(torch.equal(g, w) for g, w in zip(got, want, strict=True))
            case = f"{{name}} {{dtype}}"
            found[case] = found.get(case, True) and right
compiled = met.counter_value("UncachedCompile")
for function in (both, group.all_reduce):
    replayed = replay(function)
    replayed(x)
    torch_xla.sync(wait=True)
found["left"] = met.counter_value("UncachedCompile") - compiled
big = torch.full((3 << 19,), float(rank + 1)).to(device)  # several slots
found["big"] = bool((group.all_reduce(big).cpu() == size * (size + 1) / 2).all())
found["files"] = [f for f in os.listdir("/dev/shm") if f.startswith("xla_ops_group_")]
""".replace("{{", "{").replace("}}", "}")


@pytest.mark.parametrize("size", [1, 3])
def test_values(size, tmp_path):
    rows, err = finish(start(tmp_path, VALUES, size))
    assert [row["rank"] for row in rows] == list(range(size)), err
    for row in rows:
        assert row.pop("files") == []
        assert row.pop("left") == 1  # that of all_reduce, and nothing of its trace
        assert all(v for k, v in row.items() if k != "rank"), row


NESTED = """
found = {"right": True}

def step(x):
    with group.in_order():
        first = group.all_reduce(x)
        with group.in_order():
            second = group.all_reduce(x + 1)
            nothing = group.all_reduce(x[:0])
        third = group.all_reduce(x + 2)
    return third, nothing, second, first

x = torch.full((3,), 1.0).to(device)
for function in (step, replay(step)):
    for _ in range(20):
        third, nothing, second, first = (t.tolist() for t in function(x))
        got = first + second + third
        found["right"] &= nothing == [] and got == [size] * 3 + [2 * size] * 3 + [
            3 * size
        ] * 3
hlo = torch_xla._XLAC._get_xla_tensors_hlo(list(step(x)))
found["numbers"] = sorted(set(re.findall("[{ ]call = ([0-9]+)", hlo)))
try:
    group.all_gather(x, 1)
except IndexError as error:
    found["error"] = str(error)
found["gradients"] = []
for collective in (group.all_reduce, group.all_gather):
    try:
        collective(x.detach().requires_grad_())
    except RuntimeError as error:
        found["gradients"].append(str(error))
"""


def test_what_is_nested_or_empty_keeps_the_order(tmp_path):
    rows, err = finish(start(tmp_path, "import re\n" + NESTED))
    assert len(rows) == 2, err
    for row in rows:
        assert row["right"] and row["numbers"] == ["0", "1", "2", "3"]
        assert row["error"].startswith("processes: dim must be a dimension")
        assert len(row["gradients"]) == 2, row
        assert all("has no gradient: x requires one" in e for e in row["gradients"])


def test_a_full_folder_ends_no_process(monkeypatch):
    """Memory that is taken when it is written would end the one that writes."""
    path = processes.HostGroup.make_file(2)
    try:
        taken = 512 * os.stat(path).st_blocks
        assert taken >= os.path.getsize(path) > 2 << 20
    finally:
        os.unlink(path)

    def full(fd, start, length):
        raise OSError(28, "No space left on device")

    before = os.listdir("/dev/shm"), os.listdir(tempfile.gettempdir())
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left on device: '.*xla_ops_group_"):
        processes.HostGroup.make_file(2)
    assert before == (os.listdir("/dev/shm"), os.listdir(tempfile.gettempdir()))


def test_types_without_a_sum_or_a_gather():
    path = processes.HostGroup.make_file(1)
    try:
        group = processes.HostGroup(0, 1, path)
    finally:
        os.unlink(path)
    x = torch.ones(4).to(torch_xla.device())
    with pytest.raises(ValueError, match="x must be float32, .*, got torch.int64"):
        group.all_reduce(x.long())
    with pytest.raises(ValueError, match="x must not be complex, got torch.complex64"):
        group.all_gather(x.to(torch.complex64))
    assert torch.equal(group.all_gather(x.long()).cpu(), torch.ones(4).long())


DIES = """
step = replay(group.all_reduce)
x = torch.ones(4).to(device)
step(x).cpu()
found = {}
if rank == 1:
    os.kill(os.getpid(), 9)
start = time.monotonic()
try:
    step(x).cpu()
except RuntimeError as error:
    found = {"error": str(error), "after": time.monotonic() - start}
"""


def test_a_rank_that_dies_is_an_error_of_the_others(tmp_path):
    process = start(tmp_path, DIES)
    began = time.monotonic()
    rows, err = finish(process)
    assert time.monotonic() - began < 120
    assert process.returncode != 0
    assert f"{int(signal.SIGKILL)}" in err
    # torch.distributed.run may end it before it can say so.
    for row in rows:
        assert "rank 1 must live, got a process that has ended" in row["error"]
        assert row["after"] < 10


def test_set_ranks(tmp_path):
    body = """
environ = {}
processes.set_ranks(dist.group.WORLD, rank, size, environ)
found = environ
"""
    (first, second), _ = finish(start(tmp_path, body))
    assert first.pop("rank") == 0 and second.pop("rank") == 1
    ranks = {"RANK": "0", "LOCAL_RANK": "0"}
    same = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    port = first.pop("XLA_COORDINATOR_PORT")
    assert int(port) > 0 and second.pop("XLA_COORDINATOR_PORT") == port
    assert first == ranks | same
    assert second == dict.fromkeys(ranks, "1") | same


OTHER_PROGRAM = """
# What a GPU has; the CPU client, of one process, runs its programs too.
store = processes._make_store(dist.group.WORLD, rank, size)
group = processes.XlaGroup(rank, size, store)

def step(x):
    with group.in_order(), group.in_order():
        y = group.all_reduce(x) + group.all_reduce(x[:2]).sum()
        return group.all_gather(y) if DIFFERS else group.all_reduce(y)

def other(x):
    return step(x[:3])

x = torch.ones(4, 2).to(device)
error = None
try:
    for _ in range(3):
        for function in (step, other, replay(step)):
            function(x)
except RuntimeError as raised:
    error = str(raised)
dist.barrier()
found = {"error": error, "traced": len(group._traced)}
"""


@pytest.mark.parametrize("differs", ["False", "rank == 1", "rank == 1 and len(x) == 3"])
def test_a_rank_that_traces_another_program_is_named(differs, tmp_path):
    process = start(tmp_path, OTHER_PROGRAM.replace("DIFFERS", differs))
    rows, err = finish(process)
    errors = [row["error"] for row in rows if row["error"]]
    if differs == "False":
        assert [row["traced"] for row in rows] == [2, 2], err
        assert not errors
        return
    assert errors, err  # of whoever came last, or of both if at once
    rest = "[3, 2]" if "len" in differs else "[4, 2]"
    for error in errors:
        assert re.fullmatch(
            "processes: a program must have the same collectives on every rank, got"
            r" all_(reduce|gather in dimension 0) of float32\[., 2\] on rank [01] and"
            r" all_(reduce|gather in dimension 0) of float32\[., 2\] on rank [01], as"
            " number 2",
            error,
        )
        assert rest in error and "gather" in error and "reduce of" in error
