"""What xla_ops.vllm does with a compiled library of vLLM's that does not load."""

import importlib
import os
import subprocess
import sys
import warnings

import pytest

from xla_ops.vllm import lowerings


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """A package vllm; returns a function that writes a module of it."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in [n for n in sys.modules if n.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)
    lowerings._load.cache_clear()

    def write(name: str, text: str = "") -> None:
        path = tmp_path.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        importlib.invalidate_caches()

    yield write
    lowerings._load.cache_clear()
    for name in [n for n in sys.modules if n.partition(".")[0] == "vllm"]:
        del sys.modules[name]


def load(module="vllm._C") -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            lowerings._load(module)
    assert all(w.filename == __file__ for w in caught)
    return [str(w.message) for w in caught]


def test_what_is_not_there_is_no_news(vllm):
    assert load() == []
    vllm("vllm.__init__")
    lowerings._load.cache_clear()
    assert load() == []
    assert load("vllm.vllm_flash_attn._vllm_fa2_C") == []


SYMBOL = "vllm/_C.abi3.so: undefined symbol: _ZN3c105Error"


@pytest.mark.parametrize(
    "code, reason",
    [
        (f"raise ImportError({SYMBOL!r})", f"ImportError: {SYMBOL}"),
        (
            "raise OSError('libcudart.so.99: cannot')",
            "OSError: libcudart.so.99: cannot",
        ),
        ("import vllm_parts", "ModuleNotFoundError: No module named 'vllm_parts'"),
        (
            "import vllm._C.inner",
            "ModuleNotFoundError: No module named 'vllm._C.inner'",
        ),
    ],
)
def test_what_does_not_load_is_reported_once_with_the_reason(vllm, code, reason):
    vllm("vllm.__init__")
    vllm("vllm._C", code)
    (text,) = load()
    assert text.startswith(
        f"xla_ops.vllm: vllm._C is installed and cannot be loaded ({reason}"
    )


def test_the_ops_work_all_the_same(vllm, tmp_path):
    vllm("vllm.__init__")
    vllm("vllm._C", f"raise ImportError({SYMBOL!r})")
    code = (
        "import torch, xla_ops.vllm\n"
        "xla_ops.vllm.register_lowerings()\n"
        "x, out = torch.ones(2, 8), torch.empty(2, 8)\n"
        "torch.ops._C.rms_norm(out, x, x[0], 1e-6)\n"
        "print(out.sum().item())\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert float(done.stdout) == pytest.approx(16, rel=1e-3)
    assert done.stderr.count("vllm._C is installed and cannot be loaded") == 1
