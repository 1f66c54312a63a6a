"""`python -m xla_ops doctor`: its report, JSON and exit status, with and without a GPU
that fakes (fakes.py) stand for."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

import fakes
import xla_ops
from xla_ops.core import paths
from xla_ops.doctor import diagnose
from xla_ops.gpu import check as gpu_check
from xla_ops.gpu import discover
from xla_ops.gpu import driver as cuda_driver


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
    call = report["calls"]["CPU"]
    assert call["custom_call"] is True
    assert 0 <= call["error"] <= 1e-5
    assert "xla_ops.rms_norm" in call["registered"]["Host"]
    handlers = report["libraries"]["libxla_ops_rms_norm_cpu.so"]["handlers"]
    assert handlers == ["xla_ops.rms_norm"]
    for name in ("handlers", "custom call"):
        assert find(report["checks"], "CPU", name)["status"] == "ok"


def test_text_names_what_was_found():
    status, out, err = run(
        "doctor", PJRT_DEVICE="CPU", XLA_OPS_PJRT_PLUGIN="/no/such.so"
    )
    assert status == 0, err
    version = re.escape(xla_ops.__version__)
    assert re.search(rf"^  ok    xla_ops +{version}$", out, re.MULTILINE)
    assert "Healthy: the ops run on the CPU." in out
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
    assert report["calls"]["CPU"]["custom_call"] is True


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
    path = tmp_path / "jax_plugins" / "xla_cuda13" / "xla_cuda_plugin.so"
    driver = fakes.build("fake_cuda_driver")
    monkeypatch.setattr(cuda_driver, "_DRIVER_LIBRARY", str(driver))
    monkeypatch.setenv("FAKE_CUDA_INIT", "0")
    # Whatever this wheel was built for, on that machine its kernels run.
    monkeypatch.setattr(gpu_check, "kernel_archs", lambda: {"op": "8.0 9.0"})
    calls = []

    def fake_call(report, device, environ):
        calls.append(device)

    monkeypatch.setattr(diagnose, "_check_call", fake_call)

    def run_doctor(device, devices="9.0", version="13000", **macros):
        fakes.copy(fakes.build("fake_pjrt_plugin", **macros), path)
        monkeypatch.setenv(discover.PLUGIN_VARIABLE, str(path))
        monkeypatch.setenv("FAKE_CUDA_DEVICES", devices)
        monkeypatch.setenv("FAKE_CUDA_VERSION", version)
        calls.clear()
        report = diagnose.diagnose({**os.environ, "PJRT_DEVICE": device})
        found = {c.name: c for c in report.checks if c.section == "GPU"}
        return report, found, list(calls)

    return run_doctor


def test_gpu_machine(machine):
    _, found, calls = machine("CPU", devices="9.0,8.0")
    assert found["plugin"].status == "ok"
    assert found["PJRT API"].text == "0.115, takes custom calls"
    assert found["driver"].text == "runs CUDA up to 13.0"
    assert found["GPU 1"].text.startswith("Fake GPU 1, 80 GiB, compute capability 8.0")
    assert calls == ["CPU", "GPU"]  # a usable GPU is tried even where not asked for


@pytest.mark.parametrize("device", ["GPU", "CUDA", "CPU"])
@pytest.mark.parametrize(
    "setting, name, text, fix",
    [
        ({"MAJOR": 2}, "plugin", "speaks PJRT API 2.115", "install another release"),
        ({"EXTENSION": 0}, "PJRT API", "has no custom-call", "install jax-cuda12"),
        ({"devices": ""}, "driver", "shows no GPU", "check CUDA_VISIBLE_DEVICES"),
        ({"version": "12080"}, "client", "runs CUDA up to 12.8", "update the driver"),
    ],
)
def test_gpu_problem_names_its_fix(machine, device, setting, name, text, fix):
    report, found, calls = machine(device, **setting)
    check = found[name]
    assert text in check.text and fix in check.fix, check
    asked = device != "CPU"
    assert check.status == ("FAIL" if asked else "note")
    assert report.healthy is not asked
    assert calls == ["CPU"]
    assert check.fix.split()[0] in diagnose.render(report)


def test_kernels_that_do_not_fit_the_gpu(machine, monkeypatch):
    monkeypatch.setattr(
        gpu_check, "kernel_archs", lambda: {"libxla_ops_a_cuda.so": "8.0 9.0a"}
    )
    report, found, _ = machine("GPU", devices="9.0,7.5")
    assert found["GPU 0"].status == "ok"
    assert "not built for it: libxla_ops_a_cuda.so" in found["GPU 1"].text
    assert "build xla_ops with 7.5" in found["GPU 1"].fix
    assert not report.healthy


def failing_interpreter(tmp_path, monkeypatch, script):
    """Has the doctor's own process for a call be `script`."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setattr(diagnose.sys, "executable", str(path))


def call_check(device="CPU"):
    report = diagnose.Report(device)
    diagnose._check_call(report, device, dict(os.environ))
    return report.checks[-1]


def test_client_that_aborts_is_reported(tmp_path, monkeypatch):
    failing_interpreter(tmp_path, monkeypatch, "echo 'F0000 bad: boom' >&2; kill -6 $$")
    check = call_check()
    assert (check.status, check.text, check.fix) == ("FAIL", "F0000 bad", "boom")


def test_client_that_hangs_is_reported(tmp_path, monkeypatch):
    failing_interpreter(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setattr(diagnose, "_CALL_TIMEOUT_S", 0.2)
    assert "no answer in 0.2 s" in call_check("GPU").text


def answer(**changes):
    call = {
        "device": "CPU:0",
        "custom_call": True,
        "error": 0.0,
        "registered": {"Host": ["xla_ops.rms_norm"], "CUDA": []},
        "warnings": [],
    }
    return f"echo '{json.dumps({**call, **changes})}'"


@pytest.mark.parametrize(
    "changes, status, text",
    [
        ({}, "ok", "rms_norm in an XLA program on CPU:0, error 0.0e+00"),
        ({"error": 0.5}, "FAIL", "error 5.0e-01"),
        ({"error": float("nan")}, "FAIL", "error nan"),
        ({"custom_call": False, "warnings": ["told why"]}, "FAIL", "told why"),
        ({"registered": {"Host": [], "CUDA": []}}, "FAIL", "no handler registered"),
    ],
)
def test_answer_of_the_call_is_judged(tmp_path, monkeypatch, changes, status, text):
    failing_interpreter(tmp_path, monkeypatch, answer(**changes))
    check = call_check()
    assert check.status == status
    assert text in check.text


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
    assert verdict in diagnose.render(report)


def test_an_empty_device_is_the_cpu(machine):
    assert machine("")[0].requested == "CPU"


def test_wrong_torch_xla_is_not_healthy(monkeypatch):
    real = diagnose._version
    monkeypatch.setattr(
        diagnose,
        "_version",
        lambda name: "2.8.0" if name == "torch_xla" else real(name),
    )
    report = diagnose.Report("CPU")
    diagnose._check_versions(report)
    (check,) = [c for c in report.checks if c.status == "FAIL"]
    assert check.name == "torch_xla" and "pip install torch_xla==2.9.0" in check.fix


def test_missing_op_libraries_are_not_healthy(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "LIB", tmp_path / "lib")
    report = diagnose.Report("CPU")
    diagnose._check_libraries(report)
    (check,) = [c for c in report.checks if c.status == "FAIL"]
    assert check.text == f"none in {tmp_path / 'lib'}"


def test_broken_op_library_is_not_healthy(monkeypatch, tmp_path):
    (tmp_path / "lib").mkdir()
    broken = pathlib.Path(tmp_path / "lib" / "libxla_ops_broken_cpu.so")
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(paths, "LIB", tmp_path / "lib")
    report = diagnose.Report("CPU")
    diagnose._check_libraries(report)
    assert any(
        c.status == "FAIL" and c.name == broken.name and str(broken) in c.text
        for c in report.checks
    )
