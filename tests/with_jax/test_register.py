"""What JAX is told of handlers, and what users are where there is none."""

import shutil

import jax.numpy as jnp
import pytest
from jax_arrays import random

import xla_ops.jax as xj
from xla_ops.core import handlers, paths
from xla_ops.core.errors import Problem
from xla_ops.jax import arrays, registration


def test_registers_every_handler_of_the_platform():
    xj.rms_norm(random((1, 8)), jnp.ones(8))
    loaded = {
        target
        for target in handlers.load(handlers.HOST)
        if not target.startswith("test.")
    }
    assert registration._registered["cpu"] == loaded


def test_missing_library_is_told_by_name(tmp_path, monkeypatch):
    state = handlers._Platform(handlers.HOST, "cpu", dict)
    monkeypatch.setitem(handlers._platforms, handlers.HOST, state)
    monkeypatch.setitem(registration._registered, "cpu", set())
    monkeypatch.setattr(paths, "LIB", tmp_path)
    shutil.copy(paths.__file__, tmp_path / "libxla_ops_rms_norm_cpu.so")
    with pytest.raises(Problem) as caught:
        xj.rms_norm(random((1, 24)), jnp.ones(24))
    assert str(caught.value).startswith(
        "rms_norm: handler must be there for Host, got none: no op library that loads"
    )


def test_platform_without_handlers(monkeypatch):
    monkeypatch.setattr(arrays, "platform", lambda: "tpu")
    monkeypatch.setattr("xla_ops.jax.call.platform", lambda: "tpu")
    with pytest.raises(ValueError) as caught:
        xj.rms_norm(random((1, 8)), jnp.ones(8))
    assert str(caught.value) == "rms_norm: device must be a CPU or a GPU, got tpu"
