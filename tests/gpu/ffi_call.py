"""Calls a typed-FFI handler on torch tensors: without XLA, JAX or the wheel.

    library = ffi_call.Library("lib", "attention_backward", "cuda")
    call = library.call("flash_attn_varlen_backward", operands, results, attributes)
    call()  # on torch's current stream, as often as wanted

The call frame of xla/ffi/api/c_api.h, version 0.1, by ctypes. Operands and results are
dense tensors, None where absent; attributes are ints, floats, bools and strings.
"""

from __future__ import annotations

import ctypes
import pathlib
from collections.abc import Callable, Mapping, Sequence

import torch

_DTYPES = {
    torch.bool: 1,
    torch.int8: 2,
    torch.int32: 4,
    torch.int64: 5,
    torch.uint8: 6,
    torch.float16: 10,
    torch.float32: 11,
    torch.float64: 12,
    torch.bfloat16: 16,
    torch.float8_e5m2: 19,
    torch.float8_e4m3fn: 20,
}
_INITIALIZE, _EXECUTE = 2, 3
_SCALAR, _STRING = 3, 4

_Pointer, _Size, _Int = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_Int64 = ctypes.c_int64


def _struct(**fields):
    """A structure of XLA's: its size and a list of extensions, then the fields."""
    first = [("struct_size", _Size), ("extension_start", _Pointer)]
    return type("Struct", (ctypes.Structure,), {"_fields_": [*first, *fields.items()]})


def _new(kind, **values):
    return kind(struct_size=ctypes.sizeof(kind), **values)


class _Span(ctypes.Structure):
    _fields_ = (("text", ctypes.c_char_p), ("size", _Size))


class _Scalar(ctypes.Structure):
    _fields_ = (("dtype", _Int), ("value", _Pointer))


_Buffer = _struct(dtype=_Int, data=_Pointer, rank=_Int64, dims=_Pointer)
_List = _struct(size=_Int64, types=_Pointer, values=_Pointer)
_Attributes = _struct(size=_Int64, types=_Pointer, names=_Pointer, values=_Pointer)
_Frame = _struct(
    api=_Pointer,
    context=_Pointer,
    stage=_Int,
    args=_List,
    rets=_List,
    attrs=_Attributes,
    future=_Pointer,
)
_Version = _struct(major=_Int, minor=_Int)
_Create = _struct(message=ctypes.c_char_p, code=_Int)
_GetMessage = _struct(error=_Pointer, message=ctypes.c_char_p)
_Destroy = _struct(error=_Pointer)
_GetStream = _struct(context=_Pointer, stream=_Pointer)
_Schedule = _struct(context=_Pointer, task=_Pointer, data=_Pointer)
_NumThreads = _struct(context=_Pointer, number=ctypes.POINTER(_Int64))

_Callback = ctypes.CFUNCTYPE(_Pointer, _Pointer)
_Task = ctypes.CFUNCTYPE(None, _Pointer)


class _Api:
    """What a handler may ask: errors, the stream, and a pool of no thread.

    Tasks run at once, in the thread that calls.
    """

    # In the order of XLA_FFI_Api.
    _FUNCTIONS = (
        *("Error_Create", "Error_GetMessage", "Error_Destroy", "Handler_Register"),
        *("Stream_Get", "TypeId_Register", "ExecutionContext_Get", "State_Set"),
        *("State_Get", "DeviceMemory_Allocate", "DeviceMemory_Free"),
        *("ThreadPool_Schedule", "ThreadPool_NumThreads", "Future_Create"),
        *("Future_SetAvailable", "Future_SetError", "RunId_Get", "DeviceOrdinal_Get"),
    )

    def __init__(self) -> None:
        self.messages: dict[int, bytes] = {}
        self.stream = 0
        self._count = 0
        kind = _struct(
            version=_Version,
            internal=_Pointer,
            **dict.fromkeys(self._FUNCTIONS, _Pointer),
        )
        own = {
            "Error_Create": self._create,
            "Error_GetMessage": self._get_message,
            "Error_Destroy": self._destroy,
            "Stream_Get": self._get_stream,
            "ThreadPool_Schedule": self._schedule,
            "ThreadPool_NumThreads": self._num_threads,
        }
        self._callbacks = {name: _Callback(f) for name, f in own.items()}
        self.struct = _new(kind, version=_new(_Version, major=0, minor=1))
        for name, callback in self._callbacks.items():
            setattr(self.struct, name, ctypes.cast(callback, _Pointer))

    def _create(self, args):
        self._count += 1
        self.messages[self._count] = _Create.from_address(args).message
        return self._count

    def _get_message(self, args):
        given = _GetMessage.from_address(args)
        given.message = self.messages[given.error]

    def _destroy(self, args):
        del self.messages[_Destroy.from_address(args).error]

    def _get_stream(self, args):
        _GetStream.from_address(args).stream = self.stream

    def _schedule(self, args):
        given = _Schedule.from_address(args)
        _Task(given.task)(given.data)

    def _num_threads(self, args):
        _NumThreads.from_address(args).number[0] = 1


_api = _Api()


def _array(kind, values):
    return (kind * max(len(values), 1))(*values)


def _addresses(things):
    return _array(_Pointer, [ctypes.addressof(thing) for thing in things])


class _Arguments:
    """Everything that a frame points to; it is kept as long as the frame."""

    def __init__(self, operands, results, attributes):
        self.kept = [operands, results]
        self.args = self._buffers(operands)
        self.rets = self._buffers(results)
        self.attrs = self._attributes(sorted(attributes.items()))

    def _keep(self, thing):
        self.kept.append(thing)
        return ctypes.addressof(thing)

    def _buffers(self, tensors):
        buffers = []
        for t in tensors:
            # An absent one's type is not looked at.
            t = torch.empty(0) if t is None else t
            assert t.is_contiguous()
            dims = self._keep(_array(_Int64, t.shape))
            buffers.append(
                _new(
                    _Buffer,
                    dtype=_DTYPES[t.dtype],
                    data=t.data_ptr(),
                    rank=t.dim(),
                    dims=dims,
                )
            )
        self.kept.append(buffers)
        types = self._keep(_array(_Int, [1] * len(buffers)))
        values = self._keep(_addresses(buffers))
        return _new(_List, size=len(buffers), types=types, values=values)

    def _attributes(self, pairs):
        types, names, values = [], [], []
        for name, value in pairs:
            names.append(_Span(name.encode(), len(name)))
            if isinstance(value, str):
                types.append(_STRING)
                values.append(_Span(value.encode(), len(value)))
                continue
            kind, dtype = {
                bool: (ctypes.c_bool, torch.bool),
                int: (_Int64, torch.int64),
                float: (ctypes.c_float, torch.float32),
            }[type(value)]
            types.append(_SCALAR)
            values.append(_Scalar(_DTYPES[dtype], self._keep(kind(value))))
        self.kept += [names, values]
        return _new(
            _Attributes,
            size=len(pairs),
            types=self._keep(_array(_Int, types)),
            names=self._keep(_addresses(names)),
            values=self._keep(_addresses(values)),
        )


class Library:
    """libxla_ops_OP_PLATFORM.so of a folder; platform is "cpu" or "cuda"."""

    def __init__(self, folder: str, op: str, platform: str):
        path = pathlib.Path(folder) / f"libxla_ops_{op}_{platform}.so"
        self.library = ctypes.CDLL(str(path.absolute()))
        self.op = op
        self.platform = platform

    def plan(self, request: Sequence[int], num_results: int) -> list[int]:
        """Asks xla_ops_OP_plan; the sizes of the structures are left out."""
        function = getattr(self.library, f"xla_ops_{self.op}_plan")
        function.restype = ctypes.c_char_p
        sizes = [8 * (1 + len(request)), *request]
        result = (_Int64 * (1 + num_results))(8 * (1 + num_results))
        error = function((_Int64 * len(sizes))(*sizes), result)
        if error:
            raise ValueError(error.decode())
        return list(result)[1:]

    def call(
        self,
        target: str,
        operands: Sequence[torch.Tensor | None],
        results: Sequence[torch.Tensor],
        attributes: Mapping[str, int | float | bool | str],
    ) -> Callable[[], None]:
        """Returns a function that runs the handler, on torch's stream of then."""
        arguments = _Arguments(operands, results, attributes)
        if self.platform == "cuda":
            self._run(f"xla_ops_{target}_initialize_cuda", _INITIALIZE, arguments)
        symbol = f"xla_ops_{target}_{self.platform}"
        return lambda: self._run(symbol, _EXECUTE, arguments)

    def _run(self, symbol, stage, arguments):
        frame = _new(
            _Frame,
            api=ctypes.addressof(_api.struct),
            context=ctypes.addressof(_api.struct),  # opaque to a handler
            stage=stage,
            args=arguments.args,
            rets=arguments.rets,
            attrs=arguments.attrs,
        )
        # Without the future, which version 0.1 does not count.
        frame.struct_size = _Frame.future.offset
        if self.platform == "cuda":
            _api.stream = torch.cuda.current_stream().cuda_stream
        function = getattr(self.library, symbol)
        function.restype = _Pointer
        error = function(ctypes.byref(frame))
        if error:
            raise RuntimeError(_api.messages.pop(error).decode())
