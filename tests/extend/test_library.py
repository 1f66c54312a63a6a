"""extend/library.py: op libraries from outside, good ones and bad ones. Fakes
(fakes.py) stand for them; test_template.py builds a real one."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys

import pytest
import torch

import fakes
import xla_ops
from xla_ops import extend
from xla_ops.core import handlers

_numbers = itertools.count()
VERSION = extend.API_VERSION


@pytest.fixture
def prefix():
    """Of the targets: handlers stay until the process ends."""
    return f"outside{next(_numbers)}"


def shapes(prefix: str) -> extend.Op:
    """An op on the fake's first handler: [number of arguments, dtype, rank, dims]."""

    def lower(input):
        spec = extend.Spec((2 + 1 + input.dim(),), torch.int64)
        return extend.CustomCall(f"{prefix}.shapes", ("input",), (spec,))

    def reference(input):
        raise AssertionError("the handler must run")

    return extend.Op(
        f"{prefix}_shapes",
        "(Tensor input) -> Tensor",
        lower,
        reference,
        autocast=extend.autocast.unchanged,
    )


def test_an_op_on_its_handler_runs_directly_and_in_xla_programs(prefix):
    path = fakes.build("fake_ops", PREFIX=prefix, API=VERSION)
    targets = extend.register_library(path)
    assert f"{prefix}.shapes" in targets["Host"]
    assert targets["CUDA"] == frozenset()
    op = shapes(prefix)
    expected = [1, 11, 2, 3, 4]  # XLA's F32 is 11
    assert op(torch.zeros(3, 4)).tolist() == expected
    import torch_xla

    device = torch_xla.device()
    assert op(torch.zeros(3, 4, device=device)).tolist() == expected
    compiled = torch.compile(op, backend="openxla")
    assert compiled(torch.zeros(3, 4, device=device)).tolist() == expected


def test_handlers_for_each_platform_are_known_to_it_alone(prefix):
    path = fakes.build("fake_ops", PREFIX=prefix, PLATFORM="CUDA", API=VERSION)
    targets = extend.register_library(path)
    assert targets["Host"] == frozenset()
    assert f"{prefix}.shapes" in targets["CUDA"]
    assert f"{prefix}.shapes" in handlers.load("CUDA")
    assert f"{prefix}.shapes" not in handlers.load("Host")


def test_a_library_may_be_registered_again_by_any_name(prefix, tmp_path):
    path = fakes.build("fake_ops", PREFIX=prefix, API=VERSION)
    link = tmp_path / "link.so"
    link.symlink_to(path)
    first = extend.register_library(path)
    assert extend.register_library(str(path)) == first
    assert extend.register_library(link) == first


def test_one_that_comes_after_xla_was_asked_is_registered_too(prefix):
    early, late = f"{prefix}early", f"{prefix}late"
    for name in (early, late):
        extend.register_library(fakes.build("fake_ops", PREFIX=name, API=VERSION))
        assert handlers.available("Host", f"{name}.shapes")


def refused(path) -> str:
    with pytest.raises(ValueError) as error:
        extend.register_library(path)
    return str(error.value)


def test_missing_file(tmp_path):
    path = tmp_path / "none.so"
    rule = "register_library: path must be a file, got"
    assert refused(path) == f"{rule} {path}"
    assert refused(tmp_path) == f"{rule} {tmp_path}"
    assert refused(str(path).encode()) == f"{rule} {path}"
    rule = "register_library: path must be a str or a path, got NoneType"
    with pytest.raises(TypeError, match=rule):
        extend.register_library(None)


def test_what_is_no_library(tmp_path):
    path = tmp_path / "text.so"
    path.write_text("not a library, though long enough to be read as a header" * 10)
    rule = "register_library: path must be a library that loads, got"
    assert re.match(f"{rule} {path}: invalid ELF header", refused(path))


def test_library_that_needs_what_is_not_there():
    path = fakes.build("fake_ops", UNDEFINED=None, API=VERSION)
    rule = "register_library: path must be a library that loads, got"
    assert re.match(f"{rule} {path}: undefined symbol: no_library_has_", refused(path))


def test_library_that_was_cut_short(prefix, tmp_path):
    path = tmp_path / "half.so"
    whole = fakes.build("fake_ops", PREFIX=prefix, API=VERSION).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    rule = "register_library: path must be a whole file for this machine, got"
    assert re.match(f"{rule} {path} was cut short: it has", refused(path))


@pytest.mark.parametrize(
    "macros, function",
    [
        ({"NO_TABLE": None, "API": VERSION}, "xla_ops_handlers"),
        ({}, "xla_ops_api_version"),
    ],
)
def test_library_without_what_an_op_library_exports(macros, function):
    path = fakes.build("fake_ops", **macros)
    assert refused(path) == (
        f"register_library: path must be an op library, got {path}, which does not"
        f" export {function}"
    )


def test_library_of_another_api_version(prefix):
    path = fakes.build("fake_ops", PREFIX=prefix, API=VERSION + 1)
    assert refused(path) == (
        f"register_library: path must be built for API version {VERSION}, with the"
        f" headers in {extend.include_dir()}, got {path} of version {VERSION + 1}"
    )
    assert f"{prefix}.shapes" not in handlers.load("Host")


def test_target_that_another_library_has(prefix, tmp_path):
    path = fakes.build("fake_ops", PREFIX=prefix, API=VERSION)
    extend.register_library(path)
    twin = fakes.copy(path, tmp_path / "twin.so")
    assert refused(twin) == (
        "register_library: path must be an op library with targets of its own, got"
        f" {twin}: handler {prefix}.shapes for Host is in {path} already"
    )


def test_library_whose_table_is_wrong(prefix):
    path = fakes.build("fake_ops", PREFIX=prefix, INCOMPLETE=None, API=VERSION)
    assert refused(path).endswith(f"{path}: its handler table has an incomplete entry")


def test_headers_say_the_version_that_the_package_checks():
    assert xla_ops.include_dir() == extend.include_dir()
    header = extend.include_dir() / "xla_ops" / "cc" / "core" / "registry.h"
    assert f"#define XLA_OPS_API_VERSION {VERSION}\n" in header.read_text()


def test_modules_do_not_hide_the_functions_they_are_named_after():
    code = """
import importlib, types
from xla_ops import extend
for name in extend.__all__:
    place, attribute = extend._PLACES[name]
    importlib.import_module(f"xla_ops.{place}")
    is_module = isinstance(getattr(extend, name), types.ModuleType)
    assert is_module == (not attribute), name
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names_are_there_and_no_others():
    for name in extend.__all__:
        assert getattr(extend, name) is not None
    assert set(extend.__all__) <= set(dir(extend))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        extend.nothing  # noqa: B018
