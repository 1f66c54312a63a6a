"""Encodes one custom call as an HloModuleProto.

torch_xla's own custom-call node hashes only the target's name, so two calls that
differ in an attribute would share a program, and it cannot alias results to operands.
A user computation has neither fault: its hash covers the whole proto. The few message
fields that one custom call needs are written here by hand (field numbers:
xla/service/hlo.proto and xla/xla_data.proto, which are stable), so no protobuf runtime
is needed and none can clash with the one inside torch_xla.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from .dtypes import primitive_type

AttributeValue = bool | int | float | str

_TUPLE = 13  # PrimitiveType of tuples
_API_VERSION_TYPED_FFI = 4


class Spec(NamedTuple):
    """Shape and dtype of an operand or a result."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(t: torch.Tensor) -> Spec:
        return Spec(tuple(t.shape), t.dtype)


def encode_attributes(attributes: Mapping[str, AttributeValue]) -> str:
    """Returns the MLIR dictionary that XLA parses into typed FFI attributes.

    int becomes i64, float f32 (by bit pattern, so that infinities and every last bit
    survive), bool i1 and str a string.
    """
    items = (f"{name} = {_attribute(v)}" for name, v in attributes.items())
    return "{" + ", ".join(items) + "}"


def encode_module(
    target: str,
    operands: Sequence[Spec],
    results: Sequence[Spec],
    backend_config: str,
    aliases: Mapping[int, int],
    absent: Sequence[int] = (),
) -> bytes:
    """Returns a serialised HloModuleProto whose root is one typed-FFI custom call.

    Args:
        target: name under which the handler is registered.
        operands: the call's operands: the module's parameters, but for absent ones.
        results: the call's results; more than one gives a tuple.
        backend_config: typed FFI attributes, from `encode_attributes`.
        aliases: result index -> index of the operand whose buffer it shares.
        absent: indices of operands of no element; they are constants of the module,
            so that a call passes nothing for them.
    """
    operand_shapes = [_array_shape(s) for s in operands]
    result_shapes = [_array_shape(s) for s in results]
    result_shape = (
        result_shapes[0] if len(results) == 1 else _tuple_shape(result_shapes)
    )
    # XlaBuilder aborts on computation and instruction names without a ".".
    instructions: list[bytes] = []
    parameter_shapes: list[bytes] = []
    for i, shape in enumerate(operand_shapes):
        if i in absent:
            literal = _message(8, _message(1, shape))
            instructions.append(
                _instruction(f"absent.{i + 1}", "constant", shape, i + 1) + literal
            )
            continue
        n = len(parameter_shapes)
        parameter_shapes.append(shape)
        instructions.append(
            _instruction(f"p{n}.{i + 1}", "parameter", shape, i + 1, parameter_number=n)
        )
    root_id = len(operands) + 1
    instructions.append(
        _custom_call(
            root_id,
            target,
            result_shape,
            operand_shapes,
            backend_config,
            {
                ((index,) if len(results) > 1 else ()): operand
                for index, operand in aliases.items()
            },
        )
    )
    program_shape = b"".join(_message(1, s) for s in parameter_shapes)
    program_shape += _message(2, result_shape)
    program_shape += b"".join(_text(3, f"p{n}") for n in range(len(parameter_shapes)))
    computation_id = root_id + 1
    entry = f"main.{computation_id}"
    computation = (
        _text(1, entry)
        + b"".join(_message(2, i) for i in instructions)
        + _message(4, program_shape)
        + _integer(5, computation_id)
        + _integer(6, root_id)
    )
    return (
        _text(1, target)
        + _text(2, entry)
        + _message(3, computation)
        + _message(4, program_shape)
        + _integer(5, 1)
        + _integer(6, computation_id)
    )


def _custom_call(
    instruction_id: int,
    target: str,
    result_shape: bytes,
    operand_shapes: Sequence[bytes],
    backend_config: str,
    aliases: Mapping[tuple[int, ...], int],
) -> bytes:
    fields = (
        _text(28, target)
        + _packed(36, range(1, len(operand_shapes) + 1))
        + _text(43, backend_config)
        # Operands arrive in row-major order: a layout chosen elsewhere costs a copy.
        + _integer(56, 1)
        + b"".join(_message(57, s) for s in operand_shapes)
        + b"".join(
            _message(74, _packed(1, index) + _integer(2, operand))
            for index, operand in sorted(aliases.items())
        )
        + _integer(77, _API_VERSION_TYPED_FFI)
    )
    return (
        _instruction(
            f"custom-call.{instruction_id}",
            "custom-call",
            result_shape,
            instruction_id,
        )
        + fields
    )


def _instruction(
    name: str,
    opcode: str,
    shape: bytes,
    instruction_id: int,
    parameter_number: int = 0,
) -> bytes:
    return (
        _text(1, name)
        + _text(2, opcode)
        + _message(3, shape)
        + _integer(9, parameter_number)
        + _integer(35, instruction_id)
    )


def _array_shape(spec: Spec) -> bytes:
    rank = len(spec.shape)
    minor_to_major = _packed(1, range(rank - 1, -1, -1))
    return (
        _integer(2, primitive_type(spec.dtype))
        + _packed(3, spec.shape)
        + _message(5, minor_to_major)
    )


def _tuple_shape(shapes: Sequence[bytes]) -> bytes:
    return _integer(2, _TUPLE) + b"".join(_message(4, s) for s in shapes)


def _attribute(value: AttributeValue) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"{value} : i64"
    if isinstance(value, float):
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
        return f"0x{bits:08X} : f32"
    if isinstance(value, str):
        return '"' + "".join(_escape(byte) for byte in value.encode()) + '"'
    raise TypeError(f"attribute must be bool, int, float or str, got {value!r}")


def _escape(byte: int) -> str:
    plain = 0x20 <= byte < 0x7F and byte not in b'"\\'
    return chr(byte) if plain else f"\\{byte:02X}"


# Protobuf wire format. Scalars that are zero are left out, as proto3 has it.
def _varint(n: int) -> bytes:
    n &= (1 << 64) - 1
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value) if value else b""


def _message(field: int, payload: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(payload)) + payload


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())


def _packed(field: int, values: Sequence[int]) -> bytes:
    payload = b"".join(_varint(v) for v in values)
    return _message(field, payload) if payload else b""
