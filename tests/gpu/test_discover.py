"""Which of the installed CUDA plugins is taken (gpu/discover.py)."""

from __future__ import annotations

import importlib
import sys

import pytest

import fakes
from xla_ops.gpu import discover


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A Python environment of its own; returns a function that installs a discover."""
    monkeypatch.delenv(discover.PLUGIN_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.startswith("jax_plugins")]:
        monkeypatch.delitem(sys.modules, name)

    def install(name, version):
        path = tmp_path / "jax_plugins" / f"xla_{name}" / "xla_cuda_plugin.so"
        fakes.copy(fakes.build("fake_pjrt_plugin"), path)
        info = tmp_path / f"jax_{name}_pjrt-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: jax-{name}-pjrt\nVersion: {version}\n"
        )
        importlib.invalidate_caches()
        return path

    importlib.invalidate_caches()
    return install


def test_no_plugin_installed(installed):
    fix = r"none is installed: install xla_ops\[cuda13\], or xla_ops\[cuda12\] for"
    with pytest.raises(RuntimeError, match=fix):
        discover.find_plugin()


def test_one_plugin_installed(installed):
    path = installed("cuda13", "0.7.2")
    assert discover.find_plugin() == path
    assert discover.describe_plugin(path) == f"{path} (jax-cuda13-pjrt 0.7.2)"


def test_metadata_that_was_left_empty_tells_no_version(installed, tmp_path):
    path = installed("cuda13", "0.7.2")
    (tmp_path / "jax_cuda13_pjrt-0.7.2.dist-info" / "METADATA").write_text("")
    importlib.invalidate_caches()
    assert discover.describe_plugin(path) == str(path)


def test_two_plugins_installed(installed, monkeypatch):
    first = installed("cuda12", "0.7.1")
    second = installed("cuda13", "0.12.0.1")
    with pytest.raises(RuntimeError, match="2 CUDA plugins are installed") as info:
        discover.find_plugin()
    text = str(info.value)
    assert f"{first} (jax-cuda12-pjrt 0.7.1)" in text
    assert f"{second} (jax-cuda13-pjrt 0.12.0.1)" in text
    assert "set XLA_OPS_PJRT_PLUGIN" in text and "pip uninstall" in text
    monkeypatch.setenv(discover.PLUGIN_VARIABLE, str(second))
    assert discover.find_plugin() == second


def test_named_plugin_that_does_not_exist(monkeypatch):
    monkeypatch.setenv(discover.PLUGIN_VARIABLE, "/no/such.so")
    with pytest.raises(RuntimeError, match="XLA_OPS_PJRT_PLUGIN must be the path of"):
        discover.find_plugin()
