"""Types of the extension `xla_ops._runtime` (xla_ops/cc/runtime/module.cc).

What each function does is in its docstring there. Tested by
tests/core/test_runtime_stub.py.
"""

from collections.abc import Sequence
from typing import TypedDict, TypeVar

# address, XLA_FFI_DataType, dims
Buffer = tuple[int, int, Sequence[int]]
Attribute = TypeVar(
    "Attribute", bound=bool | int | float | str | Sequence[int] | Sequence[float]
)

class PluginInfo(TypedDict):
    path: str
    error: str
    fix: str
    warning: str
    major: int | None
    minor: int | None
    extensions: list[int]
    custom_call: bool

def load_library(path: str) -> list[tuple[str, str]]: ...
def cuda_archs(path: str) -> str: ...
def cuda_version(path: str) -> int: ...
def plan(
    path: str, function: str, request: Sequence[int], num_results: int
) -> list[int]: ...
def register_cpu(xlac_path: str) -> dict[str, str]: ...
def register_gpu(bridge_path: str) -> dict[str, str]: ...
def registered() -> dict[str, list[str]]: ...
def call(
    target: str,
    platform: str,
    stream: int,
    args: Sequence[Buffer],
    results: Sequence[Buffer],
    attrs: dict[str, Attribute],
) -> None: ...
def open_plugin(bridge_path: str, plugin_path: str) -> None: ...
def find_plugin_info(path: str) -> PluginInfo: ...
def load_lazy_tensors(library: str, tensor: int) -> None: ...
def lazy_tensor_id(tensor: int) -> int: ...
def buffer_holders(tensors: Sequence[int]) -> list[tuple[int, int]]: ...
def _find_symbols(path: str, names: Sequence[str]) -> dict[str, int]: ...
