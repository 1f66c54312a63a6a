"""Fixtures of the tests of ops."""

import pytest

import xla_ops
from xla_ops.core.op import OPS
from xla_ops.ops import attention


@pytest.fixture
def debug_mode():
    xla_ops.set_debug(True)
    yield
    xla_ops.set_debug(False)


@pytest.fixture
def lowered(monkeypatch):
    """Collects the calls that the op is lowered to during a test."""
    calls = []
    lower = attention._lower

    def record(*args):
        calls.append(lower(*args))
        return calls[-1]

    monkeypatch.setattr(attention, "_lower", record)
    OPS["flash_attn_varlen"]._plans.clear()  # what was lowered before
    return calls
