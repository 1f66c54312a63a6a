#!/usr/bin/env python3
"""Checks several processes, one a GPU, that compute together over NCCL.

    check_processes.py --out results.json [--processes 2] [--only PART ...]

Needs as many GPUs, torch_xla and the wheel. Parts:

  torchrun     collectives by themselves, and a tensor-parallel step (KV write,
               attention over a part of the heads, row-parallel product, all-reduce):
               lazily, by both backends of torch.compile and by replay; values against
               one process's, and ms a step
  two_hosts    the collectives, by processes that believe to be on hosts of their own
  dead         one rank dies: the others have to end, within the time that is set
  dead_peers   the same, where the others wait for it in a call through the GPUs' memory
  absent       one rank never starts: the same

Exit status 1 if a part fails.
"""

import argparse
import json
import os
import pathlib
import signal
import socket
import statistics
import subprocess
import sys
import time

import torch

PARTS = ("torchrun", "two_hosts", "dead", "dead_peers", "absent")
TIMEOUT_S = 20  # of a stuck collective, in the parts dead and absent


# ---------------------------------------------------------------- within a rank


def functional(name, x, world):
    """The collective in a form that torch.compile traces."""
    import torch.distributed as dist
    import torch.distributed._functional_collectives as funcol

    group = dist.group.WORLD
    if name == "all_reduce":
        return funcol.all_reduce(x, "sum", group)
    if name == "all_gather":
        return funcol.all_gather_tensor(x, 0, group)
    if name == "reduce_scatter":
        return funcol.reduce_scatter_tensor(x, "sum", 0, group)
    sizes = [x.shape[0] // world] * world
    return funcol.all_to_all_single(x, sizes, sizes, group)


def collectives(rank, world):
    """By name: how torch_xla spells it, and what rank `rank` gets."""
    import torch_xla.core.xla_model as xm

    whole = torch.arange(world * 2 * world * 3, dtype=torch.float32)
    whole = whole.view(world, 2 * world, 3)  # what each rank gives
    part = slice(2 * rank, 2 * rank + 2)
    pairs = [[i, (i + 1) % world] for i in range(world)]
    return whole[rank], {
        "all_reduce": (lambda x: xm.all_reduce(xm.REDUCE_SUM, x), whole.sum(0)),
        "all_gather": (lambda x: xm.all_gather(x, dim=0), whole.flatten(0, 1)),
        "reduce_scatter": (
            lambda x: xm.reduce_scatter(xm.REDUCE_SUM, x, 1.0, 0, world),
            whole.sum(0)[part],
        ),
        "all_to_all": (
            lambda x: xm.all_to_all(x, 0, 0, world),
            whole[:, part].flatten(0, 1),
        ),
        "collective_permute": (
            lambda x: xm.collective_permute(x, pairs),
            whole[(rank - 1) % world],
        ),
    }


def check_collectives(rank, world):
    import torch_xla

    from xla_ops.programs.replay import replay

    given, cases = collectives(rank, world)
    x = given.to(torch_xla.device())
    found = {}

    def check(name, how, function, expected):
        start = time.perf_counter()
        try:
            with torch.no_grad():
                for _ in range(2):
                    got = function(x)
                    torch_xla.sync()
                right = torch.equal(got.cpu(), expected)
            found[f"{name}, {how}"] = "right" if right else f"wrong: {got.cpu()}"
        except Exception as error:  # noqa: BLE001 - it is the finding
            found[f"{name}, {how}"] = f"{type(error).__name__}: {str(error)[:300]}"
        found[f"{name}, {how}"] += f" ({time.perf_counter() - start:.1f} s)"

    for name, (function, expected) in cases.items():
        check(name, "lazily", function, expected)
        check(name, "replay", replay(function), expected)
        if name == "collective_permute":
            continue  # torch has no such collective that Dynamo traces
        for backend in ("openxla", "xla_ops"):
            compiled = torch.compile(
                lambda x, name=name: functional(name, x, world), backend=backend
            )
            check(name, backend, compiled, expected)
    return found


def check_step(rank, world):
    """A tensor-parallel step: each rank has a part of the heads."""
    import torch_xla
    import torch_xla.core.xla_model as xm
    import torch_xla.debug.metrics as met

    import xla_ops
    from xla_ops.programs.replay import replay

    heads, kv_heads, dim, blocks, size, batch, context = 32, 8, 128, 512, 16, 8, 500
    make = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=make).to(torch.bfloat16)

    q, k, v = (normal(batch, n, dim) for n in (heads, kv_heads, kv_heads))
    cache = normal(2, blocks, size, kv_heads, dim)
    weight = normal(heads * dim, 4096) * 0.02
    pages = -(-context // size)
    tables = torch.randperm(blocks, generator=make)[: batch * pages]
    tables = tables.view(batch, pages).to(torch.int32)
    lens = torch.full((batch,), context, dtype=torch.int32)
    last = tables[:, (context - 1) // size].to(torch.int64)
    slots = last * size + (context - 1) % size
    starts = torch.arange(batch + 1, dtype=torch.int32)
    count = torch.tensor([batch], dtype=torch.int32)

    def step(q, k, v, cache, weight, lens, tables, slots, starts, count):
        xla_ops.reshape_and_cache_flash(k, v, *cache.unbind(0), slots)
        out = xla_ops.paged_attention(q, cache, lens, tables, starts, count, dim**-0.5)
        return out.reshape(batch, -1) @ weight

    rest = (lens, tables, slots, starts, count)
    expected = step(*(t.float() for t in (q, k, v, cache.clone(), weight)), *rest)
    mine = slice(rank * heads // world, (rank + 1) * heads // world)
    my_kv = slice(rank * kv_heads // world, (rank + 1) * kv_heads // world)
    rows = slice(rank * heads * dim // world, (rank + 1) * heads * dim // world)
    parts = (q[:, mine], k[:, my_kv], v[:, my_kv], cache[:, :, :, my_kv], weight[rows])
    args = [t.contiguous().to(torch_xla.device()) for t in (*parts, *rest)]

    def summed(*args):
        return xm.all_reduce(xm.REDUCE_SUM, step(*args))

    def synced(*args):
        out = summed(*args)
        torch_xla.sync()
        return out

    found = {}
    for how, function in (
        ("lazily, a sync a step", synced),
        ("lazily, no sync", summed),
        ("openxla", torch.compile(summed, backend="openxla")),
        ("xla_ops", torch.compile(summed, backend="xla_ops")),
        ("replay", replay(summed)),
    ):
        repeats = 5 if how == "lazily, no sync" else 50
        with torch.no_grad():
            start = time.perf_counter()
            out = function(*args).cpu()
            first = time.perf_counter() - start
            error = float((out.float() - expected).norm() / expected.norm())
            function(*args).cpu()
            torch_xla.sync()  # the cache's part of a lazy step too
            xm.wait_device_ops()
            compiled = met.counter_value("UncachedCompile") or 0
            where = torch_xla._XLAC._unsafe_buffer_pointer(args[3])
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                function(*args).cpu()
                times.append(time.perf_counter() - start)
        torch_xla.sync()
        xm.wait_device_ops()
        found[how] = {
            "error": error,
            "ms": statistics.median(times) * 1e3,
            "first_s": first,
            "compiled": (met.counter_value("UncachedCompile") or 0) - compiled,
            "cache_stays": where == torch_xla._XLAC._unsafe_buffer_pointer(args[3]),
        }
    return found


def die_beside_a_peer(rank, world):
    import torch.distributed as dist
    import torch_xla

    from xla_ops.programs import processes
    from xla_ops.programs.replay import replay

    group = processes.join(dist.new_group(backend="gloo"))
    assert isinstance(group, processes.PeerGroup), "the GPUs do not reach each other"

    @replay
    def step(x):
        with group.in_order():
            return group.all_reduce(x)

    x = torch.ones(4).to(torch_xla.device())
    assert step(x).cpu().tolist() == [world] * 4
    if rank == world - 1:
        os._exit(7)
    time.sleep(2)
    print("waits for the dead rank", flush=True)
    step(x).cpu()
    print(f"rank {rank} got a value", flush=True)


def run_rank(part, out):
    import torch.distributed as dist
    import torch_xla.distributed.xla_backend
    import torch_xla.runtime as xr

    print("waits for the other ranks", flush=True)
    dist.init_process_group("xla", init_method="xla://")
    rank, world = xr.global_ordinal(), xr.world_size()
    found = {"rank": rank, "world": world}
    if part == "dead":
        import torch_xla
        import torch_xla.core.xla_model as xm

        x = torch.ones(4).to(torch_xla.device())
        xm.all_reduce(xm.REDUCE_SUM, x).cpu()  # both are there
        torch_xla.sync()
        if rank == world - 1:
            os._exit(7)
        time.sleep(2)
        print("waits for the dead rank", flush=True)
        xm.all_reduce(xm.REDUCE_SUM, x + 1).cpu()
        print(f"rank {rank} got a value", flush=True)
        return
    if part == "dead_peers":
        die_beside_a_peer(rank, world)
        return
    found["collectives"] = check_collectives(rank, world)
    if part == "torchrun":
        found["step"] = check_step(rank, world)
    pathlib.Path(f"{out}.{rank}").write_text(json.dumps(found))


# -------------------------------------------------------------------- launching


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def command(part, out):
    return [sys.executable, __file__, "--rank-of", part, "--out", str(out)]


def start(arguments, log, environ=None):
    """Starts a process, and what it starts, in a group of its own."""
    with open(log, "w") as file:
        return subprocess.Popen(
            arguments,
            start_new_session=True,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environ or {})},
        )


def wait(processes, seconds):
    """Exit statuses; None of those that had to be killed after `seconds`."""
    end = time.monotonic() + seconds
    statuses = []
    for process in processes:
        try:
            statuses.append(process.wait(max(0.1, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            statuses.append(None)
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return statuses


def ranks(part, out, processes, started, environ, *, one_host=False):
    """Starts ranks that are each alone on their host, with a GPU of their own, or
    all on one."""
    port = str(free_port())

    def place(rank):
        if one_host:
            return {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes)}
        alone = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        return alone | {"GROUP_RANK": str(rank), "CUDA_VISIBLE_DEVICES": str(rank)}

    return [
        start(
            command(part, out),
            f"{out}.{part}.{rank}.log",
            {
                **environ,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "TORCHELASTIC_RUN_ID": "none",
                "RANK": str(rank),
                "WORLD_SIZE": str(processes),
                **place(rank),
            },
        )
        for rank in range(started)
    ]


def results(out, processes):
    found = []
    for rank in range(processes):
        path = pathlib.Path(f"{out}.{rank}")
        found.append(json.loads(path.read_text()) if path.exists() else None)
        path.unlink(missing_ok=True)
    return found


def is_right(rank_results):
    for found in rank_results:
        if found is None:
            return False
        values = found["collectives"].values()
        steps = found.get("step", {}).values()
        if not all(value.startswith("right") for value in values):
            return False
        if not all(step["error"] < 0.02 and step["cache_stays"] for step in steps):
            return False
    return True


def run_part(part, out, processes):
    began = time.monotonic()
    if part == "torchrun":
        launcher = start(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                f"--nproc_per_node={processes}",
                f"--master_port={free_port()}",
                *command(part, out)[1:],
            ],
            f"{out}.torchrun.log",
        )
        statuses = wait([launcher], 240)
    elif part == "two_hosts":
        statuses = wait(ranks(part, out, processes, processes, {}), 150)
    else:
        flags = f"--xla_gpu_nccl_termination_timeout_seconds={TIMEOUT_S}"
        flags = {
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
            "XLA_OPS_JOIN_TIMEOUT_S": str(TIMEOUT_S),
        }
        count = processes - (part == "absent")
        one_host = part == "dead_peers"
        running = ranks(part, out, processes, count, flags, one_host=one_host)
        statuses = wait(running, 150)
    found = {"statuses": statuses, "seconds": time.monotonic() - began}
    if part in ("dead", "dead_peers", "absent"):
        log = pathlib.Path(f"{out}.{part}.0.log").read_text()
        last = "the other ranks" if part == "absent" else "the dead rank"
        found["right"] = (
            None not in statuses and 0 not in statuses and f"waits for {last}" in log
        )
        found["said"] = [line[:300] for line in log.splitlines()[-6:]]
    else:
        found["ranks"] = results(out, processes)
        found["right"] = is_right(found["ranks"])
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rank-of", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_of:
        run_rank(args.rank_of, args.out)
        return 0
    record = {}
    for part in args.only:
        record[part] = run_part(part, args.out, args.processes)
        args.out.write_text(json.dumps(record, indent=1))
        print(part, json.dumps(record[part])[:4000], flush=True)
    return 0 if all(found["right"] for found in record.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
