"""Loads a LoRA adapter before a request that names it is taken.

vLLM's engine reads an adapter in the first step of a request for it. One that cannot be
read ends the engine there, and with it everybody's requests. So the clients of the
engine ask for the adapter first, as vLLM's server does for the adapters it is started
with: who names a bad one gets a ValueError, and nobody else notices.

Tested by tests/engine/test_lora.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.llm_engine import LLMEngine


def install() -> None:
    """Has vLLM's engine clients of this process load adapters first."""
    if hasattr(LLMEngine.add_request, "__wrapped__"):
        return
    LLMEngine.add_request = _with_adapter(LLMEngine.add_request)
    LLMEngine.remove_lora = _forgetting(LLMEngine.remove_lora)
    AsyncLLM.add_request = _with_adapter_async(AsyncLLM.add_request)
    AsyncLLM.remove_lora = _forgetting(AsyncLLM.remove_lora)


def _known(engine: Any) -> set[tuple[int, str]]:
    """The adapters that an engine has been asked for."""
    return vars(engine).setdefault("_xla_ops_adapters", set())


def _key(request: LoRARequest) -> tuple[int, str]:
    return request.lora_int_id, request.lora_path


def _asked(engine: Any, bound: inspect.BoundArguments) -> LoRARequest | None:
    """The adapter that a request names, if the engine has not been asked for it."""
    if engine.vllm_config.lora_config is None:
        return None  # vLLM says so
    prompt = bound.arguments["prompt"]
    request = getattr(prompt, "lora_request", None)
    request = request or bound.arguments.get("lora_request")
    return None if request is None or _key(request) in _known(engine) else request


def _refused(request: LoRARequest, error: Exception) -> ValueError:
    return ValueError(f"LoRA {request.lora_name} ({request.lora_path}): {error}")


def _with_adapter(add_request: Callable) -> Callable:
    signature = inspect.signature(add_request)

    @functools.wraps(add_request)
    def wrapper(self: LLMEngine, *args: Any, **kwargs: Any) -> None:
        if request := _asked(self, signature.bind(self, *args, **kwargs)):
            try:
                self.engine_core.add_lora(request)
            except EngineDeadError:
                raise
            except Exception as error:  # of another process, any class
                raise _refused(request, error) from error
            _known(self).add(_key(request))
        add_request(self, *args, **kwargs)

    return wrapper


def _with_adapter_async(add_request: Callable) -> Callable:
    signature = inspect.signature(add_request)

    @functools.wraps(add_request)
    async def wrapper(self: AsyncLLM, *args: Any, **kwargs: Any) -> Any:
        if request := _asked(self, signature.bind(self, *args, **kwargs)):
            try:
                await self.engine_core.add_lora_async(request)
            except EngineDeadError:
                raise
            except Exception as error:
                raise _refused(request, error) from error
            _known(self).add(_key(request))
        return await add_request(self, *args, **kwargs)

    return wrapper


def _forgetting(remove_lora: Callable) -> Callable:
    @functools.wraps(remove_lora)
    def wrapper(self: Any, lora_id: int) -> Any:
        for key in [key for key in _known(self) if key[0] == lora_id]:
            _known(self).discard(key)
        return remove_lora(self, lora_id)

    return wrapper
