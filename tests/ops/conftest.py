"""Fixtures of the tests of ops."""

import pytest

from xla_ops.core.op import OPS
from xla_ops.ops import attention


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
