"""vLLM's entry point to its engine on XLA: `register`, in the group of its platforms.

vLLM calls it in every process that imports vLLM, also where it runs on CUDA beside an
installed xla_ops. So it stands beside the package xla_ops, not in it, and imports
nothing: the platform is named only where the environment asks for it.

Tested by tests/vllm/test_plugin.py.
"""

from __future__ import annotations

import os

_DEVICES = ("CPU", "GPU", "CUDA")


def register() -> str | None:
    """Names the platform where PJRT_DEVICE or VLLM_PLUGINS asks for it, else None."""
    plugins = os.environ.get("VLLM_PLUGINS", "").split(",")
    if os.environ.get("PJRT_DEVICE") in _DEVICES or "xla_ops" in plugins:
        return "xla_ops.vllm.platform.XlaPlatform"
    return None
