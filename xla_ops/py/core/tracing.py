"""The graph that is being traced, if one is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import sympy
import torch
from torch._C._dynamo import eval_frame
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.fx.experimental import proxy_tensor
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

_Kernel = TypeVar("_Kernel", bound=Callable)
_SKIP = eval_frame._FrameAction.SKIP


def untraced(kernel: _Kernel) -> _Kernel:
    """Has Dynamo leave a kernel, and all that it calls, alone; returns the kernel.

    Where Dynamo has given a function up, as at a break of its graph in a `with`, it
    traces the functions that run from there, each by itself: also one that torch's
    dispatcher or autograd calls, and whatever this package does in there.
    """
    # Another op, as a kernel, has kernels of its own.
    if not isinstance(kernel, torch._ops.OpOverload):
        code = getattr(kernel, "__func__", kernel).__code__
        strategy = eval_frame._FrameExecStrategy(_SKIP, _SKIP)
        eval_frame.set_code_exec_strategy(code, strategy)
    return kernel


def is_plain(t: torch.Tensor) -> bool:
    """Whether `t` is itself a tensor in memory: no fake one, and none that is traced.

    So are a parameter, and a tensor of a subclass that leaves dispatch to torch.
    """
    kind = type(t)
    return kind is torch.Tensor or (
        kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    )


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work that has tensors of its own.

    Those look like tensors in memory (`is_plain`) and have none. Not functionalize,
    whose tensors are those that everything here knows.
    """
    top = torch._C._functorch.peek_interpreter_stack()
    return top is not None and top.key() != _FUNCTIONALIZE


_FUNCTIONALIZE = torch._C._functorch.TransformType.Functionalize


def has_tangent(t: torch.Tensor) -> bool:
    """Whether forward mode differentiates in `t`."""
    if forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(t).tangent is not None


def is_recorded() -> bool:
    """Whether make_fx takes down what is called, of tensors in memory too."""
    return proxy_tensor.get_proxy_mode() is not None


def node_of(t: torch.Tensor) -> torch.fx.Node | None:
    """Returns the node of `t`'s value in the graph being traced, if any."""
    if not isinstance(t, FunctionalTensor):
        return None
    mode = proxy_tensor.get_proxy_mode()
    if mode is None:
        return None
    slot = proxy_tensor.get_proxy_slot(
        torch._from_functional_tensor(t.elem), mode.tracer, None, lambda p: p.proxy
    )
    return None if slot is None else slot.node


def remade_inputs() -> list[torch.fx.Node]:
    """`remade_in` of the graph that is being traced; [] where none is."""
    mode = proxy_tensor.get_proxy_mode()
    return [] if mode is None else remade_in(mode.tracer.graph)


def remade_in(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """The inputs of a graph for XLA that AOTAutograd makes anew of the base they share.

    It does so where one input is a view of another, or both of a third, and the graph
    updates one: by aten.as_strided at the offset that XLA tensors report, which is
    always 0. So such a view has wrong values.
    """
    nodes = graph.find_nodes(
        op="call_function", target=torch.ops.aten.as_strided.default
    )
    # AOTAutograd's come from no node of the user's function, and take an input as it
    # is: functionalization makes views of other values anew, too.
    return [
        node
        for node in nodes
        if "from_node" not in node.meta and _is_input(node.args[0]) and _is_on_xla(node)
    ]


def _is_input(node: object) -> bool:
    """Whether a node is an input of its graph, or a copy of one."""
    while isinstance(node, torch.fx.Node) and node.target in _COPIES:
        node = node.args[0]
    return isinstance(node, torch.fx.Node) and node.op == "placeholder"


_COPIES = (torch.ops.aten.clone.default, torch.ops.aten.detach.default)


def _is_on_xla(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.device.type == "xla"


def from_sizes(values: Sequence[int], sizes: Sequence[int]) -> tuple[int, ...]:
    """Returns `values` as they follow from `sizes`, in the graph being traced.

    Of a stride or an offset that is symbolic a graph asks the tensor each time it runs.
    That tensor may then lie elsewhere: an XLA tensor knows of no stride, and Inductor
    lays out anew what it computes.

    Args:
        values: ints, or symbols that a fake tensor below the graph has.
        sizes: of a tensor of the graph. What does not follow from them becomes a
            constant, to which the graph is tied.
    """
    known: dict[sympy.Symbol, torch.SymInt] = {}
    for size in sizes:
        if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
            known[size.node.expr] = size
    return tuple(_from_symbols(value, known) for value in values)


def _from_symbols(value: int, known: dict[sympy.Symbol, torch.SymInt]) -> int:
    if not isinstance(value, torch.SymInt):
        return value
    expression = value.node.expr
    if not expression.free_symbols <= known.keys():
        return int(value)
    return sympy_interp(PythonReferenceAnalysis, known, expression)
