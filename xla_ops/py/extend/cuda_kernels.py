"""CUDA C++ text as an op.

Tested by tests/extend/test_cuda_kernel.py and, on a GPU, by
tests/gpu/check_user_kernels.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..core import autocast
from ..core.checks import Checker
from ..core.dtypes import dtype_name
from ..core.gradients import Gradient
from ..core.op import Results
from ..core.sharding import Rules
from . import kernel_op, launch, nvrtc
from .kernel_op import Kernel
from .launch import Given, Launch, Machine

Sizes = int | tuple[int, ...]


def cuda_kernel(
    source: str,
    kernel: str | Callable[..., str],
    schema: str,
    *,
    grid: Sizes | Callable[..., Sizes],
    block: Sizes | Callable[..., Sizes],
    results: Callable[..., Any] | None = None,
    parameters: Callable[..., Sequence[Any]] | None = None,
    shared_bytes: int | Callable[..., int] = 0,
    cluster: Sizes = 1,
    options: Sequence[str] = (),
    reference: Callable[..., Results] | None = None,
    gradient: Gradient | None = None,
    splits: Rules | None = None,
    rule: autocast.Rule = autocast.unchanged,
    name: str = "",
) -> Callable[..., Any]:
    """Makes a function of a CUDA kernel, given as text.

    The function takes XLA tensors, lazily and under torch.compile, and torch's CPU and
    CUDA tensors, as the ops of this package do; torch.ops.xla_ops.<name> is the op
    below it. NVRTC compiles the text when a call is first traced for a GPU, for the GPU
    of this machine, and the result is kept on disk. XLA then launches the kernel on its
    own stream. Without a GPU `reference` runs, and says so once.

    Where a function is asked for below, it is called with the arguments of a call, a
    `Given` (shape, dtype, numel(), ...) in the place of each tensor. It runs once for
    each signature: shapes, dtypes and the values of numbers. So a number that changes
    with every call compiles an XLA program for each; pass a tensor of one element.

    Args:
        source: CUDA C++ with at least one __global__ function.
        kernel: its name, or an expression such as "scale<float>"; or a function that
            gives one, which may look at dtypes.
        schema: arguments and results, in torch's schema language: Tensor, int, float
            and bool. "Tensor(a!) x" is written in place.
        grid: blocks, an int or up to three; or a function that gives them.
        block: threads of a block, likewise.
        results: what is computed, a function that gives something with a shape and a
            dtype for each result (an argument, argument.like(shape, dtype), a Spec).
            None: each is like the first tensor. Their memory is not cleared.
        parameters: what the kernel takes, in its order: a function of the arguments and
            then the results, which gives those, numbers, and None for null pointers.
            None: the arguments and then the results. Numbers are converted to the
            kernel's own types.
        shared_bytes: dynamic shared memory of a block, or a function that gives it.
        cluster: blocks of a cluster; 1: no clusters.
        options: NVRTC's, such as "--use_fast_math".
        reference: a function of the same arguments in plain torch. It is given copies
            and returns the new values of written arguments, then the results.
        gradient: how backward differentiates the op; None: it raises.
        splits: which dimensions may be split over devices; None: none.
        rule: what torch.autocast means for it.
        name: of the function and the op; "": that of the kernel.

    Returns:
        The function. Where one argument is written and nothing returned, it works in
        place wherever the ops of this package do, without a copy. Where several are, or
        results are returned too, a compiled program may copy what it writes.

    Raises:
        ValueError: the schema, or later a call, breaks a rule above: a dtype that is
            not the kernel's, a grid beyond CUDA's limits, a source that does not
            compile (with the compiler's log).
        Problem: at a call, there is neither a GPU nor a reference; or no NVRTC.

    Example:
        >>> scale = cuda_kernel(
        ...     '''
        ...     extern "C" __global__ void scale(const float* x, float a, float* out,
        ...                                      int n) {
        ...       int i = blockIdx.x * blockDim.x + threadIdx.x;
        ...       if (i < n) out[i] = a * x[i];
        ...     }''',
        ...     "scale",
        ...     "(Tensor x, float a) -> Tensor",
        ...     parameters=lambda x, a, out: (x, a, out, x.numel()),
        ...     grid=lambda x, a: ceil_div(x.numel(), 256),
        ...     block=256,
        ...     reference=lambda x, a: a * x,
        ... )
        >>> scale(torch.tensor([1.0, 2.0]), 3)
        tensor([3., 6.])
    """
    if not name:
        name = kernel if isinstance(kernel, str) else ""
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(
            f"cuda_kernel: name must be given where the kernel is no name, got {name!r}"
        )
    if not isinstance(source, str) or "__global__" not in source:
        got = f"{type(source).__name__} without one"
        raise ValueError(f"{name}: source must have a __global__ function, got {got}")
    signature = kernel_op.parse(name, schema)
    check = Checker(name)
    is_list = isinstance(options, tuple | list)
    ok = is_list and all(isinstance(option, str) for option in options)
    check.require(ok, "options", "be a list of strs", repr(options))
    names = signature.names
    for argument, value, taken in (
        ("kernel", kernel, names),
        ("grid", grid, names),
        ("block", block, names),
        ("shared_bytes", shared_bytes, names),
        ("results", results, names),
        ("parameters", parameters, names + signature.result_names),
        ("reference", reference, names),
    ):
        kernel_op.check_takes(check, argument, value, taken)
    declared = _CudaKernel(
        check,
        results,
        source,
        kernel,
        grid,
        block,
        parameters,
        shared_bytes,
        cluster,
        tuple(options),
    )
    return kernel_op.define(
        name,
        signature,
        declared,
        reference=reference,
        gradient=gradient,
        splits=splits,
        rule=rule,
        doc=f"The CUDA kernel {name}{schema}; see xla_ops.extend.cuda_kernel.",
    )


@dataclass(frozen=True)
class _CudaKernel(Kernel):
    source: str
    kernel: str | Callable[..., str]
    grid: Sizes | Callable[..., Sizes]
    block: Sizes | Callable[..., Sizes]
    parameters: Callable[..., Sequence[Any]] | None
    shared_bytes: int | Callable[..., int]
    cluster: Sizes
    options: tuple[str, ...]

    def check_call(self, args: Sequence[Any], results: Sequence[Given]) -> None:
        self._sizes(args)
        given = self._given(args, results)
        for i, (kind, value) in enumerate(zip(self._types(args), given, strict=False)):
            allowed = _DTYPES.get(kind)
            if allowed is None or not isinstance(value, Given):
                continue
            self.check.require(
                value.dtype == allowed,
                f"parameter {i}",
                f"be {dtype_name(allowed)}, as the kernel has {kind}*",
                dtype_name(value.dtype),
            )

    def launch(
        self,
        args: Sequence[Any],
        results: Sequence[Given],
        num_values: int,
        machine: Machine,
    ) -> Launch:
        grid, block, cluster, shared_bytes = self._sizes(args)
        most = launch.most_shared_bytes(machine)
        launch.check_shared_bytes(self.check, shared_bytes, most)
        code = nvrtc.compile_source(
            self.check.op,
            self.source,
            self._name(args),
            nvrtc.architecture(machine.capability, exact=machine.is_one_kind),
            self.options,
        )
        given = self._given(args, results)
        return Launch(code, given, grid, block, cluster, shared_bytes)

    def _name(self, args: Sequence[Any]) -> str:
        if isinstance(self.kernel, str):
            return self.kernel
        name = self.kernel(*args)
        self.check.require(isinstance(name, str), "kernel", "give a str", repr(name))
        return name

    def _sizes(self, args: Sequence[Any]) -> tuple[tuple, tuple, tuple, int]:
        found = [
            value(*args) if callable(value) else value
            for value in (self.grid, self.block, self.cluster, self.shared_bytes)
        ]
        return launch.check_sizes(self.check, *found)

    def _given(self, args: Sequence[Any], results: Sequence[Given]) -> Sequence[Any]:
        if self.parameters is None:
            return [*args, *results]
        given = self.parameters(*args, *results)
        is_list = isinstance(given, tuple | list) and not isinstance(given, Given)
        self.check.require(is_list, "parameters", "give a tuple", type(given).__name__)
        return given

    def _types(self, args: Sequence[Any]) -> Sequence[str]:
        """What the text says that the kernel's pointers point to; "" elsewhere."""
        name = self._name(args).partition("<")[0].rpartition("::")[2]
        return pointed_types(self.source, name)


_DTYPES = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "__half": torch.float16,
    "nv_bfloat16": torch.bfloat16,
    "__nv_bfloat16": torch.bfloat16,
    "__nv_fp8_e4m3": torch.float8_e4m3fn,
    "__nv_fp8_e5m2": torch.float8_e5m2,
    "bool": torch.bool,
    "signed char": torch.int8,
    "int8_t": torch.int8,
    "unsigned char": torch.uint8,
    "uint8_t": torch.uint8,
    "short": torch.int16,
    "int16_t": torch.int16,
    "int": torch.int32,
    "int32_t": torch.int32,
    "long": torch.int64,
    "long long": torch.int64,
    "int64_t": torch.int64,
}

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_POINTER = re.compile(r"([\w ]+?)\s*\*\s*(?:const\s+)?(?:__restrict__\s+)?\w+$")


def pointed_types(source: str, kernel: str) -> list[str]:
    """Reads a kernel's parameters in CUDA C++: what each pointer points to.

    A reader of plain declarations, not of C++: what it does not understand (a typedef,
    a template's T, a macro) is left for the compiler, as "".
    """
    text = _COMMENT.sub(" ", source)
    head = re.search(
        rf"__global__[^;{{}}]*?\b{re.escape(kernel)}\s*\(([^()]*)\)\s*\{{", text
    )
    if head is None:
        return []
    types = []
    for parameter in head[1].split(","):
        pointer = _POINTER.search(" ".join(parameter.split()))
        words = pointer[1].split() if pointer else []
        kind = " ".join(w for w in words if w not in ("const", "volatile"))
        types.append(kind if kind in _DTYPES else "")
    return types
