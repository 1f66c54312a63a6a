"""Lets code written for vLLM's compiled ops run on XLA tensors.

After `register_lowerings()`, torch.ops._C.rms_norm and the other ops below, and so the
functions of vllm._custom_ops and flash_attn_varlen_func, take XLA tensors: lazily,
through views, under inference mode and under torch.compile(backend="openxla"). vLLM's
compiled libraries need not be there. Where they are, their CUDA (or CPU) kernels, and
the graphs that torch.compile makes of them, stay as they were.

    import vllm._custom_ops as ops
    import xla_ops.vllm

    xla_ops.vllm.register_lowerings()
    ops.rms_norm(out, x, weight, 1e-6)  # out, x and weight on an XLA device

Each op calls the mutable front of the same name, torch.ops.xla_ops.<name>, which says
what the op computes and what it checks. docs/vllm_ops.md tells how the dispatcher gets
there. The schemas are those of vLLM 0.11.1 to 0.13.0.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .. import ops as _ops  # noqa: F401, defines torch.ops.xla_ops.*
from ..core import tracing
from ..core.errors import warn_user

# Every lowering by op name, for register_lowerings.
_registrars: dict[str, Callable[[], None]] = {}
# What keeps the registrations alive, by namespace and op.
_libraries: dict[tuple[str, str], torch.library.Library] = {}
# The compiled library that defines each namespace.
_MODULES = {
    "_C": "vllm._C",
    "_C_cache_ops": "vllm._C",
    "_vllm_fa2_C": "vllm.vllm_flash_attn._vllm_fa2_C",
}


def register_lowerings() -> None:
    """Makes every op below work on XLA tensors.

    Imports vLLM's compiled libraries first, those that can be imported: they cannot be
    loaded once their ops are defined here. Warns of one that is installed and cannot.
    Calling again does nothing.

    Raises:
        ValueError: an op of vLLM's has another schema than the one known here.
    """
    for register in _registrars.values():
        register()


def _lowering(
    name: str,
    arguments: str,
    *,
    returns: str = "()",
    namespace: str = "_C",
    op: str | None = None,
    overload: str = "out",
) -> Callable[[], None]:
    """Makes the function that registers one op.

    Args:
        name: of the front.
        arguments, returns: of vLLM's op, in torch's schema language.
        namespace, op: vLLM's op is torch.ops.<namespace>.<op>; None: the front's name.
        overload: of the front, torch.ops.xla_ops.<name>.<overload>.
    """
    op = op or name

    def register() -> None:
        if (namespace, op) not in _libraries:
            front = getattr(getattr(torch.ops.xla_ops, name), overload)
            schema = f"({arguments}) -> {returns}"
            _register(register.__name__, namespace, op, schema, front)

    register.__name__ = register.__qualname__ = f"register_{name}_lowering"
    register.__doc__ = f"""Makes torch.ops.{namespace}.{op} work on XLA tensors.

    The same as `register_lowerings`, for this op alone.
    """
    _registrars[name] = register
    return register


def _register(
    caller: str, namespace: str, name: str, schema: str, front: Callable
) -> None:
    _load(_MODULES[namespace])
    packet = getattr(getattr(torch.ops, namespace), name, None)
    library = torch.library.Library(namespace, "FRAGMENT")
    if packet is None:
        library.define(name + schema)
        library.impl(name, tracing.untraced(front), "CompositeImplicitAutograd")
    else:
        op = packet.default
        known = torch._C.parse_schema(f"{namespace}::{name}{schema}")
        if op._schema != known:
            raise ValueError(
                f"{caller}: torch.ops.{namespace}.{name} must have the schema {known}, "
                f"got {op._schema}"
            )
        _add_to_kernels(library, op, front)
    _libraries[namespace, name] = library


@functools.cache
def _load(module: str) -> None:
    """Loads a compiled library of vLLM's, if there is one.

    Warns where there is and it cannot be loaded, as where it was built for another
    torch: vLLM alone would fail, here the ops are then xla_ops' own for all devices.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        # No vLLM, or none that is compiled. Another module that it lacks is news.
        if not error.name or not f"{module}.".startswith(f"{error.name}."):
            _warn_unloadable(module, error)
    except (ImportError, OSError) as error:
        _warn_unloadable(module, error)


def _warn_unloadable(module: str, error: Exception) -> None:
    warn_user(
        f"xla_ops.vllm: {module} is installed and cannot be loaded"
        f" ({type(error).__name__}: {error}). Its ops are those of xla_ops in this"
        " process, on CPU and CUDA tensors too; install a vLLM built for torch"
        f" {torch.__version__} and this machine to have its own."
    )


def _add_to_kernels(
    library: torch.library.Library,
    op: torch._ops.OpOverload,
    front: Callable,
) -> None:
    """Gives `op`, which has kernels for other devices, `front` for the rest.

    A kernel on the XLA key would come after functionalization, which rejects mutable
    ops; one on AutogradXLA is passed over under inference mode, and one on
    Functionalize would change how torch.compile treats the op on CUDA.
    CompositeImplicitAutograd is right for XLA in all modes and gives way to a device's
    own kernel, except that tracing prefers a decomposition to a kernel. So tracing is
    told, by the kernel that it looks for first (py_impl), that the op has none for such
    devices.
    """

    def kernel(*args: Any) -> Any:
        # Fake tensors of other devices look like meta tensors to a kernel, and ask for
        # shapes only: nothing to do where nothing is returned.
        if op._schema.returns or not any(t.is_meta for t in _tensors(args)):
            return front(*args)
        return None

    def decomposition(*args: Any) -> Any:
        if any(_has_own_kernel(op, t) for t in _tensors(args)):
            return NotImplemented
        return kernel(*args)

    library.impl(op, tracing.untraced(kernel), "CompositeImplicitAutograd")
    op.py_impl(torch._C.DispatchKey.CompositeImplicitAutograd)(decomposition)


def _has_own_kernel(op: torch._ops.OpOverload, t: torch.Tensor) -> bool:
    # A functionalization wrapper is past the point where the own kernel could be used.
    if type(t) is torch.Tensor and torch._is_functional_tensor(t):
        return False
    key = torch._C._dispatch_key_for_device(t.device.type)
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key)


def _tensors(args: tuple) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(args) if isinstance(t, torch.Tensor)]


register_rms_norm_lowering = _lowering(
    "rms_norm", "Tensor! result, Tensor input, Tensor weight, float epsilon"
)
register_fused_add_rms_norm_lowering = _lowering(
    "fused_add_rms_norm",
    "Tensor! input, Tensor! residual, Tensor weight, float epsilon",
    overload="default",
)
register_rms_norm_static_fp8_quant_lowering = _lowering(
    "rms_norm_static_fp8_quant",
    "Tensor! result, Tensor input, Tensor weight, Tensor scale, float epsilon",
)
register_fused_add_rms_norm_static_fp8_quant_lowering = _lowering(
    "fused_add_rms_norm_static_fp8_quant",
    "Tensor! result, Tensor input, Tensor! residual, Tensor weight, Tensor scale,"
    " float epsilon",
)
register_rms_norm_dynamic_per_token_quant_lowering = _lowering(
    "rms_norm_dynamic_per_token_quant",
    "Tensor! result, Tensor input, Tensor weight, Tensor! scale, float epsilon,"
    " Tensor? scale_ub, Tensor!? residual",
)
register_rotary_embedding_lowering = _lowering(
    "rotary_embedding",
    "Tensor positions, Tensor! query, Tensor!? key, int head_size,"
    " Tensor cos_sin_cache, bool is_neox",
    overload="default",
)
register_fused_qk_norm_rope_lowering = _lowering(
    "fused_qk_norm_rope",
    "Tensor! qkv, int num_heads_q, int num_heads_k, int num_heads_v, int head_dim,"
    " float eps, Tensor q_weight, Tensor k_weight, Tensor cos_sin_cache, bool is_neox,"
    " Tensor position_ids",
    overload="default",
)
register_silu_and_mul_lowering = _lowering(
    "silu_and_mul", "Tensor! result, Tensor input"
)
register_mul_and_silu_lowering = _lowering("mul_and_silu", "Tensor! out, Tensor input")
register_gelu_and_mul_lowering = _lowering("gelu_and_mul", "Tensor! out, Tensor input")
register_gelu_tanh_and_mul_lowering = _lowering(
    "gelu_tanh_and_mul", "Tensor! out, Tensor input"
)
register_silu_and_mul_quant_lowering = _lowering(
    "silu_and_mul_quant", "Tensor! result, Tensor input, Tensor scale"
)
register_fatrelu_and_mul_lowering = _lowering(
    "fatrelu_and_mul", "Tensor! out, Tensor input, float threshold"
)
register_swigluoai_and_mul_lowering = _lowering(
    "swigluoai_and_mul",
    "Tensor! out, Tensor input, float alpha=1.702, float limit=7.0",
    overload="default",
)
register_gelu_new_lowering = _lowering("gelu_new", "Tensor! out, Tensor input")
register_gelu_fast_lowering = _lowering("gelu_fast", "Tensor! out, Tensor input")
register_gelu_quick_lowering = _lowering("gelu_quick", "Tensor! out, Tensor input")
register_apply_repetition_penalties__lowering = _lowering(
    "apply_repetition_penalties_",
    "Tensor! logits, Tensor prompt_mask, Tensor output_mask,"
    " Tensor repetition_penalties",
    overload="default",
)
register_static_scaled_fp8_quant_lowering = _lowering(
    "static_scaled_fp8_quant", "Tensor! result, Tensor input, Tensor scale"
)
register_dynamic_scaled_fp8_quant_lowering = _lowering(
    "dynamic_scaled_fp8_quant", "Tensor! result, Tensor input, Tensor! scale"
)
register_dynamic_per_token_scaled_fp8_quant_lowering = _lowering(
    "dynamic_per_token_scaled_fp8_quant",
    "Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub",
)
register_static_scaled_int8_quant_lowering = _lowering(
    "static_scaled_int8_quant",
    "Tensor! result, Tensor input, Tensor scale, Tensor? azp",
)
register_dynamic_scaled_int8_quant_lowering = _lowering(
    "dynamic_scaled_int8_quant",
    "Tensor! result, Tensor input, Tensor! scale, Tensor!? azp",
)
register_merge_attn_states_lowering = _lowering(
    "merge_attn_states",
    "Tensor! output, Tensor!? output_lse, Tensor prefix_output, Tensor prefix_lse,"
    " Tensor suffix_output, Tensor suffix_lse",
)
register_flash_attn_varlen_lowering = _lowering(
    "flash_attn_varlen",
    "Tensor! q, Tensor k, Tensor v, Tensor!? out, Tensor cu_seqlens_q,"
    " Tensor cu_seqlens_k, Tensor? seqused_k, Tensor? leftpad_k, Tensor? block_table,"
    " Tensor? alibi_slopes, int max_seqlen_q, int max_seqlen_k, float p_dropout,"
    " float softmax_scale, bool zero_tensors, bool is_causal, int window_size_left,"
    " int window_size_right, float softcap, bool return_softmax, Generator? gen",
    returns="Tensor[]",
    namespace="_vllm_fa2_C",
    op="varlen_fwd",
)
register_reshape_and_cache_flash_lowering = _lowering(
    "reshape_and_cache_flash",
    "Tensor key, Tensor value, Tensor! key_cache, Tensor! value_cache,"
    " Tensor slot_mapping, str kv_cache_dtype, Tensor k_scale, Tensor v_scale",
    namespace="_C_cache_ops",
    overload="default",
)
register_reshape_and_cache_lowering = _lowering(
    "reshape_and_cache",
    "Tensor key, Tensor value, Tensor! key_cache, Tensor! value_cache,"
    " Tensor slot_mapping, str kv_cache_dtype, Tensor k_scale, Tensor v_scale",
    namespace="_C_cache_ops",
    overload="default",
)
register_convert_fp8_lowering = _lowering(
    "convert_fp8",
    "Tensor! dst_cache, Tensor src_cache, float scale, str kv_cache_dtype",
    namespace="_C_cache_ops",
    overload="default",
)
register_swap_blocks_lowering = _lowering(
    "swap_blocks",
    "Tensor src, Tensor! dst, Tensor block_mapping",
    namespace="_C_cache_ops",
    overload="default",
)
register_copy_blocks_lowering = _lowering(
    "copy_blocks",
    "Tensor(a!)[] key_caches, Tensor[](b!) value_caches, Tensor block_mapping",
    namespace="_C_cache_ops",
    overload="default",
)

__all__ = ["register_lowerings"]
__all__ += [register.__name__ for register in _registrars.values()]
