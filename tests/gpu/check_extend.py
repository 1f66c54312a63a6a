#!/usr/bin/env python3
"""Runs vLLM's own CUDA operators inside XLA programs, by torch_op, beside ours.

    check_extend.py [--out results.json] [--quick] LIBRARY...

Needs a GPU, the wheel, torch with CUDA and vLLM's compiled libraries: _C.abi3.so and
_vllm_fa2_C.abi3.so, each by its path; an operator of one that is not given makes no
row. Values are compared, addresses of what is updated watched, and calls timed as the
difference of a long and a short program, so that what a program costs is not counted.

Each mode is a process of its own: "plain", "capturable" (declared so) and "captured"
(the same with XLA's command buffers for custom calls). A short table comes last. Exit
status 1 where a row fails.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
import traceback

MODES = ("plain", "capturable", "captured")
SHORT, LONG = 8, 108
TOKENS, HIDDEN = 64, 4096
BLOCKS, PAGE, HEADS, HEAD_DIM = 256, 16, 8, 128


def operator(torch, name: str):
    """The operator, or None where no library that was loaded has it."""
    namespace, _, op = name.partition("::")
    return getattr(getattr(torch.ops, namespace), op, None)


def microseconds(run, quick: bool) -> float:
    """What one more call costs in a program of `run(number of calls)`."""

    def best(calls: int) -> float:
        for _ in range(3):
            run(calls)
        times = []
        for _ in range(3 if quick else 20):
            start = time.perf_counter()
            run(calls)
            times.append(time.perf_counter() - start)
        return min(times)

    return (best(LONG) - best(SHORT)) / (LONG - SHORT) * 1e6


class Session:
    """The operators of one mode, and what is needed to check them."""

    def __init__(self, libraries: list[str], mode: str, quick: bool):
        import torch
        import torch_xla

        self.torch, self.torch_xla, self.quick = torch, torch_xla, quick
        self.capturable = mode != "plain"
        self.device = torch_xla.device()
        torch.manual_seed(0)
        for library in libraries:
            torch.ops.load_library(library)

    def sync(self) -> None:
        self.torch_xla.sync(wait=True)

    def put(self, t):
        return t.to(self.device)

    def address(self, t) -> int:
        self.sync()
        return self.torch_xla._XLAC._unsafe_buffer_pointer(t)

    def error(self, actual, expected) -> float:
        return (actual.cpu().float() - expected.cpu().float()).abs().max().item()

    def rms_norm(self) -> dict:
        import xla_ops
        from xla_ops.extend import torch_op

        torch = self.torch
        theirs = torch_op(
            "_C::rms_norm", outputs=("result",), capturable=self.capturable
        )
        x = self.put(torch.randn(TOKENS, HIDDEN).bfloat16())
        weight = self.put(torch.rand(HIDDEN).bfloat16())

        def call(x):
            out = torch.empty_like(x)
            theirs(out, x, weight, 1e-6)
            return out

        error = self.error(call(x), xla_ops.rms_norm(x, weight, 1e-6))

        def chain(norm, calls):
            y = x
            for _ in range(calls):
                y = norm(y)
            self.sync()

        return {
            "error": error,
            "ok": error <= 0.04,  # one unit in the last place of bf16 at 4
            "us": microseconds(lambda n: chain(call, n), self.quick),
            "ours_us": microseconds(
                lambda n: chain(lambda y: xla_ops.rms_norm(y, weight, 1e-6), n),
                self.quick,
            ),
        }

    def reshape_and_cache_flash(self) -> dict:
        import xla_ops
        from xla_ops.extend import torch_op

        torch = self.torch
        theirs = torch_op(
            "_C_cache_ops::reshape_and_cache_flash", capturable=self.capturable
        )
        shape = (BLOCKS, PAGE, HEADS, HEAD_DIM)
        caches = [self.put(torch.zeros(shape).bfloat16()) for _ in range(4)]
        key, value = (
            self.put(torch.randn(TOKENS, HEADS, HEAD_DIM).bfloat16()) for _ in range(2)
        )
        slots = self.put(torch.randperm(BLOCKS * PAGE)[:TOKENS])
        scale = self.put(torch.ones(1))
        before = [self.address(t) for t in caches]

        def write(op, pair, calls):
            for _ in range(calls):
                op(key, value, *pair, slots, "auto", scale, scale)
            self.sync()

        ours = xla_ops.reshape_and_cache_flash
        for _ in range(3):
            write(theirs, caches[:2], 1)
            write(ours, caches[2:], 1)
        after = [self.address(t) for t in caches]
        error = max(self.error(caches[i], caches[i + 2]) for i in range(2))
        return {
            "error": error,
            "in_place": before[:2] == after[:2],
            "ours_in_place": before[2:] == after[2:],
            "ok": error == 0,
            "us": microseconds(lambda n: write(theirs, caches[:2], n), self.quick),
            "ours_us": microseconds(lambda n: write(ours, caches[2:], n), self.quick),
        }

    def varlen_fwd(self) -> dict:
        import xla_ops
        from xla_ops.extend import torch_op

        torch = self.torch
        lengths = [17, 40, 7]
        total, longest = sum(lengths), max(lengths)
        name = "_vllm_fa2_C::varlen_fwd"
        arguments = operator(torch, name).default._schema.arguments
        places = {a.name: i for i, a in enumerate(arguments)}

        def meta(*args):  # it returns [out, softmax_lse]
            q, out = args[places["q"]], args[places["out"]]
            lse = torch.empty((q.shape[1], q.shape[0]), device="meta")
            return [out, lse]

        theirs = torch_op(name, outputs=("out",), meta=meta)  # it allocates
        q, k, v = (
            self.put(torch.randn(total, heads, HEAD_DIM).bfloat16())
            for heads in (32, HEADS, HEADS)
        )
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        starts = self.put(torch.tensor(starts, dtype=torch.int32))
        given = {
            "q": q,
            "k": k,
            "v": v,
            "cu_seqlens_q": starts,
            "cu_seqlens_k": starts,
            "max_seqlen_q": longest,
            "max_seqlen_k": longest,
            "p_dropout": 0.0,
            "softmax_scale": HEAD_DIM**-0.5,
            "zero_tensors": False,
            "is_causal": True,
            "window_size_left": -1,
            "window_size_right": 0,
            "softcap": 0.0,
            "return_softmax": False,
            "num_splits": 0,
        }

        def call(query):
            out = torch.empty_like(query)
            values = given | {"q": query, "out": out}
            theirs(*(values.get(a.name) for a in arguments))
            return out

        def ours(query):
            return xla_ops.flash_attn_varlen(
                query, k, v, starts, starts, longest, longest, is_causal=True
            )[0]

        error = self.error(call(q), ours(q))

        def chain(attend, calls):
            y = q
            for _ in range(calls):
                y = attend(y)
            self.sync()

        return {
            "error": error,
            "ok": error <= 0.04,
            "us": microseconds(lambda n: chain(call, n), self.quick),
            "ours_us": microseconds(lambda n: chain(ours, n), self.quick),
        }


CASES = {
    "rms_norm": "_C::rms_norm",
    "reshape_and_cache_flash": "_C_cache_ops::reshape_and_cache_flash",
    "varlen_fwd": "_vllm_fa2_C::varlen_fwd",
}


def captured(dump: pathlib.Path) -> bool:
    """Whether a program that XLA compiled has calls of torch_op in a command buffer."""
    for file in dump.glob("*after_optimizations.txt"):
        for computation in re.split(r"\n\n", file.read_text()):
            head = computation.lstrip().split("\n", 1)[0]
            if "command_buffer" in head and "xla_ops.torch_op" in computation:
                return True
    return False


def child(options: argparse.Namespace) -> int:
    dump = pathlib.Path(os.environ["CHECK_EXTEND_DUMP"])
    session = Session(options.libraries, options.mode, options.quick)
    rows = {}
    for case, name in CASES.items():
        if operator(session.torch, name) is None:
            continue
        for old in dump.glob("*"):
            old.unlink()
        try:
            row = getattr(session, case)()
        except Exception as error:  # noqa: BLE001 - the other rows count too
            traceback.print_exc()
            text = " ".join(str(error).split())
            row = {"ok": False, "failure": f"{type(error).__name__}: {text}"[:300]}
        row["captured"] = captured(dump)
        rows[case] = row
        pathlib.Path(options.out).write_text(json.dumps(rows))
    return 0


def run_mode(options: argparse.Namespace, mode: str, folder: pathlib.Path) -> dict:
    dump = folder / "dump"
    dump.mkdir(parents=True)
    out = folder / "rows.json"
    flags = f"--xla_dump_to={dump} --xla_dump_hlo_as_text"
    if mode == "captured":
        flags += " --xla_gpu_enable_command_buffer=+CUSTOM_CALL"
    command = [sys.executable, __file__, f"--mode={mode}", f"--out={out}"]
    command += ["--quick"] * options.quick + options.libraries
    environment = {
        "PJRT_DEVICE": "GPU",
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip(),
        "CHECK_EXTEND_DUMP": str(dump),
    }
    try:
        status = subprocess.run(
            command, check=False, env=environment, timeout=400
        ).returncode
    except subprocess.TimeoutExpired:
        status = -1
    rows = json.loads(out.read_text()) if out.exists() else {}
    if status != 0 or not rows:
        rows["process"] = {"ok": False, "failure": f"exit status {status}"}
    return rows


def show(results: dict) -> None:
    print(f"\n{'operator':24} {'mode':10} {'error':>9} {'in place':>8}", end="")
    print(f" {'captured':>8} {'us':>8} {'ours us':>8}")
    for mode, rows in results.items():
        for case, row in rows.items():
            if "failure" in row:
                print(f"{case:24} {mode:10} {row['failure']}")
                continue
            print(
                f"{case:24} {mode:10} {row['error']:9.2g}"
                f" {row.get('in_place', '-')!s:>8} {row['captured']!s:>8}"
                f" {row['us']:8.2f} {row['ours_us']:8.2f}"
                f"{'' if row['ok'] else '  WRONG'}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("libraries", nargs="+", metavar="LIBRARY")
    parser.add_argument("--out", help="JSON file; else extend.json in $OUT, if set")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--mode", choices=MODES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode:
        return child(options)
    if not options.out and "OUT" in os.environ:
        options.out = os.path.join(os.environ["OUT"], "extend.json")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for mode in MODES:
            results[mode] = run_mode(options, mode, pathlib.Path(folder) / mode)
            if options.out:
                pathlib.Path(options.out).write_text(json.dumps(results, indent=1))
    show(results)
    rows = [row for rows in results.values() for row in rows.values()]
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
