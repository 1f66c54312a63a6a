"""Encodes one custom call as an HloModuleProto.

torch_xla's own custom-call node hashes only the target's name, so two calls that
differ in an attribute would share a program, and it cannot alias results to operands.
A user computation has neither fault: its hash covers the whole proto. The few message
fields that one custom call needs are written here by hand (field numbers:
xla/service/hlo.proto and xla/xla_data.proto, which are stable), so no protobuf runtime
is needed and none can clash with the one inside torch_xla.
"""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .dtypes import primitive_type
from .lazy import torch

AttributeValue = bool | int | float | str

_TUPLE = 13  # PrimitiveType of tuples
_API_VERSION_TYPED_FFI = 4

# OpSharding.Type
_TUPLE_SHARDING = 2
_OTHER = 3
_MANUAL_TYPE = 4


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
    body = _Body()
    ids = []
    operand_shapes = [_array_shape(spec) for spec in operands]
    for i, shape in enumerate(operand_shapes):
        if i in absent:
            literal = _message(8, _message(1, shape))
            ids.append(body.add("absent", "constant", shape, literal))
        else:
            ids.append(body.parameter(shape))
    result_shapes = [_array_shape(spec) for spec in results]
    is_tuple = len(results) > 1
    result_shape = _tuple_shape(result_shapes) if is_tuple else result_shapes[0]
    indices = _alias_indices(aliases, is_tuple)
    fields = _typed_call(target, ids, operand_shapes, backend_config, indices)
    body.add("custom-call", "custom-call", result_shape, fields)
    return body.module(target, result_shape)


class Split(NamedTuple):
    """How an array lies on the devices.

    Attributes:
        tiles: into how many pieces each dimension is cut; all 1: every device has the
            whole array.
        devices: which device has which piece, in row-major order of the pieces; where
            there are more devices than pieces, those that share one stand together.
    """

    tiles: tuple[int, ...]
    devices: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        return all(n == 1 for n in self.tiles)

    def shard(self, spec: Spec) -> Spec:
        """Returns what one device has of an array that can be cut so."""
        pairs = zip(spec.shape, self.tiles, strict=True)
        return Spec(tuple(size // n for size, n in pairs), spec.dtype)


class ShardedArray(NamedTuple):
    """A whole array and how it lies on the devices."""

    spec: Spec
    split: Split

    @property
    def shard(self) -> Spec:
        return self.split.shard(self.spec)


def encode_sharded_module(
    target: str,
    operands: Sequence[ShardedArray],
    results: Sequence[ShardedArray],
    scratch: Sequence[Spec],
    backend_config: str,
    aliases: Mapping[int, int],
    absent: Sequence[int] = (),
) -> bytes:
    """Returns an HloModuleProto that calls the handler once a device, on its shards.

    Around the call the partitioner is told what it cannot know of a custom call: each
    operand is annotated with its sharding and handed over as the device's shard
    (SPMDFullToShardShape), the call is marked as written for one device already
    ("manual"), and the results are put together again (SPMDShardToFullShape), which
    moves nothing either.

    Args:
        results: those that the caller sees; more than one gives a tuple.
        scratch: what one device's call works in, after the results.
        The others are as in `encode_module`, attributes for one device's call.
    """
    body = _Body()
    shards: list[int] = []
    shard_shapes = [_array_shape(array.shard) for array in operands]
    for i, (spec, split) in enumerate(operands):
        shape, shard = _array_shape(spec), shard_shapes[i]
        if i in absent:
            literal = _message(8, _message(1, shape)) + _MANUAL_SHARDING
            shards.append(body.add("absent", "constant", shape, literal))
            continue
        whole = body.parameter(shape)
        annotated = body.marker("Sharding", shape, whole, _split(split))
        shards.append(body.marker(_TO_SHARD, shard, annotated, _MANUAL_SHARDING))
    local = [_array_shape(array.shard) for array in results]
    local += [_array_shape(spec) for spec in scratch]
    is_tuple = len(local) > 1
    call = body.add(
        "custom-call",
        "custom-call",
        _tuple_shape(local) if is_tuple else local[0],
        _typed_call(
            target,
            shards,
            shard_shapes,
            backend_config,
            _alias_indices(aliases, is_tuple),
        )
        + (_tuple_sharding([_MANUAL] * len(local)) if is_tuple else _MANUAL_SHARDING),
    )
    wholes = []
    for i, (spec, split) in enumerate(results):
        one = call
        if is_tuple:
            element = _packed(36, [call]) + _integer(13, i) + _MANUAL_SHARDING
            one = body.add("element", "get-tuple-element", local[i], element)
        shape = _array_shape(spec)
        wholes.append(body.marker(_TO_WHOLE, shape, one, _split(split)))
    result_shape = _array_shape(results[0].spec)
    if len(results) > 1:
        result_shape = _tuple_shape([_array_shape(array.spec) for array in results])
        shardings = _tuple_sharding([_op_sharding(array.split) for array in results])
        body.add("whole", "tuple", result_shape, _packed(36, wholes) + shardings)
    return body.module(target, result_shape)


class _Body:
    """The instructions of a module's one computation; the last one is its root."""

    def __init__(self) -> None:
        self._instructions: list[bytes] = []
        self._parameter_shapes: list[bytes] = []

    def add(self, name: str, opcode: str, shape: bytes, fields: bytes) -> int:
        """Adds an instruction and returns its id."""
        n = len(self._instructions) + 1
        # XlaBuilder aborts on computation and instruction names without a ".".
        instruction = _instruction(f"{name}.{n}", opcode, shape, n) + fields
        self._instructions.append(instruction)
        return n

    def parameter(self, shape: bytes) -> int:
        number = len(self._parameter_shapes)
        self._parameter_shapes.append(shape)
        return self.add(f"p{number}", "parameter", shape, _integer(9, number))

    def marker(self, target: str, shape: bytes, operand: int, sharding: bytes) -> int:
        """Adds a call that says something of its operand to the partitioner."""
        fields = _text(28, target) + _packed(36, [operand]) + sharding
        return self.add("marker", "custom-call", shape, fields)

    def module(self, name: str, result_shape: bytes) -> bytes:
        root = len(self._instructions)
        computation_id = root + 1
        shapes = self._parameter_shapes
        program_shape = b"".join(_message(1, s) for s in shapes)
        program_shape += _message(2, result_shape)
        program_shape += b"".join(_text(3, f"p{n}") for n in range(len(shapes)))
        entry = f"main.{computation_id}"
        computation = (
            _text(1, entry)
            + b"".join(_message(2, i) for i in self._instructions)
            + _message(4, program_shape)
            + _integer(5, computation_id)
            + _integer(6, root)
        )
        return (
            _text(1, name)
            + _text(2, entry)
            + _message(3, computation)
            + _message(4, program_shape)
            + _integer(5, 1)
            + _integer(6, computation_id)
        )


def _alias_indices(
    aliases: Mapping[int, int], is_tuple: bool
) -> dict[tuple[int, ...], int]:
    """Result index, as XLA names a part of the call's result -> operand."""
    return {
        ((index,) if is_tuple else ()): operand for index, operand in aliases.items()
    }


def _typed_call(
    target: str,
    operands: Sequence[int],
    operand_shapes: Sequence[bytes],
    backend_config: str,
    aliases: Mapping[tuple[int, ...], int],
) -> bytes:
    """The fields that make a custom call one of the typed FFI."""
    return (
        _text(28, target)
        + _packed(36, operands)
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


def _op_sharding(split: Split) -> bytes:
    """Returns an OpSharding: replicated (all fields left out) or a list of tiles."""
    if split.is_whole:
        return b""
    pieces = math.prod(split.tiles)
    copies = len(split.devices) // pieces
    tiles = split.tiles if copies == 1 else (*split.tiles, copies)
    return (
        _integer(1, _OTHER)
        + _packed(3, tiles)
        + _packed(4, split.devices)
        + _integer(6, copies > 1)
    )


def _split(split: Split) -> bytes:
    return _message(40, _op_sharding(split))


def _tuple_sharding(parts: Sequence[bytes]) -> bytes:
    return _message(
        40, _integer(1, _TUPLE_SHARDING) + b"".join(_message(5, p) for p in parts)
    )


def _instruction(name: str, opcode: str, shape: bytes, instruction_id: int) -> bytes:
    return (
        _text(1, name)
        + _text(2, opcode)
        + _message(3, shape)
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
        # Not by struct, which refuses what is infinite as a float32.
        (bits,) = struct.unpack("<I", bytes(ctypes.c_float(value)))
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


# What XLA's partitioner knows by name.
_TO_SHARD = "SPMDFullToShardShape"
_TO_WHOLE = "SPMDShardToFullShape"

# The sharding of what is one device's own.
_MANUAL = _integer(1, _MANUAL_TYPE)
_MANUAL_SHARDING = _message(40, _MANUAL)
