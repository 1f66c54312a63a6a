"""An op from outside xla_ops: its handlers are built by ../CMakeLists.txt."""

from __future__ import annotations

import pathlib

import torch

from xla_ops.extend import (
    Backward,
    Checker,
    CustomCall,
    Gradient,
    Op,
    ShardingRule,
    Spec,
    autocast,
    mutable,
    register_library,
)

for _library in sorted(pathlib.Path(__file__).parent.glob("libmine_*.so")):
    register_library(_library)

_FLOATS = [torch.float32, torch.float16, torch.bfloat16]
_check = Checker("scale_rows")


def scale_rows(input: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiplies each row of `input` [rows, columns] by its number of `scale` [rows].

    torch.ops.xla_ops.mine_scale_rows.out(result, input, scale) writes into a tensor.
    """
    return _op(input, scale)


def _lower(input: torch.Tensor, scale: torch.Tensor) -> CustomCall:
    _check.rank("input", input, "[rows, columns]")
    _check.dtype("input", input, _FLOATS)
    _check.dtype("scale", scale, [torch.float32])
    _check.shape("scale", scale, input.shape[:1])
    _check.same_device("input", input, scale=scale)
    return CustomCall(
        "mine.scale_rows",
        ("input", "scale"),
        (Spec.of(input),),
        may_overwrite={0: "input"},
    )


def _reference(input: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (input.float() * scale[:, None]).to(input.dtype)


def _backward(backward: Backward) -> dict[str, torch.Tensor]:
    input, scale = backward.args["input"], backward.args["scale"]
    assert isinstance(input, torch.Tensor) and isinstance(scale, torch.Tensor)
    (grad,) = backward.grads
    assert grad is not None
    found = {}
    if "input" in backward.wanted:
        found["input"] = _op(grad, scale)
    if "scale" in backward.wanted:
        found["scale"] = (grad.float() * input.float()).sum(1)
    return found


# All ops live in torch.ops.xla_ops, so the name begins with the package's.
_op = Op(
    "mine_scale_rows",
    "(Tensor input, Tensor scale) -> Tensor",
    _lower,
    _reference,
    autocast=autocast.float32("scale"),
    splits=ShardingRule(
        {"input": "tokens columns", "scale": "tokens"}, ("tokens columns",)
    ),
    gradient=Gradient(_backward, keeps=("input", "scale")),
    public_name="scale_rows",
)

mutable.define(
    "mine_scale_rows.out(Tensor(a!) result, Tensor input, Tensor scale) -> ()",
    lambda result, input, scale: mutable.Update(
        _op, (input, scale), {"result": result}
    ),
    autocast=autocast.float32("scale"),
)
