"""A Triton kernel as an op.

Triton compiles it, for a GPU that need not be there, and the launcher of users' kernels
launches it; Triton's own launcher and torch's CUDA are not used.

Tested by tests/extend/test_triton_kernel.py and, on a GPU, by
tests/gpu/check_user_kernels.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..core import autocast
from ..core.checks import Checker
from ..core.errors import Problem
from ..core.gradients import Gradient
from ..core.hlo import Spec
from ..core.op import Results
from ..core.sharding import Rules
from . import kernel_cache, kernel_op, launch, timing
from .kernel_cache import Code
from .kernel_op import Kernel
from .launch import Given, Launch, Machine

# Of these releases it is known how their kernels are called: behind a kernel's own
# parameters stand so many pointers to scratch memory, global and then the profiler's.
_VERSIONS = {(3, 4): 1, (3, 5): 2, (3, 6): 2}
_ALIGNMENT = 16  # bytes; what Triton takes for granted of a pointer it is told of

_lock = threading.Lock()

Sizes = int | tuple[int, ...]


def triton_kernel(
    fn: Any,
    schema: str,
    *,
    grid: Sizes | Callable[..., Sizes],
    results: Callable[..., Any] | None = None,
    parameters: Callable[..., Sequence[Any]] | None = None,
    constants: Mapping[str, Any] | Callable[..., Mapping[str, Any]] | None = None,
    num_warps: int = 4,
    num_stages: int = 3,
    num_ctas: int = 1,
    configs: Sequence[Any] = (),
    reference: Callable[..., Results] | None = None,
    gradient: Gradient | None = None,
    splits: Rules | None = None,
    rule: autocast.Rule = autocast.unchanged,
    name: str = "",
) -> Callable[..., Any]:
    """Makes a function of a @triton.jit kernel, as `cuda_kernel` does of CUDA C++.

    Triton compiles the kernel when a call is first traced for a GPU, and the result is
    kept on disk. As Triton's own launcher does, it makes code of its own for an int
    that is 1 or a multiple of 16, and takes buffers to be aligned to 16 bytes, which a
    call checks.

    With several configurations each is compiled and timed on the GPU, in buffers of
    zeros, when a call of new shapes is first traced, and the fastest is kept on disk,
    for this kernel, signature and kind of GPU.

    Args:
        fn: a function by triton.jit, or by triton.autotune over one.
        schema: arguments and results, in torch's schema language, as for `cuda_kernel`.
        grid: programs, an int or up to three; or a function of the arguments and,
            behind them, a dict of the constants.
        results: see `cuda_kernel`.
        parameters: what the kernel takes besides its constants, in its order; a
            function of the arguments and then the results. None: those.
        constants: values of tl.constexpr parameters; or a function that gives them.
        num_warps, num_stages, num_ctas: as triton.Config has them.
        configs: triton.Config to choose from. Those of triton.autotune by themselves.
        reference, gradient, splits, rule: see `cuda_kernel`.
        name: of the function and the op; "": that of the kernel.

    Returns:
        The function, as `cuda_kernel` makes one.

    Raises:
        ValueError: `fn` is none, or later a call breaks a rule above, or the kernel
            does not compile.
        Problem: at a call, there is neither a GPU nor a reference; or this release of
            Triton is none of those whose kernels are known (3.4 to 3.6).

    Example:
        add = triton_kernel(
            add_kernel,  # @triton.jit, (x, y, out, n, BLOCK: tl.constexpr)
            "(Tensor x, Tensor y) -> Tensor",
            parameters=lambda x, y, out: (x, y, out, x.numel()),
            grid=lambda x, y, meta: ceil_div(x.numel(), meta["BLOCK"]),
            configs=[triton.Config({"BLOCK": n}) for n in (512, 1024, 2048)],
            reference=lambda x, y: x + y,
        )
    """
    own_name = getattr(getattr(fn, "fn", fn), "__name__", "triton_kernel")
    label = name if isinstance(name, str) and name else own_name
    check = Checker(label)
    check.require(isinstance(name, str), "name", "be a str", repr(name))
    jit, tuned = _unwrap(check, fn)
    if configs and tuned:
        raise ValueError(
            f"{label}: configs must be absent where fn is autotuned, got {len(configs)}"
        )
    is_list = isinstance(configs, tuple | list)
    check.require(is_list, "configs", "be a list of triton.Config", repr(configs))
    given = list(configs) or tuned
    for config in given:
        is_one = type(config).__name__ == "Config"
        check.require(is_one, "configs", "be a list of triton.Config", repr(config))
        hook = getattr(config, "pre_hook", None)
        check.require(hook is None, "configs", "have no pre_hook", hook)
    options = {"num_warps": num_warps, "num_stages": num_stages, "num_ctas": num_ctas}
    choices = [_Choice.of(config) for config in given] or [_Choice({}, options)]
    for choice in choices:
        for option, value in choice.options.items():
            ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            ok = ok or (option == "num_stages" and value == 0)
            check.require(ok, option, "be a positive int", repr(value))
    rule_for_constants = "be a dict, a function or None"
    is_some = constants is None or callable(constants) or isinstance(constants, Mapping)
    check.require(is_some, "constants", rule_for_constants, repr(constants))
    signature = kernel_op.parse(label, schema)
    names = signature.names
    for argument, value, taken in (
        ("grid", grid, [*names, "meta"]),
        ("constants", constants, names),
        ("results", results, names),
        ("parameters", parameters, names + signature.result_names),
        ("reference", reference, names),
    ):
        kernel_op.check_takes(check, argument, value, taken)
    kernel = _TritonKernel(
        check, results, jit, grid, parameters, constants or {}, tuple(choices)
    )
    return kernel_op.define(
        label,
        signature,
        kernel,
        reference=reference,
        gradient=gradient,
        splits=splits,
        rule=rule,
        doc=f"The Triton kernel {label}{schema}; see xla_ops.extend.triton_kernel.",
    )


def _unwrap(check: Checker, fn: Any) -> tuple[Any, list[Any]]:
    """Returns the function by triton.jit, and the configurations of triton.autotune."""
    configs = []
    if type(fn).__name__ == "Autotuner":
        prunes = fn.early_config_prune is not None or fn.perf_model is not None
        rule = "be autotuned without prune_configs_by"
        check.require(not prunes, "fn", rule, "one with it")
        configs, fn = list(fn.configs), fn.fn
    kind = type(fn).__name__
    rule = "be a function by triton.jit, or by triton.autotune over one"
    check.require(kind == "JITFunction", "fn", rule, kind)
    return fn, configs


class _Call(NamedTuple):
    """What `Kernel.launch` is given."""

    args: Sequence[Any]
    results: Sequence[Given]
    num_values: int
    machine: Machine


class _Choice(NamedTuple):
    """One configuration: constants, and options of the compiler."""

    constants: Mapping[str, Any]
    options: Mapping[str, Any]

    @staticmethod
    def of(config: Any) -> _Choice:
        options = {
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "num_ctas": config.num_ctas,
        }
        if getattr(config, "maxnreg", None) is not None:
            options["maxnreg"] = config.maxnreg
        return _Choice(dict(config.kwargs), options)


class _Specialised(NamedTuple):
    """What Triton compiles for: types, constants and what is known of values.

    Attributes:
        types: of every parameter, "constexpr" where it is one.
        constants: position -> value, where a parameter is one.
        aligned: positions of what is a multiple of 16.
        given: what the compiled kernel takes.
    """

    types: Mapping[str, str]
    constants: Mapping[int, Any]
    aligned: tuple[int, ...]
    given: tuple[Any, ...]


_TYPES = {
    torch.bool: "*i1",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}


@dataclass(frozen=True)
class _TritonKernel(Kernel):
    fn: Any
    grid: Sizes | Callable[..., Sizes]
    parameters: Callable[..., Sequence[Any]] | None
    constants: Mapping[str, Any] | Callable[..., Mapping[str, Any]]
    choices: tuple[_Choice, ...]

    def check_call(self, args: Sequence[Any], results: Sequence[Given]) -> None:
        given = self._given(args, results)
        for choice in self.choices:
            constants = self._constants(args, choice)
            self._sizes(args, choice, constants)
            self._specialise(given, constants)

    def launch(
        self,
        args: Sequence[Any],
        results: Sequence[Given],
        num_values: int,
        machine: Machine,
    ) -> Launch:
        call = _Call(args, results, num_values, machine)
        if len(self.choices) == 1:
            return self._launch(call, self.choices[0])
        key = kernel_cache.key_of(
            "tuning",
            _version(),
            self.fn.cache_key,
            machine,
            [repr(value) for value in (*args, *results)],
            [repr(choice) for choice in self.choices],
        )
        note = kernel_cache.load_note(key) or {}
        best = note.get("best")
        if isinstance(best, int) and 0 <= best < len(self.choices):
            return self._launch(call, self.choices[best])
        return self._tune(call, key)

    def _tune(self, call: _Call, key: str) -> Launch:
        """Times each configuration that compiles, and keeps which is the fastest."""
        compiled: dict[int, Launch] = {}
        error: Exception | None = None
        for i, choice in enumerate(self.choices):
            try:
                compiled[i] = self._launch(call, choice)
            except ValueError as why:
                error = why
        if not compiled:
            assert error is not None
            raise error
        buffers = {g.position: g for g in call.args if isinstance(g, Given)}
        operands = [Spec(g.shape, g.dtype) for _, g in sorted(buffers.items())]
        # The values of what is written come first; no kernel is told where they are.
        written = [Spec((0,), torch.uint8)] * (call.num_values - len(call.results))
        values = [*written, *(Spec(g.shape, g.dtype) for g in call.results)]
        times = timing.microseconds(
            self.check, list(compiled.values()), operands, values
        )
        measured = {
            i: us for i, us in zip(compiled, times, strict=True) if us is not None
        }
        if not measured:
            raise ValueError(
                f"{self.check.op}: configs must have one that can be launched, got"
                f" {len(self.choices)} that cannot"
            )
        best = min(measured, key=lambda i: measured[i])
        note = {"best": best, "us": {str(i): us for i, us in measured.items()}}
        kernel_cache.store_note(key, note)
        return compiled[best]

    def _launch(self, call: _Call, choice: _Choice) -> Launch:
        constants = self._constants(call.args, choice)
        grid, block = self._sizes(call.args, choice, constants)
        given = self._given(call.args, call.results)
        special = self._specialise(given, constants)
        code = self._compile(special, choice, call.machine)
        shared_bytes = code.facts["shared"]
        most = launch.most_shared_bytes(call.machine)
        launch.check_shared_bytes(self.check, shared_bytes, most)
        cluster = tuple(code.facts["cluster"])
        grid = tuple(n * size for n, size in zip(grid, cluster, strict=True))
        scratch: tuple[Spec, ...] = ()
        extra: list[Given | None] = [None] * _VERSIONS[_version()[:2]]
        if code.facts["global_scratch"]:
            count = grid[0] * grid[1] * grid[2]
            scratch = (Spec((count * code.facts["global_scratch"],), torch.uint8),)
            position = call.num_values
            extra[0] = Given(scratch[0].shape, torch.uint8, position, is_result=True)
        return Launch(
            code,
            (*special.given, *extra),
            grid,
            block,
            cluster,
            shared_bytes,
            _ALIGNMENT,
            scratch,
        )

    def _constants(self, args: Sequence[Any], choice: _Choice) -> dict[str, Any]:
        declared = self.constants(*args) if callable(self.constants) else self.constants
        is_dict = isinstance(declared, Mapping)
        self.check.require(is_dict, "constants", "give a dict", repr(declared))
        given = {**declared, **choice.constants}
        names = [p.name for p in self.fn.params if p.is_constexpr]
        for p in self.fn.params:
            if p.is_constexpr and p.name not in given and p.has_default:
                given[p.name] = p.default
        self.check.require(
            given.keys() == set(names),
            "constants",
            f"be those of the kernel, {names}",
            sorted(given),
        )
        return given

    def _sizes(
        self, args: Sequence[Any], choice: _Choice, constants: Mapping[str, Any]
    ) -> tuple[tuple, tuple]:
        grid = self.grid(*args, constants) if callable(self.grid) else self.grid
        threads = 32 * choice.options["num_warps"]
        return launch.check_sizes(self.check, grid, threads, 1, 0)[:2]

    def _given(self, args: Sequence[Any], results: Sequence[Given]) -> Sequence[Any]:
        if self.parameters is None:
            given: Sequence[Any] = [*args, *results]
        else:
            given = self.parameters(*args, *results)
        names = [p.name for p in self.fn.params if not p.is_constexpr]
        is_list = isinstance(given, tuple | list) and not isinstance(given, Given)
        got = f"{len(given)}" if is_list else type(given).__name__
        fits = is_list and len(given) == len(names)
        self.check.require(fits, "parameters", f"be those of the kernel, {names}", got)
        return given

    def _specialise(
        self, given: Sequence[Any], constants: Mapping[str, Any]
    ) -> _Specialised:
        """Decides, as Triton's own launcher does, what code is made for."""
        types: dict[str, str] = {}
        known: dict[int, Any] = {}
        aligned: list[int] = []
        taken: list[Any] = []
        values = iter(given)
        for i, p in enumerate(self.fn.params):
            if p.is_constexpr:
                types[p.name], known[i] = "constexpr", constants[p.name]
                continue
            value = next(values)
            kind = self._type_of(p, value)
            types[p.name] = kind
            if kind == "constexpr":
                known[i] = value
                continue
            is_int = isinstance(value, int) and not isinstance(value, bool)
            is_free = not (p.do_not_specialize or p.do_not_specialize_on_alignment)
            if isinstance(value, Given) or (is_int and is_free and value % 16 == 0):
                aligned.append(i)
            taken.append(value)
        return _Specialised(types, known, tuple(aligned), tuple(taken))

    def _type_of(self, p: Any, value: Any) -> str:
        if isinstance(value, Given):
            return _TYPES[value.dtype]
        if value is None:
            return "constexpr"
        is_number = isinstance(value, bool | int | float)
        rule = "be a buffer, a number or None"
        self.check.require(is_number, f"parameter {p.name}", rule, repr(value))
        if isinstance(value, bool):
            return p.annotation_type or "i1"
        if isinstance(value, float):
            return p.annotation_type or "fp32"
        if value == 1 and not p.do_not_specialize:
            return "constexpr"
        if p.annotation_type:
            return p.annotation_type
        if -(2**31) <= value < 2**31:
            return "i32"
        fits = -(2**63) <= value < 2**64
        self.check.require(fits, f"parameter {p.name}", "fit in 8 bytes", value)
        return "i64" if value < 2**63 else "u64"

    def _compile(
        self, special: _Specialised, choice: _Choice, machine: Machine
    ) -> Code:
        version = _version()
        key = kernel_cache.key_of(
            "triton",
            version,
            self.fn.cache_key,
            machine.capability,
            machine.is_one_kind,
            sorted(special.types.items()),
            [(i, repr(value)) for i, value in sorted(special.constants.items())],
            special.aligned,
            sorted(choice.options.items()),
        )
        with _lock:
            code = kernel_cache.load(key)
            if code is None:
                code = self._compiled(special, choice, machine)
                kernel_cache.store(key, code)
        return code

    def _compiled(
        self, special: _Specialised, choice: _Choice, machine: Machine
    ) -> Code:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        source = ASTSource(
            fn=self.fn,
            signature=dict(special.types),
            constexprs={(i,): value for i, value in special.constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i in special.aligned},
        )
        major, minor = machine.capability
        target = GPUTarget("cuda", 10 * major + minor, 32)
        try:
            made = triton.compile(source, target=target, options=dict(choice.options))
        except Exception as error:
            raise ValueError(
                f"{self.check.op}: fn must compile for compute capability"
                f" {major}.{minor} with {dict(choice.constants)}, got\n{error}"
            ) from error
        about = made.metadata
        for feature in (
            "launch_cooperative_grid",
            "launch_pdl",
            "profile_scratch_size",
        ):
            value = getattr(about, feature, 0)
            self.check.require(not value, "fn", f"need no {feature}", value)
        ptx = made.asm["ptx"]
        parameters = kernel_cache.parameters_of(ptx, about.name) or ()
        wanted = len(special.given) + _VERSIONS[_version()[:2]]
        if len(parameters) != wanted:
            raise Problem(
                f"{self.check.op}: Triton {triton.__version__} gives its kernel"
                f" {len(parameters)} parameters, of which {wanted} are known",
                "install triton 3.5.0, which torch 2.9.0 pins",
            )
        image = made.asm["cubin"] if machine.is_one_kind else ptx.encode() + b"\0"
        facts = {
            "shared": about.shared,
            "cluster": list(getattr(about, "cluster_dims", (about.num_ctas, 1, 1))),
            "global_scratch": about.global_scratch_size,
        }
        return Code(image, about.name, parameters, facts)


def _version() -> tuple[int, int, str]:
    """Of Triton. Raises Problem where it is none whose kernels are known."""
    import triton

    major, minor = (int(word) for word in triton.__version__.split(".")[:2])
    if (major, minor) not in _VERSIONS:
        known = " or ".join(f"{a}.{b}" for a, b in _VERSIONS)
        raise Problem(
            f"triton_kernel: Triton must be {known}, got {triton.__version__}",
            "install triton 3.5.0, which torch 2.9.0 pins",
        )
    return major, minor, triton.__version__
