"""Where the shards of a sharded tensor lie on torch_xla's CPU devices.

torch_xla tells the address of a buffer on one device only. So a handler of the typed
FFI, written here with ctypes (structs of xla/ffi/api/c_api.h), tells that of what it is
called with.
"""

import ctypes
import functools
import itertools

import torch
import torch_xla
import torch_xla.core.xla_builder as xb

from xla_ops import _runtime
from xla_ops.core import hlo, sharding

_WORD = ctypes.c_size_t
_TARGET = "tests.address"
_METADATA = 1  # XLA_FFI_Extension_Metadata
_EXECUTE = 3  # XLA_FFI_ExecutionStage_EXECUTE


class _Extension(ctypes.Structure):
    _fields_ = [
        ("size", _WORD),
        ("type", ctypes.c_int),
        ("next", ctypes.c_void_p),
        ("metadata", ctypes.POINTER(_WORD * 5)),
    ]


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("size", _WORD),
        ("extension", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("data", ctypes.c_void_p),
    ]


class _Buffers(ctypes.Structure):
    _fields_ = [
        ("size", _WORD),
        ("extension", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("types", ctypes.c_void_p),
        ("buffers", ctypes.POINTER(ctypes.POINTER(_Buffer))),
    ]


class _CallFrame(ctypes.Structure):
    _fields_ = [
        ("size", _WORD),
        ("extension", ctypes.POINTER(_Extension)),
        ("api", ctypes.c_void_p),
        ("context", ctypes.c_void_p),
        ("stage", ctypes.c_int),
        ("args", _Buffers),
        ("results", _Buffers),
    ]


class _Registration(ctypes.Structure):
    _fields_ = [
        ("size", _WORD),
        ("extension", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("name_size", _WORD),
        ("platform", ctypes.c_char_p),
        ("platform_size", _WORD),
        ("stages", ctypes.c_void_p * 3),
        ("execute", ctypes.c_void_p),
        ("traits", ctypes.c_uint32),
    ]


@ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_CallFrame))
def _handler(frame):
    call = frame[0]
    if call.extension and call.extension[0].type == _METADATA:
        # {size, {size, extension, major and minor, ...}}: the API is version 0.1.
        call.extension[0].metadata[0][3] = 1 << 32
        return None
    result = ctypes.cast(call.results.buffers[0][0].data, ctypes.POINTER(ctypes.c_long))
    result[0] = call.args.buffers[0][0].data
    return None


@functools.cache
def _register():
    path = torch_xla._XLAC.__file__
    found = _runtime._find_symbols(
        path, ["_ZN3xla3ffi12GetXlaFfiApiEv", "PyInit__XLAC"]
    )
    exported = ctypes.cast(ctypes.CDLL(path).PyInit__XLAC, ctypes.c_void_p).value
    base = exported - found["PyInit__XLAC"]
    get_api = ctypes.CFUNCTYPE(ctypes.c_void_p)(
        base + found["_ZN3xla3ffi12GetXlaFfiApiEv"]
    )
    # size, extension, version of three words, internal API, three functions.
    functions = ctypes.cast(get_api(), ctypes.POINTER(ctypes.c_void_p))
    register = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_Registration))(
        functions[2 + 3 + 1 + 3]
    )
    name, platform = _TARGET.encode(), b"Host"
    error = register(
        _Registration(
            ctypes.sizeof(_Registration),
            None,
            name,
            len(name),
            platform,
            len(platform),
            (ctypes.c_void_p * 3)(),
            ctypes.cast(_handler, ctypes.c_void_p),
            0,
        )
    )
    assert not error


@functools.cache
def _computation(spec: str, operand: hlo.Spec):
    count = sharding.num_devices()
    split = sharding.split(sharding.parse(spec) or (None,) * len(operand.shape))
    assert split is not None
    whole = hlo.ShardedArray(operand, split)
    one_each = hlo.Split((count,), tuple(range(count)))
    result = hlo.ShardedArray(hlo.Spec((count,), torch.int64), one_each)
    module = hlo.encode_sharded_module(_TARGET, [whole], [result], [], "{}", {})
    return xb.computation_from_module_proto(_TARGET, module)


_calls = itertools.count()


def shard_addresses(tensors) -> list[list[int]]:
    """Returns, for each XLA tensor, the address of its shard on each device."""
    _register()
    torch_xla.sync(wait=True)
    found = []
    for t in tensors:
        torch._functionalize_sync(t)
        value = torch._from_functional_tensor(t)
        spec = torch_xla._XLAC._get_xla_sharding_spec(value)
        computation = _computation(spec, hlo.Spec.of(t))
        result = torch_xla._XLAC._xla_user_computation(
            "tests::address", [value], computation
        )
        found.append(result[0].cpu().tolist())
    return found
