"""Looks at what is there: versions, libraries, plugin, driver, CUDA's libraries.

Tested by tests/gpu/test_doctor.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import pathlib
import platform
import signal
import time
import warnings
from collections.abc import Mapping

from .. import _runtime
from ..core import elf, environment, paths
from ..core.errors import Problem
from ..gpu import check, cuda_libraries, discover, driver, plugin, visible
from .report import FAIL, NOTE, OK, Report

_TORCH_XLA = "2.9.0"
_REINSTALL = "reinstall xla_ops"
# Within which a child has loaded an op library.
_LOAD_S = 20.0


def device(report: Report, environ: Mapping[str, str]) -> None:
    """PJRT_DEVICE, and other variables that XLA tensors depend on."""
    asked = environ.get("PJRT_DEVICE", "")
    if asked != asked.upper():
        text = f"must be in capitals, got {asked!r}: torch_xla knows no other names"
        report.add(
            "Versions", "PJRT_DEVICE", FAIL, text, f"PJRT_DEVICE={asked.upper()}"
        )
    elif report.requested not in ("CPU", "GPU"):
        text = f"{asked}: ops run their references there; handlers are for CPU and GPU"
        report.add("Versions", "PJRT_DEVICE", NOTE, text)
    elif not asked and visible.count(environ):
        text = f"not set: torch_xla chooses the CPU, though {_visible(environ)}"
        fix = "PJRT_DEVICE=GPU chooses the GPU"
        report.add("Versions", "PJRT_DEVICE", NOTE, text, fix)
    problem = environment.clash(environ)
    if problem is not None:
        report.add("Versions", "dtypes", FAIL, problem.what, problem.fix)
    try:
        environment.boolean(environ, "XLA_OPS_STRICT")
    except ValueError as error:
        report.add("Versions", "XLA_OPS_STRICT", FAIL, str(error))


def _visible(environ: Mapping[str, str]) -> str:
    count = visible.count(environ)
    return f"{count} GPU{'s are' if count != 1 else ' is'} visible"


def version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions(report: Report) -> None:
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}, "
        f"{' '.join(platform.libc_ver())}",
    }
    for name in ("xla_ops", "torch", "torch_xla"):
        found[name] = version(name)
    for name in ("jax-cuda12-pjrt", "jax-cuda13-pjrt"):
        if version(name) is not None:
            found[name] = version(name)
    report.facts["versions"] = found
    for name, number in found.items():
        if name == "torch_xla" and (number or "").split("+")[0] != _TORCH_XLA:
            report.add(
                "Versions",
                name,
                FAIL,
                f"{number}, and xla_ops is built for {_TORCH_XLA}",
                f"pip install torch_xla=={_TORCH_XLA} torch=={_TORCH_XLA}",
            )
        else:
            report.add("Versions", name, OK, number or "version unknown")


def libraries(report: Report) -> None:
    """The op libraries, and what they were built for."""
    found: dict[str, dict] = {}
    for path in sorted(paths.LIB.glob("libxla_ops_*_c*.so")):
        try:
            elf.require_usable(path, _REINSTALL)
            _require_harmless(path)
            found[path.name] = {
                "handlers": [target for target, _ in _runtime.load_library(str(path))],
                "archs": _runtime.cuda_archs(str(path)),
            }
        except (OSError, Problem) as error:
            what = error.what if isinstance(error, Problem) else str(error)
            report.add("Libraries", path.name, FAIL, what, _REINSTALL)
    report.facts["libraries"] = found
    _installed_files(report)
    for kind, name in (("cpu", "CPU ops"), ("cuda", "CUDA ops")):
        mine = {k: v for k, v in found.items() if k.endswith(f"_{kind}.so")}
        ops = sorted(
            target.removeprefix("xla_ops.")
            for library in mine.values()
            for target in library["handlers"]
        )
        if mine:
            text = f"{len(ops)} in {len(mine)} libraries"
            report.add("Libraries", name, OK, text, details=", ".join(ops))
        elif kind == "cpu":
            report.add("Libraries", name, FAIL, paths.no_libraries(kind), _REINSTALL)
        else:
            report.judge(
                "GPU",
                name,
                False,
                "none: this is a build for the CPU alone",
                "install a build with CUDA architectures",
            )
    for archs in sorted({library["archs"] for library in found.values()} - {""}):
        count = sum(library["archs"] == archs for library in found.values())
        text = f"{archs} ({count} libraries)"
        report.add("Libraries", "architectures", OK, text)


def _installed_files(report: Report) -> None:
    """What the wheel brought and is not there any more, or not yet."""
    try:
        files = importlib.metadata.files("xla_ops") or []
    except importlib.metadata.PackageNotFoundError:
        return
    # The package, and the modules beside it that are entry points.
    package = pathlib.Path(__file__).parents[1]
    mine = [f for f in files if f.parts[0] == package.name or len(f.parts) == 1]
    gone = [str(f) for f in mine if not package.parent.joinpath(f).exists()]
    # What Python compiled itself comes and goes.
    gone = [name for name in gone if not name.endswith(".pyc")]
    report.facts["missing_files"] = gone
    if gone:
        more = f" and {len(gone) - 4} more" if len(gone) > 4 else ""
        text = f"{package.parent} lacks {', '.join(gone[:4])}{more}"
        report.add("Libraries", "files", FAIL, text, _REINSTALL)


def _require_harmless(path: pathlib.Path) -> None:
    """Raises Problem if a process that loads the library at `path` ends by it.

    A file whose size is right may hold zeros, where a disk lost them.
    """
    with warnings.catch_warnings():
        # Of threads, which this process has by then; the child only loads and ends.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            _runtime.load_library(str(path))
        os._exit(0)
    # A fork may come while another thread holds a lock, and then never end: no finding.
    ended, end_by = 0, time.monotonic() + _LOAD_S
    while not ended and time.monotonic() < end_by:
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended:
            time.sleep(0.01)
    if not ended:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    elif os.WIFSIGNALED(status):
        end = signal.Signals(os.WTERMSIG(status)).name
        raise Problem(f"{path} ends a process that loads it by {end}", _REINSTALL)


def gpu(report: Report, environ: Mapping[str, str]) -> bool:
    """Bridge, plugin, driver, GPUs. Returns whether nothing stands against a client."""
    before = len(report.checks)
    try:
        paths.bridge_path()
    except Problem as problem:
        report.problem("GPU", "bridge", problem)
    entries = importlib.metadata.entry_points(group="torch_xla.plugins", name="GPU")
    if not any(entry.module == "xla_ops_pjrt" for entry in entries):
        text = "torch_xla finds none of xla_ops, and no device GPU without it: the"
        text += f" package lies in {paths.LIB.parent.parent} without its metadata"
        report.judge("GPU", "entry point", False, text, f"{_REINSTALL}, by pip")
    path = _plugin(report)
    _driver(report, environ, path)
    broken = None if path is None else check.broken_cuda_files(path)
    if broken is not None:
        report.problem("GPU", "CUDA libraries", broken)
    usable = all(check.status == OK for check in report.checks[before:])
    if report.facts["plugin"].get("warning"):
        report.add("GPU", "PJRT API", NOTE, report.facts["plugin"]["warning"])
    if path is not None:
        _cuda_libraries(report, environ, path, are_whole=broken is None)
    return usable


def _plugin(report: Report) -> pathlib.Path | None:
    try:
        path = discover.find_plugin()
        info = plugin.plugin_info(path)
    except Problem as problem:
        report.facts["plugin"] = {"error": problem.what, "fix": problem.fix}
        report.problem("GPU", "plugin", problem)
        return None
    report.facts["plugin"] = info
    report.add("GPU", "plugin", OK, discover.describe_plugin(path))
    api = f"{info['major']}.{info['minor']}"
    if not info["custom_call"]:
        report.judge(
            "GPU",
            "PJRT API",
            False,
            f"{api}, has no custom-call extension",
            f"{discover.INSTALL}, whose plugin has it",
        )
        return None
    report.add("GPU", "PJRT API", OK, f"{api}, takes custom calls")
    return path


def _driver(
    report: Report, environ: Mapping[str, str], path: pathlib.Path | None
) -> None:
    try:
        found = driver.query()
    except driver.DriverError as problem:
        report.facts["driver"] = {"error": problem.what, "fix": problem.fix}
        report.problem("GPU", "driver", problem)
        return
    report.facts["driver"] = dataclasses.asdict(found)
    text = f"runs CUDA up to {_dotted(found.cuda_version)}"
    if environ.get(visible.VARIABLE) is not None:
        text += f"; {_visible(environ)} by {visible.VARIABLE}"
    report.add("GPU", "driver", OK, text)
    unfit = False
    for one in found.devices:
        text = (
            f"{one.name}, {one.memory_bytes / 2**30:.0f} GiB, compute"
            f" capability {_dotted(one.capability)}"
        )
        missing = _not_built_for(one)
        if missing:
            text += f"; not built for it: {', '.join(missing)}"
        fix = check.fix_for(one.capability)
        report.judge("GPU", f"GPU {one.ordinal}", not missing, text, fix)
        unfit = unfit or bool(missing)
    if path is not None and not unfit:
        try:
            check.check_machine(path)
        except Problem as problem:
            report.problem("GPU", "client", problem)


def _not_built_for(device: driver.Device) -> list[str]:
    """The libraries without code for a GPU; those that do not load were reported."""
    try:
        archs = check.kernel_archs()
    except (OSError, Problem):
        return []
    return sorted(
        n for n, a in archs.items() if not check.runs_on(a, device.capability)
    )


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _cuda_libraries(
    report: Report, environ: Mapping[str, str], path: pathlib.Path, *, are_whole: bool
) -> None:
    """What XLA opens when a program needs it; a client starts without most of it."""
    cuda = check.cuda_of(path)
    if cuda is None:
        return
    parts = cuda_libraries.opened(path)
    found = {p.name: cuda_libraries.find(p, path, cuda, environ) for p in parts}
    report.facts["cuda_libraries"] = found
    for optional in (False, True):
        missing = [p for p in parts if not found[p.name] and p.optional == optional]
        if missing:
            uses: dict[str, list[str]] = {}
            for part in missing:
                uses.setdefault(part.use, []).append(part.name)
            text = "not found: " + "; ".join(
                f"{', '.join(names)} (for {use})" for use, names in uses.items()
            )
            fix = cuda_libraries.pip_line(missing, cuda)
            if optional:
                report.add("GPU", "CUDA libraries", NOTE, text, fix)
            else:
                report.judge("GPU", "CUDA libraries", False, text, fix)
    if all(found.values()) and are_whole:
        places = ", ".join(f"{name}: {place}" for name, place in found.items())
        text = f"all {len(parts)} that XLA opens are there"
        report.add("GPU", "CUDA libraries", OK, text, details=places)
    if version("nvidia-cudnn-cu12") and version("nvidia-cudnn-cu13"):
        report.add(
            "GPU",
            "cuDNN",
            NOTE,
            "nvidia-cudnn-cu12 and nvidia-cudnn-cu13 are both installed, in the same"
            " folder: one has overwritten the other",
            "with a CUDA 12 build of torch use xla_ops[cuda12] alone, pip uninstall"
            " nvidia-cudnn-cu13 and reinstall nvidia-cudnn-cu12; else pip uninstall"
            " nvidia-cudnn-cu12 and reinstall nvidia-cudnn-cu13",
        )
