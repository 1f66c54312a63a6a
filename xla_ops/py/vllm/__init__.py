"""vLLM on XLA: its op names on XLA tensors (lowerings)."""

from .lowerings import *  # noqa: F403
