"""`python -m xla_ops doctor`: its report, JSON and exit status, with and without a GPU
that fakes (fakes.py) stand for."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import fakes
import xla_ops
from installation import Installation
from xla_ops.core import paths
from xla_ops.doctor import checks, diagnose, probe
from xla_ops.doctor.report import Report
from xla_ops.gpu import check as gpu_check
from xla_ops.gpu import cuda_libraries, discover, driver, visible


def run(*arguments, **environ):
    """Runs `python -m xla_ops`; returns (exit status, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", "xla_ops", *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **environ},
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def installation(tmp_path) -> Installation:
    return Installation(tmp_path / "site")


def find(checks, section, name):
    (check,) = [c for c in checks if (c["section"], c["name"]) == (section, name)]
    return check


# ------------------------------------------------------------- the real command


def test_cpu_is_healthy_and_a_call_was_made():
    status, out, err = run("doctor", "--json", PJRT_DEVICE="CPU")
    report = json.loads(out)
    assert status == 0, err
    assert report["healthy"] is True
    assert report["requested_device"] == "CPU"
    assert report["versions"]["xla_ops"] == xla_ops.__version__
    assert report["versions"]["torch_xla"] == importlib.metadata.version("torch_xla")
    steps = report["calls"]["CPU"]["steps"]
    assert list(steps) == ["client", "handlers", "exp", "dot", "custom call"]
    handlers = report["libraries"]["libxla_ops_rms_norm_cpu.so"]["handlers"]
    assert sorted(handlers) == [
        "xla_ops.rms_norm",
        "xla_ops.rms_norm_backward",
        "xla_ops.rms_norm_backward_input",
    ]
    for name, step in steps.items():
        check = find(report["checks"], "CPU", name)
        assert (check["status"], check["text"]) == ("ok", step["text"])
    assert "CPU:0" in steps["client"]["text"]
    assert re.search(
        "rms_norm of 8 x 256, right to [0-9.]+e-", steps["custom call"]["text"]
    )


def test_text_names_what_was_found():
    status, out, err = run(
        "doctor", PJRT_DEVICE="CPU", XLA_OPS_PJRT_PLUGIN="/no/such.so"
    )
    assert status == 0, err
    version = re.escape(xla_ops.__version__)
    assert re.search(rf"^  ok    xla_ops +{version}$", out, re.MULTILINE)
    assert "Healthy: the ops run on the CPU." in out
    assert re.search(
        r"^  ok    CPU ops +[0-9]+ in [0-9]+ libraries$", out, re.MULTILINE
    )
    assert "silu_and_mul" not in out  # by -v alone
    assert "XLA_OPS_PJRT_PLUGIN must be the path of a PJRT plugin" in out
    assert max(len(line) for line in out.splitlines()) <= 100


def test_gpu_that_was_asked_for_and_is_missing_is_not_healthy():
    status, out, _ = run(
        "doctor", "--json", PJRT_DEVICE="CUDA", XLA_OPS_PJRT_PLUGIN="/no/such.so"
    )
    report = json.loads(out)
    assert status == 1
    assert report["healthy"] is False
    check = find(report["checks"], "GPU", "plugin")
    assert check["status"] == "FAIL"
    # The CPU is looked at all the same.
    assert "text" in report["calls"]["CPU"]["steps"]["custom call"]


@pytest.mark.parametrize(
    "arguments, status", [([], 2), (["unknown"], 2), (["--help"], 0)]
)
def test_usage(arguments, status):
    done = run(*arguments, PJRT_DEVICE="CPU")
    assert done[0] == status
    assert "python -m xla_ops doctor" in done[1] + done[2]


# ----------------------------------------------------- other machines, by fakes


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Has the doctor see a GPU machine; returns a function that runs it there."""
    cuda = fakes.build("fake_cuda_driver")
    monkeypatch.setattr(driver, "_DRIVER_LIBRARY", str(cuda))
    monkeypatch.setattr(visible, "query", lambda: visible.Gpus(["GPU-0", "GPU-1"]))
    monkeypatch.setenv("FAKE_CUDA_INIT", "0")
    # Whatever this wheel was built for, that machine's has kernels for its GPUs, and of
    # CUDA everything is there.
    monkeypatch.setattr(checks, "libraries", lambda report: None)
    monkeypatch.setattr(gpu_check, "kernel_archs", lambda: {"op": "8.0 9.0"})
    monkeypatch.setattr(gpu_check, "kernel_cuda_versions", dict)
    monkeypatch.setattr(cuda_libraries, "find", lambda *_: "/somewhere")
    calls = []

    def fake_probe(report, device, environ):
        calls.append(device)
        report.judge(device, "custom call", True, "called")

    monkeypatch.setattr(probe, "check", fake_probe)

    def run_doctor(device, devices="9.0", version="13000", environ=None, **macros):
        # A file of its own: one that is loaded must not change.
        folder = tmp_path / str(len(list(tmp_path.iterdir()))) / "xla_cuda13"
        path = folder / "xla_cuda_plugin.so"
        fakes.copy(fakes.build("fake_pjrt_plugin", **macros), path)
        monkeypatch.setenv(discover.PLUGIN_VARIABLE, str(path))
        monkeypatch.setenv("FAKE_CUDA_DEVICES", devices)
        monkeypatch.setenv("FAKE_CUDA_VERSION", version)
        calls.clear()
        variables = {**os.environ, **(environ or {})}
        variables.pop("PJRT_DEVICE")
        if device is not None:
            variables["PJRT_DEVICE"] = device
        report = diagnose.diagnose(variables)
        found = {c.name: c for c in report.checks if c.section == "GPU"}
        return report, found, list(calls)

    return run_doctor


def test_gpu_machine(machine):
    report, found, calls = machine("CPU", devices="9.0,8.0")
    assert found["plugin"].status == "ok"
    assert found["PJRT API"].text == "0.115, takes custom calls"
    assert found["driver"].text == "runs CUDA up to 13.0"
    assert found["GPU 1"].text.startswith("Fake GPU 1, 80 GiB, compute capability 8.0")
    assert found["CUDA libraries"].text.startswith("all ")
    assert calls == ["CPU", "GPU"]  # a usable GPU is tried even where not asked for
    text = report.as_text()
    assert "GPU (not asked for)" in text
    assert "and on the GPU with PJRT_DEVICE=GPU." in text


@pytest.mark.parametrize("device", ["GPU", "CUDA", "CPU"])
@pytest.mark.parametrize(
    "setting, name, text, fix",
    [
        ({"MAJOR": 2}, "plugin", "speaks PJRT API 2.115", "install xla_ops[cuda13]"),
        ({"EXTENSION": 0}, "PJRT API", "has no custom-call", "install xla_ops["),
        ({"devices": ""}, "driver", "shows no GPU", "check CUDA_VISIBLE_DEVICES"),
        ({"version": "12080"}, "client", "runs CUDA up to 12.8", "update the driver"),
    ],
)
def test_gpu_problem_names_its_fix(machine, device, setting, name, text, fix):
    report, found, calls = machine(device, **setting)
    check = found[name]
    assert text in check.text and check.fix.startswith(fix), check
    assert fix not in check.text
    asked = device != "CPU"
    assert check.status == ("FAIL" if asked else "note")
    assert report.healthy is not asked
    assert calls == ["CPU"]
    assert f"-> {check.fix.split()[0]}" in report.as_text()


def test_a_newer_plugin_is_worth_a_note(machine):
    report, _, calls = machine("GPU", MINOR=900)
    notes = [c.text for c in report.checks if c.status == "note"]
    assert any("speaks PJRT API 0.900, newer than" in text for text in notes)
    assert report.healthy and calls == ["CPU", "GPU"]


def test_kernels_that_do_not_fit_the_gpu(machine, monkeypatch):
    monkeypatch.setattr(
        gpu_check, "kernel_archs", lambda: {"libxla_ops_a_cuda.so": "8.0 9.0a"}
    )
    report, found, _ = machine("GPU", devices="9.0,7.5")
    assert found["GPU 0"].status == "ok"
    assert "not built for it: libxla_ops_a_cuda.so" in found["GPU 1"].text
    assert "build xla_ops with 7.5" in found["GPU 1"].fix
    assert not report.healthy


@pytest.mark.parametrize("device, status", [("GPU", "FAIL"), ("CPU", "note")])
def test_missing_cuda_libraries(machine, monkeypatch, device, status):
    """Whatever a program may need is a failure, with the line that brings it."""
    gone = ["libdevice", "cuBLAS", "cuBLASLt", "CUPTI"]
    monkeypatch.setattr(
        cuda_libraries, "find", lambda part, *_: None if part.name in gone else "/there"
    )
    report, _, calls = machine(device)
    needed, optional = [c for c in report.checks if c.name == "CUDA libraries"]
    assert needed.status == status
    assert needed.text == (
        "not found: libdevice (for exp, tanh and other functions);"
        " cuBLAS, cuBLASLt (for matrix products)"
    )
    assert needed.fix.startswith("pip install ")
    assert "nvidia-nvvm" in needed.fix and needed.fix.count("nvidia-cublas") == 1
    assert optional.status == "note" and "nvidia-cuda-cupti" in optional.fix
    assert report.healthy is (device == "CPU")
    assert calls == ["CPU", "GPU"]  # programs tell what they do without
    assert report.facts["cuda_libraries"]["cuBLAS"] is None


@pytest.mark.parametrize("device, status", [("GPU", "FAIL"), ("CPU", "note")])
def test_broken_cuda_libraries(machine, tmp_path, device, status):
    # Beside the folder of the plugin, as the fixture numbers them.
    broken = tmp_path / "nvidia" / "cu13" / "lib" / "libcublas.so.13"
    broken.parent.mkdir(parents=True)
    broken.touch()
    report, _, calls = machine(device)
    (check,) = [c for c in report.checks if c.name == "CUDA libraries"]
    assert check.status == status and check.text == f"{broken} is empty"
    assert check.fix.startswith("pip install --force-reinstall")
    assert report.healthy is (device == "CPU")
    assert calls == ["CPU"]  # no client is made of it


@pytest.mark.parametrize(
    "device, status, verdict",
    [
        ("gpu", "FAIL", "Not healthy"),
        ("cpu", "FAIL", "Not healthy"),
        ("TPU", "note", "Healthy, but on TPU the ops run their references."),
    ],
)
def test_device_names_that_xla_ops_does_not_serve(machine, device, status, verdict):
    report, _, _ = machine(device)
    (check,) = [c for c in report.checks if c.name == "PJRT_DEVICE"]
    assert check.status == status
    assert check.fix == (f"PJRT_DEVICE={device.upper()}" if status == "FAIL" else "")
    assert verdict in report.as_text()


@pytest.mark.parametrize("device", ["", None])
def test_no_device_is_the_cpu_and_a_gpu_is_pointed_out(machine, monkeypatch, device):
    report, _, _ = machine(device)
    assert report.requested == "CPU" and report.healthy
    (check,) = [c for c in report.checks if c.name == "PJRT_DEVICE"]
    assert check.status == "note"
    assert check.text == "not set: torch_xla chooses the CPU, though 2 GPUs are visible"
    assert check.fix == "PJRT_DEVICE=GPU chooses the GPU"
    report, found, _ = machine(device, environ={"CUDA_VISIBLE_DEVICES": "1"})
    (check,) = [c for c in report.checks if c.name == "PJRT_DEVICE"]
    assert "though 1 GPU is visible" in check.text
    assert found["driver"].text.endswith("; 1 GPU is visible by CUDA_VISIBLE_DEVICES")
    for environ in ({"CUDA_VISIBLE_DEVICES": ""}, {"CUDA_VISIBLE_DEVICES": "7"}):
        report, _, _ = machine(device, environ=environ)
        assert not any(c.name == "PJRT_DEVICE" for c in report.checks)
    monkeypatch.setattr(visible, "query", lambda: None)
    report, _, _ = machine(device)
    assert not any(c.name == "PJRT_DEVICE" for c in report.checks)


def test_what_fails_on_the_cpu_is_a_note_where_the_gpu_is_asked_for(
    machine, monkeypatch
):
    def fake_probe(report, device, environ):
        report.judge(device, "custom call", device == "GPU", "called", "mend it")

    monkeypatch.setattr(probe, "check", fake_probe)
    report, _, _ = machine("GPU")
    assert report.healthy
    assert "CPU (not asked for)" in report.as_text()
    report, _, _ = machine("CPU")
    assert not report.healthy


@pytest.mark.parametrize(
    "name, value, check_name",
    [("XLA_USE_BF16", "1", "dtypes"), ("XLA_OPS_STRICT", "perhaps", "XLA_OPS_STRICT")],
)
def test_variables_that_ops_refuse_are_not_healthy(machine, name, value, check_name):
    report, _, _ = machine("CPU", environ={name: value})
    (check,) = [c for c in report.checks if c.name == check_name]
    assert check.status == "FAIL" and check.text.startswith(f"{name} must")
    assert repr(value) in check.text


def test_wrong_torch_xla_is_not_healthy(monkeypatch):
    real = checks.version
    monkeypatch.setattr(
        checks, "version", lambda name: "2.8.0" if name == "torch_xla" else real(name)
    )
    report = Report("CPU")
    checks.versions(report)
    (check,) = [c for c in report.checks if c.status == "FAIL"]
    assert check.name == "torch_xla" and "pip install torch_xla==2.9.0" in check.fix


def test_missing_op_libraries_are_not_healthy(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "LIB", tmp_path / "lib")
    report = Report("CPU")
    checks.libraries(report)
    check = next(c for c in report.checks if c.status == "FAIL")
    where = f"in {tmp_path / 'lib'} (No such file or directory)"
    assert check.name == "CPU ops" and check.text.endswith(where)
    assert check.fix == "reinstall xla_ops"


@pytest.mark.parametrize(
    "gone",
    [
        "xla_ops/lib/libxla_ops_activation_cpu.so",
        "xla_ops/vllm/worker.py",
        "xla_ops/include",
        "xla_ops_vllm.py",
    ],
)
def test_a_half_installation_is_not_healthy(installation, gone):
    """The doctor's own call would not meet what lacks there."""
    path = installation.site / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    code = (
        "from xla_ops.doctor import checks, report; r = report.Report('CPU');"
        "checks.libraries(r); print([(c.name, c.text, c.fix) for c in r.checks"
        " if c.status == 'FAIL'])"
    )
    done = installation.run("-c", code)
    ((name, text, fix),) = ast.literal_eval(done.stdout)
    assert (name, fix) == ("files", "reinstall xla_ops"), done.stderr
    assert text.startswith(f"{installation.site} lacks {gone}")


def test_a_package_without_its_metadata_is_no_device(machine, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: [])
    report, found, _ = machine("GPU")
    assert found["entry point"].status == "FAIL" and not report.healthy
    assert found["entry point"].fix == "reinstall xla_ops, by pip"
    assert machine("CPU")[1]["entry point"].status == "note"


def test_a_folder_that_cannot_be_read_is_the_cause(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "LIB", tmp_path / "file")
    (tmp_path / "file").touch()
    report = Report("CPU")
    checks.libraries(report)
    check = next(c for c in report.checks if c.status == "FAIL")
    assert check.text.endswith(f"{tmp_path / 'file'} (Not a directory)")


def test_a_doctor_that_cannot_be_imported_says_so(installation):
    shutil.rmtree(installation.package / "gpu")
    done = installation.run("-m", "xla_ops", "doctor")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip() == (
        "error: xla_ops cannot be imported (ModuleNotFoundError: No module named"
        " 'xla_ops.gpu'): reinstall xla_ops"
    )


@pytest.mark.parametrize("size", [None, 9000])
def test_a_broken_bridge_is_named(machine, monkeypatch, tmp_path, size):
    path = tmp_path / "libxla_ops_pjrt.so"
    if size:
        path.write_bytes((paths.LIB / path.name).read_bytes()[:size])
    monkeypatch.setattr(paths, "LIB", tmp_path)
    report = Report("GPU")
    assert not checks.gpu(report, {})
    check = next(c for c in report.checks if c.name == "bridge")
    assert check.status == "FAIL" and str(path) in check.text
    assert check.fix == "reinstall xla_ops"


@pytest.mark.parametrize("size", [13, 5000])
def test_broken_op_library_is_not_healthy(monkeypatch, tmp_path, size):
    broken = tmp_path / "libxla_ops_broken_cpu.so"
    broken.write_bytes(fakes.build("fake_ops").read_bytes()[:size])
    monkeypatch.setattr(paths, "LIB", tmp_path)
    report = Report("CPU")
    checks.libraries(report)
    (check,) = [c for c in report.checks if c.name == broken.name]
    assert check.status == "FAIL" and str(broken) in check.text
    assert check.fix == "reinstall xla_ops" and check.fix not in check.text


def test_an_op_library_that_ends_the_process_is_named(monkeypatch, tmp_path):
    """As one of the right size does, with zeros where a disk lost its contents."""
    broken = tmp_path / "libxla_ops_broken_cpu.so"
    fakes.copy(fakes.build("fake_ops", ENDS=None), broken)
    whole = fakes.build("fake_ops", PREFIX="whole")
    fakes.copy(whole, tmp_path / "libxla_ops_whole_cpu.so")
    monkeypatch.setattr(paths, "LIB", tmp_path)
    report = Report("CPU")
    checks.libraries(report)
    (check,) = [c for c in report.checks if c.name == broken.name]
    assert check.status == "FAIL" and check.fix == "reinstall xla_ops"
    assert check.text == f"{broken} ends a process that loads it by SIGSEGV"
    assert list(report.facts["libraries"]) == ["libxla_ops_whole_cpu.so"]


def test_verbose_names_what_is_counted():
    report = Report("CPU")
    checks.libraries(report)
    assert "silu_and_mul" not in report.as_text()
    assert "silu_and_mul" in report.as_text(verbose=True)
