#!/usr/bin/env python3
"""What an all-reduce costs inside a program, by way, XLA's flags and rows.

    PJRT_DEVICE=GPU benchmarks/all_reduce.py --devices 2 --out FILE [--only NAME ...]

A program is 64 blocks: a norm, a product split by columns, one split by rows, and the
all-reduce behind it, as a transformer has them. `whole` does it on one device, `half`
one device's part of it without the all-reduce: what is above it is the all-reduce's.
`sharded` are tensors of one process, `ranks` a process a device. Each variant's result
is compared with `whole`'s before its time counts. Needs the installed wheel, and as
many GPUs.
"""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

BLOCKS, PAIRS = 64, 4
ROWS = (1, 64)
KERNELS = "--xla_gpu_experimental_use_collective_kernels=ALL_REDUCE"
SYNC = "--xla_gpu_disable_async_collectives=ALLREDUCE"
GRAPHS = "--xla_gpu_enable_command_buffer=+COLLECTIVES"
SYMMETRIC = (
    "--xla_gpu_enable_nccl_user_buffers=true"
    " --xla_gpu_experimental_enable_nccl_symmetric_buffers=true"
)
# torch_xla's all-reduce with the token that orders it, XLA's alone, and that of
# xla_ops.programs.processes.
RANKS = ("token", "bare", "group")
# By name: the way, and what is added to XLA_FLAGS.
VARIANTS = {
    "whole": ("whole", ""),
    "half": ("half", ""),
    "sharded": ("sharded", ""),
    "sharded, kernels": ("sharded", KERNELS),
    "sharded, sync": ("sharded", SYNC),
    "sharded, sync, kernels": ("sharded", f"{SYNC} {KERNELS}"),
    "sharded, sync, graphs": ("sharded", f"{SYNC} {GRAPHS}"),
    "sharded, sync, kernels, graphs": ("sharded", f"{SYNC} {KERNELS} {GRAPHS}"),
    "sharded, symmetric": ("sharded", SYMMETRIC),
    "ranks": ("group", ""),
    "ranks by XLA": ("token", ""),
    "ranks by XLA, no token": ("bare", ""),
    "ranks by XLA, no token, sync": ("bare", SYNC),
    "ranks by XLA, sync, kernels": ("bare", f"{SYNC} {KERNELS}"),
    "ranks by XLA, sync, kernels, graphs": ("bare", f"{SYNC} {KERNELS} {GRAPHS}"),
    "ranks by XLA, symmetric": ("bare", SYMMETRIC),
}


def child(way, devices, hidden, trace):
    import torch
    import torch.nn.functional as F
    import torch_xla
    import torch_xla.core.xla_model as xm
    import torch_xla.debug.profiler as xp
    import torch_xla.distributed.spmd as xs
    import torch_xla.runtime as xr

    import xla_ops
    from xla_ops.programs import processes
    from xla_ops.programs.replay import replay

    torch.set_grad_enabled(False)
    rank = 0
    if way == "sharded":
        xr.use_spmd()
        mesh = xs.get_1d_mesh("tp")
    elif way in RANKS:
        import torch.distributed as dist

        dist.init_process_group("gloo")
        group = processes.join(dist.group.WORLD)
        rank = group.rank

    def part(weight, dim):
        if way == "whole":
            return weight.to(torch_xla.device())
        if way == "sharded":
            weight = weight.to(torch_xla.device())
            xs.mark_sharding(weight, mesh, (None, "tp") if dim else ("tp", None))
            return weight
        return weight.chunk(devices, dim)[rank].contiguous().to(torch_xla.device())

    generator = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    weights = []
    for _ in range(PAIRS):
        for dim in (0, 1):  # [out, in]: columns of the product first, then rows
            weight = (make(hidden, hidden) * hidden**-0.5).bfloat16()
            weights.append(part(weight, dim))
    gain = torch.ones(hidden, dtype=torch.bfloat16, device=torch_xla.device())

    def reduced(x):
        if way == "token":
            return xm.all_reduce(xm.REDUCE_SUM, x)
        if way == "group":
            return group.all_reduce(x)
        if way == "bare":
            ranks = [list(range(devices))]
            return torch_xla._XLAC._xla_spmd_all_reduce("sum", x, 1.0, ranks)
        return x

    @replay
    def blocks(x, gain, *weights):
        with group.in_order() if way == "group" else contextlib.nullcontext():
            for i in range(BLOCKS):
                first, second = weights[2 * (i % PAIRS)], weights[2 * (i % PAIRS) + 1]
                normed = xla_ops.rms_norm(x, gain, 1e-6)
                x = reduced(F.linear(F.linear(normed, first), second))
            return x

    found = {}
    with contextlib.ExitStack() as context:
        if way == "sharded":
            context.enter_context(xla_ops.sharding(mesh, tokens=None, columns="tp"))
        for rows in ROWS:
            x = make(rows, hidden).bfloat16().to(torch_xla.device())
            out = blocks(x, gain, *weights)
            values = out.cpu().float().flatten()[:hidden].tolist()
            times = []
            for _ in range(4):
                xm.wait_device_ops()
                start = time.perf_counter()
                for _ in range(20):
                    out = blocks(x, gain, *weights)
                xm.wait_device_ops()
                times.append((time.perf_counter() - start) / 20)
            if trace and rank == 0 and rows == 1:
                xp.start_trace(trace)
                for _ in range(3):
                    out = blocks(x, gain, *weights)
                xm.wait_device_ops()
                xp.stop_trace()
            found[rows] = {"us_a_block": min(times) / BLOCKS * 1e6, "values": values}
    if rank == 0:
        pathlib.Path(os.environ["ALL_REDUCE_OUT"]).write_text(json.dumps(found))


def run(way, flags, devices, hidden, trace, timeout):
    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "found.json"
        command = [sys.executable, __file__, "--child", way]
        command += ["--devices", str(devices), "--hidden", str(hidden)]
        command += ["--trace", trace] if trace else []
        if way in RANKS:
            torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(devices)]
            command[1:1] = torchrun
        env = {**os.environ, "ALL_REDUCE_OUT": str(out)}
        env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} {flags}".strip()
        if way in ("whole", "half"):
            env["CUDA_VISIBLE_DEVICES"] = "0"
        process = subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        try:
            said, _ = process.communicate(timeout=timeout)
            why = f"exit status {process.returncode}"
        except subprocess.TimeoutExpired:
            process.terminate()
            said, _ = process.communicate()
            why = f"stopped after {timeout} s"
        if out.exists() and process.returncode == 0:
            return json.loads(out.read_text()), None
        return {}, f"{why}: ...{said.decode(errors='replace')[-1500:]}"


def error_of(values, expected):
    """Of the values, by their root mean square."""
    square = sum((a - b) ** 2 for a, b in zip(values, expected, strict=True))
    return (square / sum(b**2 for b in expected)) ** 0.5


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--devices", type=int, required=True)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--timeout", type=float, default=60, help="seconds a variant")
    parser.add_argument("--trace", help="a folder for one variant's device trace")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.devices, args.hidden, args.trace)
        return 0
    record = {"devices": args.devices, "hidden": args.hidden, "variants": {}}
    status = 0
    expected: dict = {}
    for name in args.only:
        way, flags = VARIANTS[name]
        start = time.perf_counter()
        found, failure = run(
            way, flags, args.devices, args.hidden, args.trace, args.timeout
        )
        line = f"{name:26}"
        for rows, result in found.items():
            values = result.pop("values")
            if way == "whole":
                expected[rows] = values
            elif way != "half" and rows in expected:
                result["error"] = error_of(values, expected[rows])
                if result["error"] > 0.1:
                    failure = f"error of {result['error']:.3f}"
            line += f" {rows} rows {result['us_a_block']:7.2f} us a block,"
        record["variants"][name] = found | ({"failure": failure} if failure else {})
        print(f"{line} {time.perf_counter() - start:.0f} s", failure or "", flush=True)
        status |= bool(failure)
        if args.out:
            args.out.write_text(json.dumps(record, indent=1))
    return status


if __name__ == "__main__":
    sys.exit(main())
