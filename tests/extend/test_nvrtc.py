"""CUDA C++ is compiled on any machine, with NVRTC; and once, thanks to the disk."""

import sys
import threading

import pytest

from user_kernels import BOTH, SCALE
from xla_ops.core.errors import Problem
from xla_ops.extend import kernel_cache, nvrtc


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XLA_OPS_CACHE_DIR", str(tmp_path))
    return tmp_path / "kernels"


@pytest.fixture
def compiled(monkeypatch):
    """What was compiled, and not taken from disk."""
    calls = []
    compile_ = nvrtc._compile

    def record(*args):
        calls.append(args)
        return compile_(*args)

    monkeypatch.setattr(nvrtc, "_compile", record)
    return calls


def test_gives_machine_code_and_parameters():
    code = nvrtc.compile_source("scale", SCALE, "scale", "sm_90a")
    assert code.image[:4] == b"\x7fELF"
    assert code.kernel == "scale"
    assert code.parameters == ("u64", "f32", "u64", "u32")


def test_takes_an_expression_and_cuda_headers():
    code = nvrtc.compile_source("both", BOTH, "both<__half>", "sm_80")
    assert code.kernel.startswith("_Z4bothI6__half")
    assert code.parameters == ("u64",) * 5


def test_ptx_for_gpus_of_several_kinds():
    code = nvrtc.compile_source("scale", SCALE, "scale", "compute_80")
    assert b".target sm_80" in code.image and code.image.endswith(b"\0")


def test_source_that_does_not_compile_raises_with_the_log():
    with pytest.raises(nvrtc.CompileError) as error:
        nvrtc.compile_source("scale", SCALE.replace("a *", "b *"), "scale", "sm_90a")
    text = str(error.value)
    assert text.startswith("scale: source must compile for sm_90a, got\n")
    assert 'scale.cu(4): error: identifier "b" is undefined' in text


def test_kernel_that_is_not_there_raises():
    with pytest.raises(nvrtc.CompileError, match="source must compile .*sm_90a"):
        nvrtc.compile_source("scale", SCALE, "other", "sm_90a")
    source = SCALE + "__device__ int helper(int x) { return x; }"
    with pytest.raises(nvrtc.CompileError, match="non-__global__ function"):
        nvrtc.compile_source("scale", source, "helper", "sm_90a")


def test_compiled_once(compiled, folder):
    first = nvrtc.compile_source("scale", SCALE, "scale", "sm_90a")
    assert nvrtc.compile_source("scale", SCALE, "scale", "sm_90a") == first
    assert len(compiled) == 1
    assert nvrtc.compile_source("other", SCALE, "scale", "sm_90a") == first
    assert len(compiled) == 1, "the op's name is for error texts"


@pytest.mark.parametrize(
    "change",
    [
        {"source": SCALE + "\n"},
        {"architecture": "sm_80"},
        {"options": ("--use_fast_math",)},
        {"version": (1, 2)},
    ],
)
def test_compiled_anew_where_anything_changes(compiled, change, monkeypatch):
    given = {"source": SCALE, "kernel": "scale", "architecture": "sm_90a"}
    nvrtc.compile_source("scale", **given)
    if "version" in change:
        monkeypatch.setattr(nvrtc, "version", lambda: change["version"])
    else:
        given |= change
    nvrtc.compile_source("scale", **given)
    assert len(compiled) == 2


def test_compiled_anew_where_the_disk_is_corrupt(compiled, folder):
    code = nvrtc.compile_source("scale", SCALE, "scale", "sm_90a")
    path = folder / f"{code.digest}.cubin"
    path.write_bytes(path.read_bytes()[:-1])
    assert nvrtc.compile_source("scale", SCALE, "scale", "sm_90a") == code
    assert len(compiled) == 2
    assert path.read_bytes() == code.image


def test_threads_compile_once(compiled):
    found = []

    def work():
        found.append(nvrtc.compile_source("scale", SCALE, "scale", "sm_90a"))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(compiled) == 1 and len({code.digest for code in found}) == 1


def test_architecture(monkeypatch):
    assert nvrtc.architecture((8, 0)) == "sm_80"
    assert nvrtc.architecture((9, 0)) == "sm_90a"
    assert nvrtc.architecture((8, 0), exact=False) == "compute_80"
    # A GPU that is newer than the compiler: the driver compiles its PTX.
    assert nvrtc.architecture((99, 0)).startswith("compute_")
    with pytest.raises(Problem, match="compiles for no GPU of compute capability 2.0"):
        nvrtc.architecture((2, 0))


def test_no_bindings(monkeypatch):
    nvrtc._bindings.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(Problem) as error:
        nvrtc.version()
    assert str(error.value).startswith(
        "NVRTC, which compiles CUDA C++, cannot be loaded"
    )
    assert "pip install 'xla_ops[cuda13]'" in error.value.fix
    monkeypatch.undo()
    nvrtc._bindings.cache_clear()
    assert nvrtc.version() >= (12, 0)


def test_kept_under_the_version_of_the_cache(monkeypatch, compiled):
    nvrtc.compile_source("scale", SCALE, "scale", "sm_90a")
    monkeypatch.setattr(kernel_cache, "_FORMAT", 1000)
    nvrtc.compile_source("scale", SCALE, "scale", "sm_90a")
    assert len(compiled) == 2
