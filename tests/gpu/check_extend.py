#!/usr/bin/env python3
"""Runs vLLM's own CUDA operators inside XLA programs, by torch_op, beside ours.

    check_extend.py [--out results.json] [--quick] LIBRARY...

Needs a GPU, the wheel, torch with CUDA and vLLM's compiled libraries: _C.abi3.so and
_vllm_fa2_C.abi3.so, each by its path; an operator of one that is not given makes no
row. Values are compared, addresses of what is updated watched, and calls timed as the
difference of a long and a short replayed program, so that neither a program's cost nor
tracing is counted; what one more call costs to trace lazily stands beside it.

Each mode is a process of its own: "alone" (the operators on torch's CUDA tensors, with
no XLA in the process, to tell an environment in which they do not run), "plain",
"capturable" (declared so) and "captured" (the same with XLA's command buffers for
custom calls). A short table comes last. Exit status 1 where a row fails.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import xla_dump

MODES = ("alone", "plain", "capturable", "captured")
SHORT, LONG = 8, 108
TOKENS, HIDDEN = 64, 4096
BLOCKS, PAGE, HEADS, HEAD_DIM = 256, 16, 8, 128


def operator(torch, name: str):
    """The operator, or None where no library that was loaded has it."""
    namespace, _, op = name.partition("::")
    return getattr(getattr(torch.ops, namespace), op, None)


def microseconds(make, quick: bool) -> float:
    """What one more call costs in what `make(number of calls)` returns to be run."""

    def best(calls: int) -> float:
        run = make(calls)
        for _ in range(3):
            run()
        times = []
        for _ in range(3 if quick else 20):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    return (best(LONG) - best(SHORT)) / (LONG - SHORT) * 1e6


class Session:
    """The operators of one mode, and what is needed to check them."""

    def __init__(self, libraries: list[str], mode: str, quick: bool):
        import torch

        self.torch, self.quick = torch, quick
        self.dump = pathlib.Path(os.environ["CHECK_EXTEND_DUMP"])
        self.capturable = mode != "plain"
        self.is_alone = mode == "alone"
        if self.is_alone:
            self.device = torch.device("cuda")
        else:
            import torch_xla

            self.torch_xla = torch_xla
            self.device = torch_xla.device()
        torch.manual_seed(0)
        for library in libraries:
            torch.ops.load_library(library)

    def operator(self, name: str, **declared):
        """By torch_op, or as it is where there is no XLA."""
        if self.is_alone:
            return operator(self.torch, name)
        from xla_ops.extend import torch_op

        return torch_op(name, **declared)

    def sync(self) -> None:
        if self.is_alone:
            self.torch.cuda.synchronize()
        else:
            self.torch_xla.sync(wait=True)

    def put(self, t):
        return t.to(self.device)

    def address(self, t) -> int:
        self.sync()
        if self.is_alone:
            return t.data_ptr()
        return self.torch_xla._XLAC._unsafe_buffer_pointer(t)

    def times(self, step, *args) -> dict:
        """us a call of step(calls, *args), in a program and to trace."""

        def lazily(calls):
            def run():
                step(calls, *args)
                self.sync()

            return run

        if self.is_alone:
            return {"us": microseconds(lazily, self.quick)}
        from xla_ops.programs.replay import replay

        def replayed(calls):
            program = replay(lambda *args: step(calls, *args))

            def run():
                program(*args)
                self.torch_xla.sync()
                self.torch_xla._XLAC._xla_wait_device_ops(devices=[])

            return run

        for old in self.dump.glob("*"):
            old.unlink()
        us = microseconds(replayed, self.quick)
        texts = [path.read_text() for path in self.dump.glob("*thunk_sequence*.txt")]
        calls = xla_dump.launches(texts)  # of the longest program
        return {
            "us": us,
            "captured": calls["inside"] > 0 and calls["outside"] == 0,
            "lazily_us": microseconds(lazily, self.quick),
        }

    def error(self, actual, expected) -> float:
        return (actual.cpu().float() - expected.cpu().float()).abs().max().item()

    def rms_norm(self) -> dict:
        import xla_ops

        torch = self.torch
        theirs = self.operator(
            "_C::rms_norm", outputs=("result",), capturable=self.capturable
        )
        x = self.put(torch.randn(TOKENS, HIDDEN).bfloat16())
        weight = self.put(torch.rand(HIDDEN).bfloat16())

        def call(x, weight):
            out = torch.empty_like(x)
            theirs(out, x, weight, 1e-6)
            return out

        error = self.error(call(x, weight), xla_ops.rms_norm(x, weight, 1e-6))

        def chain(norm):
            def step(calls, y, weight):
                for _ in range(calls):
                    y = norm(y, weight)
                return y

            return self.times(step, x, weight)

        return {
            "error": error,
            "ok": error <= 0.04,  # one unit in the last place of bf16 at 4
            **chain(call),
            "ours": chain(lambda y, weight: xla_ops.rms_norm(y, weight, 1e-6)),
        }

    def reshape_and_cache_flash(self) -> dict:
        import xla_ops

        torch = self.torch
        theirs = self.operator(
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

        def write(op, calls, key, value, key_cache, value_cache, slots, scale):
            caches = (key_cache, value_cache)
            for _ in range(calls):
                op(key, value, *caches, slots, "auto", scale, scale)

        def arguments(caches):
            return (key, value, *caches, slots, scale)

        ours = xla_ops.reshape_and_cache_flash
        for _ in range(3):
            write(theirs, 1, *arguments(caches[:2]))
            write(ours, 1, *arguments(caches[2:]))
            self.sync()
        after = [self.address(t) for t in caches]
        error = self.error(torch.stack(caches[:2]), torch.stack(caches[2:]))
        return {
            "error": error,
            "in_place": before[:2] == after[:2],
            "ours_in_place": before[2:] == after[2:],
            "ok": error == 0 and before == after,
            **self.times(functools.partial(write, theirs), *arguments(caches[:2])),
            "ours": self.times(functools.partial(write, ours), *arguments(caches[2:])),
        }

    def varlen_fwd(self) -> dict:
        import xla_ops

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

        theirs = self.operator(name, outputs=("out",), meta=meta)  # it allocates
        q, k, v = (
            self.put(torch.randn(total, heads, HEAD_DIM).bfloat16())
            for heads in (32, HEADS, HEADS)
        )
        starts = [0]
        for length in lengths:
            starts.append(starts[-1] + length)
        starts = self.put(torch.tensor(starts, dtype=torch.int32))
        given = {
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

        def call(query, k, v, starts):
            out = torch.empty_like(query)
            tensors = dict(q=query, k=k, v=v, out=out)
            tensors |= dict(cu_seqlens_q=starts, cu_seqlens_k=starts)
            values = given | tensors
            theirs(*(values.get(a.name) for a in arguments))
            return out

        def ours(query, k, v, starts):
            return xla_ops.flash_attn_varlen(
                query, k, v, starts, starts, longest, longest, is_causal=True
            )[0]

        error = self.error(call(q, k, v, starts), ours(q, k, v, starts))

        def chain(attend):
            def step(calls, y, *rest):
                for _ in range(calls):
                    y = attend(y, *rest)
                return y

            return self.times(step, q, k, v, starts)

        return {
            "error": error,
            "ok": error <= 0.04,
            **chain(call),
            "ours": chain(ours),
        }


CASES = {
    "rms_norm": "_C::rms_norm",
    "reshape_and_cache_flash": "_C_cache_ops::reshape_and_cache_flash",
    "varlen_fwd": "_vllm_fa2_C::varlen_fwd",
}


def child(options: argparse.Namespace) -> int:
    faulthandler.enable()  # an operator that is not ours may end the process
    session = Session(options.libraries, options.mode, options.quick)
    rows = {}
    for case, name in CASES.items():
        if operator(session.torch, name) is None:
            continue
        try:
            row = getattr(session, case)()
        except Exception as error:  # noqa: BLE001 - the other rows count too
            traceback.print_exc()
            text = " ".join(str(error).split())
            row = {"ok": False, "failure": f"{type(error).__name__}: {text}"[:300]}
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
    print(f" {'captured':>8} {'us':>8} {'lazily':>8} {'ours':>8} {'lazily':>8}")
    for mode, rows in results.items():
        for case, row in rows.items():
            if "failure" in row:
                print(f"{case:24} {mode:10} {row['failure']}")
                continue
            figures = (
                which.get(key, float("nan"))
                for which in (row, row["ours"])
                for key in ("us", "lazily_us")
            )
            print(
                f"{case:24} {mode:10} {row['error']:9.2g}"
                f" {row.get('in_place', '-')!s:>8} {row.get('captured', '-')!s:>8} "
                + " ".join(f"{figure:8.2f}" for figure in figures)
                + ("" if row["ok"] else "  WRONG")
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
