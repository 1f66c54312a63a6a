"""What the build files decide, asked of their functions: they are Python too."""

from __future__ import annotations

import pathlib
import re
import types

import pytest


def fail(text):
    raise ValueError(text)


class Ignored:
    """Stands for what a .bzl file calls of Bazel: rules, attributes, providers."""

    def __getattr__(self, name):
        return self

    def __call__(self, *args, **kwargs):
        return self


@pytest.fixture(scope="module")
def archs():
    """The names of archs.bzl."""
    names = ["CcInfo", "attr", "config", "provider", "rule"]
    scope = dict.fromkeys(names, Ignored())
    scope |= {"fail": fail, "struct": types.SimpleNamespace}
    exec(pathlib.Path("third_party/cuda/archs.bzl").read_text(), scope)
    return types.SimpleNamespace(**scope)


@pytest.fixture(scope="module")
def source_kind(archs):
    """The function of ops.bzl."""
    loaded = {"CAPABILITY_OF_SUFFIX": archs.CAPABILITY_OF_SUFFIX}
    scope = {"load": lambda *_: None, "fail": fail, **loaded}
    exec(pathlib.Path("xla_ops/ops.bzl").read_text(), scope)
    return scope["source_kind"]


@pytest.mark.parametrize(
    "file, kind",
    [
        ("norm.h", "header"),
        ("norm_checks.h", "header"),
        ("norm_tile.cuh", "device_header"),
        ("norm.cc", "shared"),
        ("norm_shared.cc", "shared"),
        ("norm_cpu.cc", "cpu"),
        ("norm_cuda.cc", "cuda"),
        ("norm.cu.cc", "kernel"),
        ("norm_fp8.cu.cc", "kernel"),
        ("norm_sm90.cu.cc", "kernel_sm90"),
        ("norm_fp8_sm100.cu.cc", "kernel_sm100"),
        ("norm_errors_test.cc", "test"),
    ],
)
def test_the_end_of_a_name_says_what_a_file_is_for(source_kind, file, kind):
    assert source_kind("norm", file) == kind


@pytest.mark.parametrize(
    "file, rule",
    [
        ("norm_gpu.cc", "be norm.cc or end in one of "),
        ("norm_checks.cc", "be norm.cc or end in one of "),
        ("norm_cuda.cpp", "be norm.cc or end in one of "),
        ("norm.cu", "be norm.cc or end in one of "),
        ("README.md", "be norm.cc or end in one of "),
        ("norm_sm89.cu.cc", "name no architecture or end in _sm100 or _sm90.cu.cc"),
        ("norm_sm90_fp8.cu.cc", "name no architecture or end in _sm100 or _sm90.cu.cc"),
    ],
)
def test_a_name_that_says_nothing_is_an_error(source_kind, file, rule):
    with pytest.raises(ValueError, match="^norm: " + re.escape(f"{file} must {rule}")):
        source_kind("norm", file)


def test_the_release_builds_the_sources_of_every_suffix(archs):
    build = pathlib.Path("third_party/cuda/BUILD").read_text()
    (default,) = re.findall(r'build_setting_default = "(.*)"', build)
    capabilities = [archs._parse(text, "").capability for text in default.split(",")]
    assert set(archs.CAPABILITY_OF_SUFFIX.values()) <= set(capabilities)


@pytest.mark.parametrize(
    "flag, capability, chosen",
    [
        ("8.0,9.0a,10.0", "9.0a", ["9.0a"]),
        ("9.0,9.0a+PTX", "9.0a", ["9.0a+PTX"]),
        ("8.0,10.0", "9.0a", []),
        ("10.3", "10.0", []),
    ],
)
def test_sources_for_one_capability(archs, flag, capability, chosen):
    parsed = [archs._parse(text, "") for text in flag.split(",")]
    found = archs.archs_of_capability(parsed, capability, "//a:b")
    assert [arch.text for arch in found] == chosen


@pytest.mark.parametrize(
    "flag, capability, given",
    [("8.0,9.0", "9.0a", "9.0"), ("10.0f+PTX", "10.0", "10.0f+PTX")],
)
def test_the_same_gpu_in_another_form_is_an_error(archs, flag, capability, given):
    parsed = [archs._parse(text, "") for text in flag.split(",")]
    text = f"archs must hold {capability}, not {given}: //a:b is for {capability}"
    with pytest.raises(ValueError, match=re.escape(text)):
        archs.archs_of_capability(parsed, capability, "//a:b")


# What starts a kernel, apart from LaunchKernel (device/launch.h).
BARE_LAUNCH = re.compile(
    r"<<<|\bcu(da)?Launch(Kernel|Cooperative)|GraphAddKernel|\bLaunchOverlapping"
)


def test_every_kernel_is_launched_by_what_lists_it():
    """A kernel that LoadKernels does not know is loaded at its first launch.

    Another rank's collective may wait for the stream by then: a deadlock. Attention,
    its gradient and linear's kernels for Hopper load theirs by LoadKernel, before the
    first call.
    """
    files = sorted(pathlib.Path("xla_ops/cc/ops").glob("*/*.cu*"))
    assert len(files) > 10
    bare = [f for f in files if BARE_LAUNCH.search(f.read_text())]
    others = [f for f in bare if not f.parent.name.startswith("attention")]
    assert [f for f in others if "LoadKernel(" not in f.read_text()] == []
    assert bare  # what it looks for is what attention has
