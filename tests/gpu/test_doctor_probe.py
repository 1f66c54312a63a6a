"""The doctor's programs on a device, and how their ends are told (doctor/probe.py,
doctor/child.py)."""

from __future__ import annotations

import json
import os
import tempfile

import pytest
import torch

from xla_ops.core import handlers
from xla_ops.core.errors import Problem
from xla_ops.doctor import child, probe
from xla_ops.doctor.report import Report


@pytest.fixture
def interpreter(tmp_path, monkeypatch):
    """Has the doctor's own process be a shell script; $3 is the file of steps."""

    def write(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(probe.sys, "executable", str(path))

    return write


def steps(*lines: dict) -> str:
    """A command that writes these lines."""
    return "\n".join(f"echo '{json.dumps(line)}' >> $3" for line in lines)


def check(device="CPU", requested="CPU"):
    report = Report(requested)
    probe.check(report, device, dict(os.environ))
    return report, {c.name: c for c in report.checks}


CLIENT = ({"step": "client"}, {"step": "client", "text": "CPU:0"})
EXP = {"step": "exp"}


def test_steps_become_lines(interpreter):
    interpreter(
        steps(*CLIENT, EXP, {**EXP, "what": "no libdevice: gone", "fix": "bring it"})
    )
    report, found = check()
    assert (found["client"].status, found["client"].text) == ("ok", "CPU:0")
    exp = found["exp"]
    # Two fields, whatever colons are in them.
    assert (exp.status, exp.text, exp.fix) == ("FAIL", "no libdevice: gone", "bring it")
    assert report.facts["calls"]["CPU"]["steps"]["client"] == {"text": "CPU:0"}
    _, found = check("GPU")
    assert found["exp"].status == "note"


@pytest.mark.parametrize(
    "end, text",
    [
        ("kill -6 $$", "the process was ended by SIGABRT, and wrote last: F0000 boom"),
        ("kill -7 $$", "the process was ended by SIGBUS, and wrote last: F0000 boom"),
        ("exit 3", "the process ended with status 3, and wrote last: F0000 boom"),
    ],
)
def test_a_process_that_ends_is_told_at_its_step(interpreter, end, text):
    said = "echo 'F0000 boom: more' >&2; echo >&2; echo '  2: at' >&2"
    interpreter(f"{steps(*CLIENT, EXP)}\n{said}\n{end}")
    report, found = check()
    assert list(found) == ["client", "exp"]
    assert found["client"].status == "ok"
    assert found["exp"].status == "FAIL"
    assert found["exp"].text == f"{text}: more | 2: at"
    assert found["exp"].fix == (
        "see all that it wrote: python -m xla_ops doctor --json"
    )
    assert "F0000 boom: more" in report.facts["calls"]["CPU"]["stderr"]


def test_a_process_that_cannot_begin(interpreter):
    interpreter("echo 'ImportError: no torch' >&2; exit 1")
    _, found = check()
    text = "the process ended with status 1, and wrote last: ImportError: no torch"
    assert found["client"].text == text


def test_a_process_that_hangs(interpreter, monkeypatch):
    interpreter(f"{steps(*CLIENT, EXP)}\necho waiting >&2\nexec sleep 60")
    monkeypatch.setattr(probe, "_TIMEOUT_S", 1.0)
    report, found = check("GPU", "GPU")
    assert (found["exp"].status, found["exp"].text) == ("FAIL", "no answer in 1.0 s")
    assert "nvidia-smi" in found["exp"].fix
    assert "waiting" in report.facts["calls"]["GPU"]["stderr"]


def test_a_long_error_is_cut_in_the_report_alone(interpreter):
    long = "a line\\n" * 1000
    interpreter(steps(*CLIENT, EXP, {**EXP, "what": long, "fix": ""}))
    _, found = check()
    assert len(found["exp"].text) < 900 and found["exp"].text.endswith(" ...")


# ------------------------------------------------------------------- the programs


def run(tmp_path, monkeypatch, steps) -> list[dict]:
    monkeypatch.setenv("XLA_OPS_STRICT", "0")
    monkeypatch.setattr(child, "STEPS", steps)
    path = tmp_path / "steps"
    assert child.main(str(path)) == 0
    assert os.environ["XLA_OPS_STRICT"] == "1"
    return [json.loads(line) for line in path.read_text().splitlines()]


def fail(error):
    def step():
        raise error

    return step


def test_errors_are_written_in_two_fields(tmp_path, monkeypatch):
    lines = run(
        tmp_path,
        monkeypatch,
        {
            "exp": fail(Problem("this: that", "do it")),
            "dot": fail(RuntimeError("INTERNAL: no: cuBLAS")),
            "custom call": lambda: "fine",
        },
    )
    assert lines == [
        {"step": "exp"},
        {"step": "exp", "what": "this: that", "fix": "do it"},
        {"step": "dot"},
        {"step": "dot", "what": "RuntimeError: INTERNAL: no: cuBLAS", "fix": ""},
        {"step": "custom call"},
        {"step": "custom call", "text": "fine"},
    ]


def test_without_a_client_nothing_else_is_tried(tmp_path, monkeypatch):
    steps = {"client": fail(RuntimeError("no GPU")), "exp": lambda: "fine"}
    lines = run(tmp_path, monkeypatch, steps)
    assert [line["step"] for line in lines] == ["client", "client"]


@pytest.mark.parametrize(
    "actual, text",
    [
        (torch.tensor([1.0, 2.0]), None),
        (torch.tensor([1.0, 2.5]), "numbers: wrong by 5.0e-01"),
        (torch.tensor([1.0, torch.nan]), "numbers: wrong by nan"),
    ],
)
def test_results_are_judged(actual, text):
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    if text is None:
        assert child._close(actual, exact, "numbers") == "numbers, right to 0.0e+00"
        return
    with pytest.raises(Problem) as info:
        child._close(actual, exact, "numbers")
    assert info.value.what == text and "report it" in info.value.fix


def test_a_missing_handler_is_told_with_its_reason(monkeypatch):
    def available(platform, target):
        if target == "xla_ops.a":
            raise Problem("a: handler must be there for Host, got none: refused")
        return True

    targets = frozenset(["xla_ops.a", "xla_ops.b"])
    monkeypatch.setattr(handlers, "load", lambda platform: targets)
    monkeypatch.setattr(handlers, "available", available)
    with pytest.raises(Problem) as info:
        child._handlers()
    assert info.value.what.endswith("got none: refused")
    assert info.value.fix == "reinstall xla_ops and torch_xla 2.9.0"
    monkeypatch.setattr(handlers, "load", lambda platform: frozenset())
    with pytest.raises(Problem, match="there are none for Host"):
        child._handlers()


def test_a_reference_is_no_custom_call(monkeypatch):
    monkeypatch.setattr(handlers, "available", lambda *_: False)
    with pytest.raises(Problem, match="rms_norm became another program"):
        child._custom_call()


def test_no_folder_needs_to_be_writable(interpreter, monkeypatch):
    """As where a disk is full, which the doctor may be asked about."""

    def none(*_):
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "_get_default_tempdir", none)
    monkeypatch.setattr(tempfile, "tempdir", None)
    interpreter(steps(*CLIENT, EXP, {**EXP, "text": "exp(1) = 2.718"}))
    report, found = check()
    assert found["exp"].status == "ok" and report.healthy
