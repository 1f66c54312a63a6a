#!/usr/bin/env python3
"""Checks kernels that users bring (xla_ops.extend) and times their launches.

    check_user_kernels.py [--out results.json] [--cpu] [--no-triton] [--no-time]

Needs torch_xla, the wheel, a GPU, the packages cuda-bindings and nvidia-cuda-nvrtc of
the driver's CUDA, and Triton. First values, on XLA tensors lazily and by both backends
of torch.compile: cuda_kernel (functional, in place, several results, every kind of
number, dynamic shared memory, clusters) and triton_kernel (autotuned, in place, shared
memory); that what is written keeps its address; and what a call that cannot be raises.

Then the time of a small kernel's launch: bare, by the driver, and in XLA programs of
many, beside an op of this package, with command buffers and without; and what it costs
the host to trace a call lazily. --cpu checks the program itself, with the references.
Exit status 1 if a check fails.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import traceback
import warnings

import torch
import torch_xla
import torch_xla.core.xla_model as xm

sys.path.append(str(pathlib.Path(__file__).resolve().parents[2] / "benchmarks"))

import user_kernels_cases as cases
import xla_dump
import xla_ops
from xla_ops.extend import launch, nvrtc

BACKENDS = {"lazy": None, "openxla": "openxla", "xla_ops": "xla_ops"}
LAUNCHES = 200  # in a timed program
SIZE = 4096  # elements of what is timed: the time is that of a launch


def run(f, how, *args):
    """Calls f on an XLA device, on copies; returns results and arguments on the CPU."""
    args = [a.clone().to("xla") if isinstance(a, torch.Tensor) else a for a in args]
    backend = BACKENDS[how]
    torch_xla.sync()
    results = (torch.compile(f, backend=backend) if backend else f)(*args)
    torch_xla.sync()
    results = results if isinstance(results, tuple) else (results,)
    host = lambda v: v.cpu() if isinstance(v, torch.Tensor) else v  # noqa: E731
    return [host(r) for r in results], [host(a) for a in args]


def close(got, want, tolerance=0.0):
    assert got.dtype == want.dtype and got.shape == want.shape, (got, want)
    wrong = (got.double() - want.double()).abs() > tolerance
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} are wrong"


# ---------------------------------------------------------------- values


def check_functional(how):
    x = torch.randn(1000, 77)
    (got,), (after, _) = run(cases.scale, how, x, 0.5)
    close(got, 0.5 * x)
    close(after, x)


def check_dtypes(how):
    for dtype in cases.C_TYPES:
        x, y = torch.randint(-99, 99, (2, 5000)).to(dtype)
        (total, difference), _ = run(cases.both, how, x, y)
        close(total, x + y)
        close(difference, x - y)


def check_numbers(how):
    x = torch.tensor([3.25])
    (got,), _ = run(cases.numbers, how, x)
    close(got, cases._numbers(x))


def check_shared_memory(how):
    for columns in (1000, 50000):  # 200 KB
        x = torch.randn(9, columns)
        (got,), _ = run(cases.reverse, how, x)
        close(got, x.flip(-1))


def check_clusters(how):
    (got,), _ = run(cases.clusters, how, torch.zeros(8, dtype=torch.int32))
    close(got, torch.full((8,), 4, dtype=torch.int32))


def check_several_written(how):
    a, x, y = torch.tensor([2.0]), torch.randn(33), torch.randn(33)
    (z,), (_, new_x, new_y) = run(cases.two, how, a, x, y)
    close(new_x, x + 2)
    close(new_y, y - 2)
    close(z, new_x * new_y)


def check_in_place(how, kernel=None, cpu=False):
    """A value, and that the buffer stays where it was, among several."""
    kernel = kernel or cases.scale_

    def step(tensors):
        for t in tensors:
            kernel(t, 2.0)
        return tensors[0].sum()

    x = torch.randint(99, (8, 3000)).float()
    tensors = [row.clone().to("xla") for row in x]
    torch_xla.sync()
    xm.wait_device_ops()
    address = torch_xla._XLAC._unsafe_buffer_pointer
    before = [address(t) for t in tensors]
    backend = BACKENDS[how]
    f = torch.compile(step, backend=backend) if backend else step
    for _ in range(3):
        f(tensors)
        torch_xla.sync()
    xm.wait_device_ops()
    after = [address(t) for t in tensors]
    close(torch.stack([t.cpu() for t in tensors]), 8 * x)
    stayed = sum(a == b for a, b in zip(before, after, strict=True))
    assert cpu or stayed == len(tensors), f"{stayed} of {len(tensors)} stayed"


def check_views(how):
    x = torch.randint(99, (6, 40)).float()
    _, (after, *_) = run(lambda x: cases.scale_(x[1:3], 2.0), how, x)
    want = x.clone()
    want[1:3] *= 2
    close(after, want)


def check_triton_add(how):
    import user_kernels_triton as tk

    for n in (1, 16, 1000, 100000):
        x, y = torch.randint(-99, 99, (2, n)).float()
        (got,), _ = run(tk.add, how, x, y, 0.5)
        close(got, x + 0.5 * y)


def check_triton_softmax(how):
    import user_kernels_triton as tk

    for rows, columns in ((1, 5), (100, 1000), (64, 16384)):
        x = torch.randn(rows, columns)
        (got,), _ = run(tk.softmax, how, x)
        close(got, torch.softmax(x.double(), -1).float(), 1e-6)


def check_triton_product(how):
    import user_kernels_triton as tk

    x, y = torch.randint(-9, 9, (2, 64, 64)).to(torch.float16)
    (got,), _ = run(tk.product, how, x, y)
    close(got, x.float() @ y.float())


def check_triton_in_place(how, cpu=False):
    import user_kernels_triton as tk

    check_in_place(how, tk.scale_, cpu)


def raises(text, f, *args):
    try:
        f(*args)
        torch_xla.sync()
        xm.wait_device_ops()
    except (ValueError, RuntimeError) as error:
        found = str(error)
    else:
        found = "nothing"
    assert text in found, f"{text!r} must be raised, got {found}"


def check_errors(how, cpu=False):
    if how != "lazy":
        return
    x = torch.ones(4, 4, device="xla")
    raises(
        "must be float32, as the kernel has float*, got int32",
        cases.scale,
        x.int(),
        1.0,
    )
    raises("too_much_shared: shared_bytes must be", cases.too_much_shared, x)
    if cpu:
        return
    bad = xla_ops.extend.cuda_kernel(
        "__global__ void bad(float* x) { x[0] = y; }", "bad", "(Tensor(a!) x) -> ()",
        grid=1, block=1)  # fmt: skip
    raises("bad: source must compile for sm_", bad, x)
    registers = xla_ops.extend.cuda_kernel(
        "__global__ void __launch_bounds__(64) few(float* x) { x[0] = 1; }", "few",
        "(Tensor(a!) x) -> ()", grid=1, block=128)  # fmt: skip
    # The handler knows it; what a program fails with is seen by who reads a result.
    text = "few: block must have at most 64 threads"
    raises(text, lambda: (registers(x), x.cpu()))


def check_guards(how, cpu=False):
    """Debug mode tells of writes outside; once, since the error is of the program."""
    if how != "lazy":
        return
    wild = xla_ops.extend.cuda_kernel(
        "__global__ void wild(float* out) { out[threadIdx.x] = 1; }", "wild",
        "(Tensor x) -> Tensor", parameters=lambda x, out: (out,), grid=1, block=33,
        reference=torch.ones_like)  # fmt: skip
    xla_ops.set_debug(True)
    try:
        x = torch.ones(32, device="xla")
        close(cases.scale(x, 2.0).cpu(), torch.full((32,), 2.0))
        if not cpu:
            text = "got 4 bytes changed behind its end, the first at 0"
            raises(text, lambda: wild(x).cpu())
    finally:
        xla_ops.set_debug(False)


def save(results, options):
    if options.out:
        with open(options.out, "w") as file:
            json.dump(results, file, indent=1)


def checks(options):
    found = [check_functional, check_dtypes, check_numbers, check_shared_memory]
    found += [check_clusters, check_several_written, check_in_place, check_views]
    if not options.no_triton:
        found += [check_triton_add, check_triton_softmax, check_triton_product]
        found += [check_triton_in_place]
    return found


def run_checks(found, options, results):
    for check in found:
        for how in BACKENDS:
            results["cases"] += 1
            takes_cpu = (
                "cpu" in check.__code__.co_varnames[: check.__code__.co_argcount]
            )
            more = {"cpu": options.cpu} if takes_cpu else {}
            torch._dynamo.reset()
            start = time.time()
            try:
                check(how, **more)
            except Exception:  # noqa: BLE001 - reported, and the exit status
                text = f"{check.__name__} {how}: {traceback.format_exc()}"
                print("FAIL", text[-1500:], flush=True)
                results["failures"].append(text)
            else:
                took = time.time() - start
                print(f"ok   {check.__name__} {how} {took:.1f} s", flush=True)
            save(results, options)  # an error of a program may end the process


# ---------------------------------------------------------------- time


def bare_launch():
    """Microseconds of the same kernel by the driver alone: host, and device."""
    import ctypes

    from cuda.bindings import driver

    def checked(answer):
        result, *values = answer
        assert result.value == 0, result
        return values[0] if len(values) == 1 else values

    checked(driver.cuInit(0))
    context = checked(driver.cuDevicePrimaryCtxRetain(checked(driver.cuDeviceGet(0))))
    checked(driver.cuCtxSetCurrent(context))
    architecture = nvrtc.architecture(launch.machine().capability)
    code = nvrtc.compile_source("scale", cases.SCALE, "scale", architecture)
    library = checked(driver.cuLibraryLoadData(code.image, [], [], 0, [], [], 0))
    kernel = checked(driver.cuLibraryGetKernel(library, b"scale"))
    function = checked(driver.cuKernelGetFunction(kernel))
    memory = checked(driver.cuMemAlloc(4 * SIZE))
    stream = checked(driver.cuStreamCreate(0))
    values = (ctypes.c_uint64(int(memory)), ctypes.c_float(1.0),
              ctypes.c_uint64(int(memory)), ctypes.c_int(SIZE))  # fmt: skip
    pointers = (ctypes.c_void_p * 4)(*map(ctypes.addressof, values))
    start, end = (checked(driver.cuEventCreate(0)) for _ in range(2))
    best = {"host_us": 1e9, "device_us": 1e9}
    for _ in range(20):
        checked(driver.cuEventRecord(start, stream))
        begin = time.perf_counter()
        for _ in range(LAUNCHES):
            driver.cuLaunchKernel(
                function, SIZE // 256, 1, 1, 256, 1, 1, 0, stream,
                ctypes.addressof(pointers), 0)  # fmt: skip
        host = (time.perf_counter() - begin) / LAUNCHES * 1e6
        checked(driver.cuEventRecord(end, stream))
        checked(driver.cuEventSynchronize(end))
        device = checked(driver.cuEventElapsedTime(start, end)) / LAUNCHES * 1e3
        best["host_us"] = min(best["host_us"], host)
        best["device_us"] = min(best["device_us"], device)
    return best


def subjects(options):
    """What is timed: a function of a row, that gives a row."""
    weight = torch.ones(SIZE, device="xla")
    found = {
        "in tree": lambda x: xla_ops.rms_norm(x, weight),
        "cuda_kernel": lambda x: cases.scale(x, 1.0),
    }
    if not options.no_triton:
        import user_kernels_triton as tk

        found["triton_kernel"] = lambda x: tk.scale(x, 1.0)
    return found


def us_in_a_program(f):
    """Microseconds a launch, in a program of many one after the other."""

    def program(x):
        for _ in range(LAUNCHES):
            x = f(x)
        return x

    torch._dynamo.reset()
    compiled = torch.compile(program, backend="xla_ops")
    x = torch.ones(1, SIZE, device="xla")
    best = 1e9
    for _ in range(15):
        torch_xla.sync()
        xm.wait_device_ops()
        begin = time.perf_counter()
        for _ in range(5):
            result = compiled(x)
        torch_xla.sync()
        xm.wait_device_ops()
        best = min(best, (time.perf_counter() - begin) / 5 / LAUNCHES * 1e6)
    assert torch.isfinite(result.cpu()).all()
    return best


def us_to_trace(f):
    """Microseconds of the host to add a call to a lazy graph."""
    best = 1e9
    for _ in range(10):
        x = torch.ones(1, SIZE, device="xla")
        torch_xla.sync()
        begin = time.perf_counter()
        for _ in range(LAUNCHES):
            x = f(x)
        best = min(best, (time.perf_counter() - begin) / LAUNCHES * 1e6)
        torch_xla.sync()
    return best


def measure(options):
    """What a process of its own prints: times with the XLA_FLAGS that it has."""
    dump = pathlib.Path(os.environ["CHECK_USER_KERNELS_DUMP"])
    found = {}
    for name, f in subjects(options).items():
        for old in dump.iterdir():
            old.unlink()
        us = us_in_a_program(f)
        times = {"program_us": us, "trace_us": us_to_trace(f)}
        found[name] = times | {"captured": is_captured(dump)}
    print(json.dumps(found), flush=True)


def is_captured(dump):
    """Whether the longest program has all its calls in CUDA graphs; None: not shown."""
    texts = [path.read_text() for path in dump.glob("*thunk_sequence*.txt")]
    try:
        calls = xla_dump.launches(texts)
    except ValueError:
        return None
    return calls["inside"] > 0 and calls["outside"] == 0


def timings(options):
    results = {"bare": bare_launch()}
    flags = os.environ.get("XLA_FLAGS", "")
    for name, more in (
        ("command buffers", ""),
        ("no command buffers", "--xla_gpu_enable_command_buffer="),
    ):
        with tempfile.TemporaryDirectory() as folder:
            dump = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
            env = os.environ | {"XLA_FLAGS": f"{flags} {more} {dump}"}
            env["CHECK_USER_KERNELS_DUMP"] = folder
            command = [sys.executable, __file__, "--measure"]
            command += ["--no-triton"] if options.no_triton else []
            child = subprocess.run(
                command, env=env, text=True, capture_output=True, check=False
            )
            if child.returncode:
                print(child.stdout[-2000:], child.stderr[-4000:])
                raise RuntimeError(f"timing with {name} failed")
            results[name] = json.loads(child.stdout.strip().split("\n")[-1])
    return results


def show(results):
    bare = results["bare"]
    text = f"bare launch: host {bare['host_us']:.2f} us (of Python's loop),"
    print(f"{text} device {bare['device_us']:.2f} us")
    for name in ("command buffers", "no command buffers"):
        found = results[name]
        print(f"{name}:")
        for subject, us in found.items():
            text = f"  {subject:14} {us['program_us']:7.2f} us a launch in a program of"
            text += f" {LAUNCHES}, {us['trace_us']:7.2f} us to trace lazily"
            print(f"{text}, captured: {us['captured']}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--no-triton", action="store_true")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_grad_enabled(False)
    os.environ.setdefault("PJRT_DEVICE", "CPU" if options.cpu else "GPU")
    if options.measure:
        measure(options)
        return 0
    results = {"cases": 0, "failures": []}
    run_checks(checks(options), options, results)
    if not options.cpu:
        results |= launch.machine()._asdict()
        if not options.no_time:
            results["timings"] = timings(options)
    run_checks([check_errors, check_guards], options, results)
    save(results, options)
    print(results["cases"], "cases,", len(results["failures"]), "failures")
    if "timings" in results:
        show(results["timings"])
    return 1 if results["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
