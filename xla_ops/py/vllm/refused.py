"""Calls of a running engine that XLA has no answer to, refused where they are made.

vLLM hands them on to the worker, which is in another process as a rule. Its server
would answer with an error 500 that says nothing, and have emptied the prefix cache.

Tested by tests/engine/test_platform.py and test_serve.py.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, NoReturn

from fastapi import HTTPException
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.llm_engine import LLMEngine


class CallRefused(NotImplementedError, HTTPException):
    """What vLLM's server answers by its text, with the status 501."""

    def __init__(self, text: str):
        HTTPException.__init__(self, HTTPStatus.NOT_IMPLEMENTED, text)

    def __str__(self) -> str:
        return self.detail


def refuse(name: str) -> NoReturn:
    """Raises the refusal of a call by its name."""
    hint = ": use torch_xla.debug.profiler" if "profile" in name else ""
    raise CallRefused(f"xla_ops: {name} must not be called on XLA, got a call{hint}")


def install() -> None:
    """Has vLLM's engine clients of this process refuse these calls."""
    for name in ("sleep", "start_profile", "stop_profile"):
        setattr(LLMEngine, name, _refusing(name))
        setattr(AsyncLLM, name, _refusing_async(name))


def _refusing(name: str) -> Any:
    def call(self: LLMEngine, *args: Any, **kwargs: Any) -> NoReturn:
        refuse(name)

    return call


def _refusing_async(name: str) -> Any:
    async def call(self: AsyncLLM, *args: Any, **kwargs: Any) -> NoReturn:
        refuse(name)

    return call
