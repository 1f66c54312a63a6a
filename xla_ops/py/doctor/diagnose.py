"""`python -m xla_ops doctor`: what is installed, what works, how to mend the rest.

It looks at versions, op libraries, JAX's CUDA plugin, the driver and the GPUs, and then
runs an op through an XLA program, in a process of its own for each device, since a
client that cannot start may end its process. The exit status is 0 if the device that
PJRT_DEVICE asks for (the CPU, where it is not set) works: what is missing for a GPU is
a failure only where a GPU was asked for.

Tested by tests/gpu/test_doctor.py.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import textwrap

OK = "ok"
NOTE = "note"  # worth knowing, nothing to mend
FAIL = "FAIL"

_TORCH_XLA = "2.9.0"
_CALL_TIMEOUT_S = 300
_WIDTH = 88

# Libraries of CUDA that XLA opens by name when it needs them, by CUDA's version.
_CUDA_LIBRARIES = {
    "12": ("cublas.so.12", "cudnn.so.9", "cufft.so.11", "cusolver.so.11",
           "cusparse.so.12"),
    "13": ("cublas.so.13", "cudnn.so.9", "cufft.so.12", "cusolver.so.12",
           "cusparse.so.12"),
}  # fmt: skip

# Runs one op in an XLA program and prints a JSON object as its last line.
_CALL = """
import json, warnings
import torch, torch_xla
import xla_ops
from xla_ops import _runtime

torch.manual_seed(0)
x, weight = torch.randn(8, 256), torch.randn(256)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = xla_ops.rms_norm(x.to("xla"), weight.to("xla"), 1e-6)
    hlo = torch_xla._XLAC._get_xla_tensors_hlo([out])
    actual = out.cpu()
expected = torch.nn.functional.rms_norm(x.double(), (256,), weight.double(), 1e-6)
print(json.dumps({
    "device": torch_xla._XLAC._xla_real_devices([str(torch_xla.device())])[0],
    "custom_call": 'custom_call_target="xla_ops.rms_norm"' in hlo,
    "error": (actual.double() - expected).abs().max().item(),
    "registered": _runtime.registered(),
    "warnings": [str(w.message) for w in caught if "xla_ops" in str(w.message)],
}))
"""
# float32, values of order 1: some units in the last place.
_CALL_TOLERANCE = 1e-5


@dataclasses.dataclass
class Check:
    """One line of the report. `fix` says what to do, "" where there is nothing."""

    section: str
    name: str
    status: str
    text: str
    fix: str = ""


class Report:
    """The checks so far and, for --json, the facts behind them."""

    def __init__(self, requested: str):
        self.requested = requested
        self.checks: list[Check] = []
        self.facts: dict = {"requested_device": requested}

    def add(
        self, section: str, name: str, status: str, text: str, fix: str = ""
    ) -> None:
        self.checks.append(Check(section, name, status, text, fix))

    def gpu(self, name: str, good: bool, text: str, fix: str = "") -> None:
        """A check of the GPU: bad is a failure only where a GPU is asked for."""
        bad = FAIL if self.requested == "GPU" else NOTE
        self.add("GPU", name, OK if good else bad, text, "" if good else fix)

    @property
    def healthy(self) -> bool:
        return all(check.status != FAIL for check in self.checks)


def diagnose(environ: dict[str, str] | None = None) -> Report:
    """Runs all checks for the device that PJRT_DEVICE in `environ` asks for."""
    environ = dict(os.environ if environ is None else environ)
    asked = environ.get("PJRT_DEVICE") or "CPU"
    report = Report("GPU" if asked.upper() in ("GPU", "CUDA") else asked.upper())
    if asked != asked.upper():
        text = f"{asked!r}: torch_xla knows names in capitals alone"
        fix = f"PJRT_DEVICE={asked.upper()}"
        report.add("Versions", "PJRT_DEVICE", FAIL, text, fix)
    elif report.requested not in ("CPU", "GPU"):
        text = f"{asked}: ops run their references there; handlers are for CPU and GPU"
        report.add("Versions", "PJRT_DEVICE", NOTE, text)
    # XLA's remarks at loading a plugin are not for a report.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "1")
    _check_versions(report)
    _check_libraries(report)
    _check_call(report, "CPU", environ)
    # What stands against a client was said by then; making one only repeats it.
    if _check_gpu(report):
        _check_call(report, "GPU", environ)
    return report


# --------------------------------------------------------------------- versions


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_versions(report: Report) -> None:
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, "
        f"{' '.join(platform.libc_ver())}",
    }
    for name in ("xla_ops", "torch", "torch_xla"):
        versions[name] = _version(name)
    for name in ("jax-cuda12-pjrt", "jax-cuda13-pjrt"):
        if _version(name) is not None:
            versions[name] = _version(name)
    report.facts["versions"] = versions
    for name, version in versions.items():
        if name == "torch_xla" and _base(version) != _TORCH_XLA:
            report.add(
                "Versions",
                name,
                FAIL,
                f"{version}, and xla_ops is built for {_TORCH_XLA}",
                f"pip install torch_xla=={_TORCH_XLA} torch=={_TORCH_XLA}",
            )
        else:
            report.add("Versions", name, OK, version or "version unknown")


def _base(version: str | None) -> str:
    """2.9.0+cu128 to 2.9.0."""
    return (version or "").split("+")[0]


# -------------------------------------------------------------------- libraries


def _check_libraries(report: Report) -> None:
    from .. import _runtime
    from ..core import paths

    folder = paths.LIB

    libraries: dict[str, dict] = {}
    for path in sorted(folder.glob("libxla_ops_*.so")):
        if path.name == "libxla_ops_pjrt.so":
            continue
        try:
            libraries[path.name] = {
                "handlers": [target for target, _ in _runtime.load_library(str(path))],
                "archs": _runtime.cuda_archs(str(path)),
            }
        except OSError as error:
            report.add("Libraries", path.name, FAIL, str(error), "reinstall xla_ops")
    report.facts["libraries"] = libraries
    for kind, name in (("cpu", "CPU ops"), ("cuda", "CUDA ops")):
        found = {k: v for k, v in libraries.items() if k.endswith(f"_{kind}.so")}
        text = ", ".join(
            sorted(
                target.removeprefix("xla_ops.")
                for library in found.values()
                for target in library["handlers"]
            )
        )
        if found:
            report.add("Libraries", name, OK, text)
        elif kind == "cpu":
            fix = "reinstall xla_ops"
            report.add("Libraries", name, FAIL, f"none in {folder}", fix)
        else:
            text = "none: this is a build for the CPU alone"
            report.gpu(name, False, text, "install a build with CUDA architectures")
    for archs in sorted({v["archs"] for v in libraries.values()} - {""}):
        names = [k for k, v in libraries.items() if v["archs"] == archs]
        text = f"{archs} ({len(names)} libraries)"
        report.add("Libraries", "architectures", OK, text)


# -------------------------------------------------------------------- the GPU


def _check_gpu(report: Report) -> bool:
    """Whether nothing stands against a client on the GPU."""
    before = len(report.checks)
    plugin_path = _check_plugin(report)
    _check_driver(report, plugin_path)
    usable = all(check.status == OK for check in report.checks[before:])
    if plugin_path is not None:
        _check_cuda_libraries(report, plugin_path)
    return usable


def _check_plugin(report: Report) -> pathlib.Path | None:
    from .. import _runtime
    from ..gpu import discover

    try:
        path = discover.find_plugin()
    except RuntimeError as error:
        report.facts["plugin"] = {"error": str(error)}
        if discover.installed_plugins() or os.environ.get(discover.PLUGIN_VARIABLE):
            report.gpu("plugin", False, *_split_fix(str(error)))
        else:
            fix = (
                "pip install jax-cuda12-pjrt, or jax-cuda13-pjrt for drivers from 580"
                f" (0.7.1 or newer); or set {discover.PLUGIN_VARIABLE}"
            )
            report.gpu("plugin", False, "no CUDA plugin of JAX is installed", fix)
        return None
    info = _runtime.find_plugin_info(str(path))
    report.facts["plugin"] = info
    if info["error"]:
        report.gpu("plugin", False, *_split_fix(info["error"]))
        return None
    report.gpu("plugin", True, discover.describe_plugin(path))
    good = info["custom_call"]
    report.gpu(
        "PJRT API",
        good,
        f"{info['major']}.{info['minor']}, "
        + ("takes custom calls" if good else "has no custom-call extension"),
        "install jax-cuda12-pjrt or jax-cuda13-pjrt 0.7.1 or newer",
    )
    return path if good else None


def _check_driver(report: Report, plugin_path: pathlib.Path | None) -> None:
    from ..gpu import check
    from ..gpu import driver as cuda_driver

    try:
        driver = cuda_driver.query()
    except cuda_driver.DriverError as error:
        report.facts["driver"] = {"error": str(error)}
        report.gpu("driver", False, *_split_fix(str(error)))
        return
    report.facts["driver"] = dataclasses.asdict(driver)
    cuda_version = ".".join(map(str, driver.cuda_version))
    report.gpu("driver", True, f"runs CUDA up to {cuda_version}")
    archs = check.kernel_archs()
    for device in driver.devices:
        capability = ".".join(map(str, device.capability))
        text = (
            f"{device.name}, {device.memory_bytes / 2**30:.0f} GiB, compute"
            f" capability {capability}"
        )
        missing = sorted(
            name
            for name, built in archs.items()
            if not check.runs_on(built, device.capability)
        )
        if missing:
            text += f"; not built for it: {', '.join(missing)}"
        report.gpu(
            f"GPU {device.ordinal}",
            not missing,
            text,
            f"build xla_ops with {capability} among the architectures, or hide this"
            " GPU by CUDA_VISIBLE_DEVICES",
        )
    if plugin_path is not None:
        try:
            check.check_machine(plugin_path)
        except (RuntimeError, ValueError) as error:
            text, fix = _split_fix(str(error))
            if not any(check.status != OK and check.name.startswith("GPU ")
                       for check in report.checks):  # fmt: skip
                report.gpu("client", False, text, fix)


def _check_cuda_libraries(report: Report, plugin_path: pathlib.Path) -> None:
    match = re.fullmatch(r"xla_cuda(\d+)", plugin_path.parent.name)
    cuda = match[1] if match else ""
    names = _CUDA_LIBRARIES.get(cuda, ())
    missing = [f"lib{n}" for n in names if not _has_library(plugin_path, f"lib{n}")]
    if not names:
        return
    report.facts["cuda_libraries_missing"] = missing
    # XLA opens each when a program needs it: programs without it do run.
    report.add(
        "GPU",
        "CUDA libraries",
        NOTE if missing else OK,
        f"not found: {', '.join(missing)}" if missing else "found",
        f'pip install "jax-cuda{cuda}-plugin[with-cuda]"' if missing else "",
    )
    if _version("nvidia-cudnn-cu12") and _version("nvidia-cudnn-cu13"):
        report.add(
            "GPU",
            "cuDNN",
            NOTE,
            "nvidia-cudnn-cu12 and nvidia-cudnn-cu13 are both installed, in the same"
            " folder: one has overwritten the other",
            "use jax-cuda12-pjrt with a CUDA 12 build of torch, and reinstall"
            " nvidia-cudnn-cu12; or uninstall it",
        )


def _has_library(plugin_path: pathlib.Path, name: str) -> bool:
    """Looks where the plugin does: NVIDIA's wheels beside it, then the system."""
    site = plugin_path.parent.parent.parent
    if any(site.glob(f"nvidia/*/lib/{name}")):
        return True
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def _split_fix(text: str) -> tuple[str, str]:
    """An error text of this package, "what is wrong: what to do", in its two parts."""
    what, _, fix = text.rpartition(": ")
    return (what, fix) if what else (text, "")


# ---------------------------------------------------------------- the real call


def _check_call(report: Report, device: str, environ: dict[str, str]) -> None:
    """Runs an op in an XLA program on `device`, in another process."""

    def add(good: bool, name: str, text: str, fix: str = "") -> None:
        if device == "GPU":
            report.gpu(name, good, text, fix)
        else:
            report.add("CPU", name, OK if good else FAIL, text, "" if good else fix)

    facts = report.facts.setdefault("calls", {})
    try:
        done = subprocess.run(
            [sys.executable, "-c", _CALL],
            capture_output=True,
            check=False,
            text=True,
            timeout=_CALL_TIMEOUT_S,
            env={**environ, "PJRT_DEVICE": device},
        )
    except subprocess.TimeoutExpired:
        facts[device] = {"error": f"no answer in {_CALL_TIMEOUT_S} s"}
        add(False, "custom call", facts[device]["error"], "check that the GPU is idle")
        return
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1] if lines else f"exit status {done.returncode}"
        facts[device] = {"error": reason, "stderr": done.stderr[-4000:]}
        text, fix = _split_fix(reason.removeprefix("RuntimeError: "))
        add(False, "custom call", text, fix)
        return
    call = json.loads(done.stdout.splitlines()[-1])
    facts[device] = call
    platform_name = "Host" if device == "CPU" else "CUDA"
    handlers = call["registered"][platform_name]
    if not handlers or not call["custom_call"]:
        reason = call["warnings"][0] if call["warnings"] else "no handler registered"
        add(False, "handlers", reason, "reinstall xla_ops and torch_xla 2.9.0")
        return
    add(True, "handlers", f"{len(handlers)} registered with XLA")
    add(
        call["error"] <= _CALL_TOLERANCE,
        "custom call",
        f"rms_norm in an XLA program on {call['device']}, error {call['error']:.1e}",
        "the result is wrong: please report it with the output of --json",
    )


# -------------------------------------------------------------------- the output


def _wrap(text: str, first: str, rest: str) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_on_hyphens=False,
        break_long_words=False,
    )


def render(report: Report) -> str:
    """The report as text."""
    lines = [f"xla_ops doctor, for PJRT_DEVICE={report.requested}"]
    width = max(len(check.name) for check in report.checks) + 2
    for section in ("Versions", "Libraries", "CPU", "GPU"):
        if not any(check.section == section for check in report.checks):
            continue
        title = section
        if section == "GPU" and report.requested != "GPU":
            title += " (not asked for)"
        lines += ["", title]
        for check in report.checks:
            if check.section != section:
                continue
            indent = " " * (8 + width)
            first = f"  {check.status:<6}{check.name:<{width}}"
            lines.append(_wrap(check.text, first, indent))
            if check.fix:
                lines.append(_wrap(check.fix, f"{indent}-> ", f"{indent}   "))
    lines += ["", _verdict(report)]
    return "\n".join(lines)


def _verdict(report: Report) -> str:
    if not report.healthy:
        count = sum(check.status == FAIL for check in report.checks)
        return f"Not healthy: {count} to mend, marked {FAIL}."
    if report.requested == "GPU":
        return "Healthy: the ops run on the GPU."
    if report.requested != "CPU":
        return f"Healthy, but on {report.requested} the ops run their references."
    gpu = report.facts.get("calls", {}).get("GPU", {})
    if gpu.get("custom_call"):
        return "Healthy: the ops run on the CPU, and on the GPU with PJRT_DEVICE=GPU."
    return "Healthy: the ops run on the CPU."


def main(argv: list[str]) -> int:
    """Runs the doctor; returns 0 if healthy, 1 if not."""
    parser = argparse.ArgumentParser(
        prog="python -m xla_ops doctor",
        description="Says what is installed, what works, and how to mend the rest."
        " The exit status is 0 if the device that PJRT_DEVICE asks for works.",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    arguments = parser.parse_args(argv)
    report = diagnose()
    if arguments.json:
        checks = [dataclasses.asdict(check) for check in report.checks]
        print(
            json.dumps(
                {"healthy": report.healthy, **report.facts, "checks": checks}, indent=2
            )
        )
    else:
        print(render(report))
    return 0 if report.healthy else 1
