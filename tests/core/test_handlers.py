"""core/handlers.py: what happens where a handler is missing, and that it takes no other
down. Fakes (fakes.py) stand for libraries; copies of the package run on their own."""

from __future__ import annotations

import itertools
import json

import pytest

import fakes
from installation import Installation
from xla_ops.core import environment, handlers, paths
from xla_ops.core.errors import Problem

_numbers = itertools.count()


@pytest.fixture
def clock(monkeypatch):
    """The time that handlers.py sees, as a list of one number."""
    now = [1000.0]
    monkeypatch.setattr(handlers.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def registry(monkeypatch, tmp_path, clock):
    """A folder of fake op libraries and a registry for them in place of the real ones.

    `registry.answers` is what the registry says of each target, or raises.
    """
    monkeypatch.setattr(paths, "LIB", tmp_path)
    monkeypatch.delenv("XLA_OPS_STRICT", raising=False)

    class Registry:
        def __init__(self) -> None:
            self.answers: dict[str, str] | Exception = {}
            self.calls = 0
            self.state = handlers._Platform("Host", "cpu", self.register)
            monkeypatch.setitem(handlers._platforms, "Host", self.state)
            monkeypatch.setitem(handlers._platforms, "CUDA", self.state)
            monkeypatch.setattr(handlers, "_told", set())

        def register(self):
            self.calls += 1
            if isinstance(self.answers, Exception):
                raise self.answers
            return self.answers

        def install(self, name: str) -> str:
            """Installs a library; returns the prefix of its targets."""
            prefix = f"h{next(_numbers)}"
            path = tmp_path / f"libxla_ops_{name}_cpu.so"
            fakes.copy(fakes.build("fake_ops", PREFIX=prefix), path)
            return prefix

        def truncate(self, name: str) -> None:
            path = tmp_path / f"libxla_ops_{name}_cpu.so"
            path.write_bytes(path.read_bytes()[:100])

    return Registry()


def test_a_broken_library_takes_no_other_down(registry):
    good, bad = registry.install("good"), registry.install("bad")
    registry.truncate("bad")
    assert handlers.available("Host", f"{good}.shapes")
    assert handlers.loaded("Host", f"{good}.shapes")
    for ask in (handlers.available, handlers.loaded):
        handlers._told.clear()
        with pytest.warns(UserWarning, match=r"libxla_ops_bad_cpu.so was cut short"):
            assert not ask("Host", f"{bad}.shapes")


def test_a_refused_handler_takes_no_other_down(registry):
    ops = registry.install("ops")
    registry.answers = {f"{ops}.shapes": "the reason", f"{ops}.fail": ""}
    assert handlers.available("Host", f"{ops}.fail")
    with pytest.warns(UserWarning, match=f"{ops}.shapes: .* because the reason"):
        assert not handlers.available("Host", f"{ops}.shapes")
    assert handlers.unavailable_reason("Host", f"{ops}.shapes") == "the reason"
    assert handlers.loaded("Host", f"{ops}.shapes")  # by itself it can be called


def test_what_failed_is_tried_again(registry, clock):
    ops = registry.install("ops")
    registry.answers = RuntimeError("for now")
    with pytest.warns(UserWarning, match="because for now"):
        assert not handlers.available("Host", f"{ops}.shapes")
    registry.answers = {f"{ops}.shapes": "later"}
    clock[0] += 0.5
    assert not handlers.available("Host", f"{ops}.shapes")
    assert registry.calls == 1  # not at every call
    clock[0] += 0.6
    assert not handlers.available("Host", f"{ops}.shapes")
    assert handlers.unavailable_reason("Host", f"{ops}.shapes") == "later"
    registry.answers = {f"{ops}.shapes": ""}
    clock[0] += 1.1
    assert handlers.available("Host", f"{ops}.shapes")
    clock[0] += 100
    assert handlers.available("Host", f"{ops}.shapes")
    assert registry.calls == 3  # what is registered is not registered again


def test_a_library_that_comes_later_is_loaded_and_registered(registry, clock):
    good = registry.install("good")
    path = paths.LIB / "libxla_ops_late_cpu.so"
    path.write_bytes(b"half of it")
    assert handlers.available("Host", f"{good}.shapes")
    late = registry.install("late")
    clock[0] += 1.1
    assert handlers.available("Host", f"{late}.shapes")
    assert registry.calls == 2


def test_no_handler_in_this_build(registry):
    registry.install("ops")
    with pytest.warns(UserWarning, match="this build of xla_ops has no Host handler"):
        assert not handlers.available("Host", "xla_ops.none")


@pytest.mark.parametrize(
    "platform, strict, raises",
    [
        ("Host", None, False),
        ("Host", "0", False),
        ("Host", "1", True),
        ("CUDA", None, True),
        ("CUDA", "1", True),
        ("CUDA", "", True),
        ("CUDA", "false", False),
        ("TPU", None, False),
        ("TPU", "1", True),
    ],
)
@pytest.mark.parametrize("ask", [handlers.available, handlers.loaded])
def test_strict(registry, monkeypatch, platform, strict, raises, ask):
    registry.install("ops")
    if platform == "TPU" and ask is handlers.loaded:
        return  # tensors of CPU and CUDA alone are called directly
    if strict is not None:
        monkeypatch.setenv("XLA_OPS_STRICT", strict)
    if not raises:
        with pytest.warns(
            UserWarning, match="xla_ops.none: using the slow plain torch"
        ):
            assert not ask(platform, "xla_ops.none")
        return
    for _ in range(2):
        with pytest.raises(Problem) as info:
            ask(platform, "xla_ops.none")
        what = f"none: handler must be there for {platform}, got none: "
        assert info.value.what.startswith(what)
        assert "XLA_OPS_STRICT=0" in info.value.fix
        assert str(info.value) == f"{info.value.what}: {info.value.fix}"


def test_strict_must_be_a_truth_value(registry, monkeypatch):
    monkeypatch.setenv("XLA_OPS_STRICT", "maybe")
    with pytest.raises(ValueError, match="^XLA_OPS_STRICT must be 1, 0, true or false"):
        handlers.available("Host", "xla_ops.none")


def test_require_names_the_reason(registry):
    ops = registry.install("ops")
    handlers.require("Host", f"{ops}.shapes")
    registry.install("bad")
    registry.truncate("bad")
    registry.state.retry_at["load"] = 0
    with pytest.raises(Problem, match="got none: no op library .*bad_cpu.so was cut"):
        handlers.require("Host", "xla_ops.none")


# -------------------------------------------------------- in a package of its own

NORM = """
import json, shutil, time, warnings
import torch, torch_xla, xla_ops

def run(op, *args):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            out = op(*args)  # the user's line
            hlo = torch_xla._XLAC._get_xla_tensors_hlo([out])
            value = out.cpu().sum().item()
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
    ours = [w for w in caught if "xla_ops" in str(w.message)]
    return {
        "call": "xla_ops." in hlo,
        "value": value,
        "warnings": [str(w.message) for w in ours],
        "lines": [open(w.filename).readlines()[w.lineno - 1].strip() for w in ours],
    }

x = torch.ones(2, 16, device="xla")
norm = lambda x: xla_ops.rms_norm(x, x[0], 1e-6)
compiled = torch.compile(norm, backend="openxla")
"""


def run(installation, tmp_path, code, **environ):
    script = tmp_path / "script.py"
    script.write_text(NORM + code)
    done = installation.run(str(script), **{"PJRT_DEVICE": "CPU", **environ})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def installation(tmp_path) -> Installation:
    return Installation(tmp_path / "site")


def test_the_reference_runs_and_the_warning_is_at_the_users_line(
    installation, tmp_path
):
    path = installation.lib / "libxla_ops_rms_norm_cpu.so"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    (installation.site / "whole.so").write_bytes(whole)
    code = f"""
first = run(xla_ops.rms_norm, x, x[0], 1e-6)
second = run(norm, x)
gated = run(xla_ops.silu_and_mul, x)
shutil.copy({str(installation.site / "whole.so")!r}, {str(path)!r})
time.sleep(1.1)
mended = run(norm, x)
print(json.dumps([first, second, gated, mended]))
"""
    (answer,) = run(installation, tmp_path, code)
    first, second, gated, mended = json.loads(answer)
    assert first["value"] == pytest.approx(32, rel=1e-3)
    assert not first["call"] and not second["call"]
    (text,) = first["warnings"]
    assert text.startswith("xla_ops.rms_norm: using the slow plain torch reference")
    assert f"{path} was cut short: it has 1000 of {len(whole)} bytes" in text
    assert first["lines"] == ["out = op(*args)  # the user's line"]
    assert second["warnings"] == []  # once an op
    assert gated["call"] and gated["warnings"] == []
    assert mended["call"] and mended["value"] == pytest.approx(32, rel=1e-3)


def test_strict_raises_from_the_op(installation, tmp_path):
    (installation.lib / "libxla_ops_rms_norm_cpu.so").unlink()
    code = "print([run(f, x)['error'] for f in (norm, norm, compiled)])"
    (answer,) = run(installation, tmp_path, code, XLA_OPS_STRICT="1")
    error = "rms_norm: handler must be there for Host, got none: this build of xla_ops"
    assert answer.count(error) == 3


def test_a_mutable_op_on_cpu_tensors(installation, tmp_path):
    """Both halves of a stacked cache are written; or the reason is given."""
    path = installation.lib / "libxla_ops_reshape_and_cache_flash_cpu.so"
    path.write_bytes(b"")
    code = """
import os
for strict in "01":
    os.environ["XLA_OPS_STRICT"] = strict
    cache = torch.zeros(2, 4, 4, 2, 8)
    k, v = torch.ones(1, 2, 8), torch.full((1, 2, 8), torch.nan)
    try:
        xla_ops.reshape_and_cache_flash(k, v, *cache.unbind(0), torch.tensor([5]))
    except RuntimeError as error:
        print(type(error).__name__, error)
    else:
        written = cache[:, 1, 1].flatten(1)
        print((written == 1).sum(1), written.isnan().sum(1), (cache != 0).sum())
"""
    values, error = run(installation, tmp_path, code)
    assert values == "tensor([16,  0]) tensor([ 0, 16]) tensor(32)"
    what = "Problem reshape_and_cache_flash: handler must be there for Host, got none: "
    assert error.startswith(what) and f"{path}: file too short" in error


@pytest.mark.parametrize(
    "name, value, remedy",
    [
        ("XLA_USE_BF16", "1", "unset it, and convert the model itself"),
        ("XLA_DOWNCAST_BF16", "true", "unset it, and convert the model itself"),
        ("XLA_USE_32BIT_LONG", " 2", "unset it, and give int32 tensors"),
    ],
)
def test_variables_that_change_dtypes(name, value, remedy):
    problem = environment.clash({name: value})
    assert (
        problem.what == f"{name} must not be set where xla_ops is used, got {value!r}"
    )
    assert problem.fix.startswith(remedy)
    for off in ("0", "false", "", "yes"):  # as torch_xla reads it
        assert environment.clash({name: off}) is None


def test_a_variable_by_which_every_update_copies():
    name = "XLA_ENABLE_PARAM_ALIASING"
    for off in ("0", "false", "no"):
        problem = environment.clash({name: off})
        assert problem.what == f"{name} must be 1 where xla_ops is used, got {off!r}"
    for environ in ({}, {name: "1"}, {name: "true"}):
        assert environment.clash(environ) is None


def test_variables_that_change_dtypes_are_refused(installation, tmp_path):
    code = "print(*[run(f, x)['error'] for f in (norm, norm, compiled)], sep=chr(10))"
    lines = run(installation, tmp_path, code, XLA_USE_BF16="1")
    what = "XLA_USE_BF16 must not be set where xla_ops is used, got '1': unset it"
    assert sum(f"Problem: {what}" in line for line in lines) == 3
