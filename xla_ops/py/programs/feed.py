"""Inputs and results of a program's steps, through memory that host and device see.

A transfer to a GPU waits for the program that runs, so that the next one, queued behind
it, waits for the transfer; and the host hears of a transfer from there a millisecond or
two late while it launches a program. A decode step of a few milliseconds feels both.
Here the host writes a step's input where its program reads it, and reads the results
where the program leaves them (xla_ops/cc/ops/host_feed).

    feed = HostFeed(in_elements=100, out_elements=8)

    @replay
    def step(number):
        data, following = feed.receive(number, 100)
        return feed.send(compute(data), number), following

    feed.begin(100)[:] = ...          # the host's
    _, following = step(feed.number())
    fed = feed.end(following)
    fed.result(8)                     # waits, and nothing else does

Tested by tests/programs/test_feed.py; on a GPU benchmarks/vllm_engine.py runs it.
"""

from __future__ import annotations

import ctypes
import os

import numpy as np
import torch
import torch_xla
import torch_xla.core.xla_model as xm

from .. import _runtime
from ..core import handlers, paths, tracing
from ..core.custom_call import CustomCall, call_in_graph
from ..core.hlo import Spec
from ..gpu import options
from .calls import is_lost

_OP = "host_feed"
_MAX_CHANNELS = 2  # XLA_OPS_HOST_FEED_CHANNELS
_NUMBERS = 1 << 32
# How long somebody looks at memory before he asks the client instead.
_PATIENCE_US = 1_000_000

_library = torch.library.Library("xla_ops", "FRAGMENT")
_library.define("host_infeed(Tensor step, int elements, int feed) -> (Tensor, Tensor)")
_library.define(
    "host_outfeed(Tensor values, Tensor step, int feed, int channel) -> Tensor"
)


class HostFeed:
    """The inputs and results of steps that run one after the other.

    One thread begins and ends steps; any thread may read results.

    Args:
        in_elements: of the largest input, int32.
        out_elements: of the largest result, int32.
        slots: a power of two: so many steps keep their inputs and results, and may be
            under way.
    """

    def __init__(self, in_elements: int, out_elements: int, slots: int = 8):
        self.in_elements, self.out_elements = in_elements, out_elements
        self._slots = slots
        is_cuda = handlers.xla_platform() == handlers.CUDA
        self._path = paths.op_library(_OP, "cuda" if is_cuda else "cpu")
        device = options.ordinal(os.environ) if is_cuda else 0
        self._feed, address, slot_bytes, in_offset, out_offset = _runtime.plan(
            self._path,
            "xla_ops_host_feed_make",
            (device, slots, in_elements, out_elements),
            5,
        )
        words = slot_bytes // 4
        memory = (ctypes.c_int32 * (slots * words)).from_address(address)
        slot = np.ctypeslib.as_array(memory).reshape(slots, words)
        self._fed = slot[:, :2].view(np.int64)[:, 0]
        self._inputs = slot[:, in_offset // 4 :][:, :in_elements]
        step = (slot_bytes - out_offset) // _MAX_CHANNELS // 4
        self._results = [
            slot[:, out_offset // 4 + i * step :][:, :out_elements]
            for i in range(_MAX_CHANNELS)
        ]
        self._step = 0
        self._number: torch.Tensor | None = None
        self._is_begun = False

    # The program's side, on lazy tensors.

    def receive(
        self, number: torch.Tensor, elements: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the host has written for a step, and the number of the next step.

        Args:
            number: [1] int32, of the step.
            elements: how many, from the first on.

        Raises:
            ValueError: more than `in_elements`.
        """
        _check("host_infeed", "elements", elements, self.in_elements)
        call = torch.ops.xla_ops.host_infeed.default
        data, following = call(number, elements, self._feed)
        return data, following

    def send(
        self, values: torch.Tensor, number: torch.Tensor, channel: int = 0
    ) -> torch.Tensor:
        """Hands a result of a step to the host, and returns it.

        What comes back has to be a result of the program, or XLA drops the call.

        Args:
            values: int32, at most `out_elements`.
            number: of the step.
            channel: 0, of every step, or 1.

        Raises:
            ValueError: values are more, or there is no such channel.
        """
        _check("host_outfeed", "values", values.numel(), self.out_elements)
        if channel not in range(_MAX_CHANNELS):
            raise ValueError(f"host_outfeed: channel must be 0 or 1, got {channel}")
        call = torch.ops.xla_ops.host_outfeed.default
        sent: torch.Tensor = call(values, number, self._feed, channel)
        return sent

    # The host's side.

    def begin(self, elements: int) -> np.ndarray:
        """The next step's input, [elements] int32, to be written.

        Raises:
            ValueError: elements are more than `in_elements`.
        """
        _check("host_infeed", "elements", elements, self.in_elements)
        if self._is_begun:
            # Its program failed, or was never launched: its number is not known.
            self._step += 1
            self._number = None
        self._is_begun = True
        last = self._step - self._slots
        if last >= 0 and not self._is_there(last, 0, _PATIENCE_US):
            xm.wait_device_ops()
            if not self._is_there(last, 0, 0):
                # Its program failed, and all after it by its number.
                self._number = None
        return self._inputs[self._step % self._slots, :elements]

    def number(self) -> torch.Tensor:
        """The step's, for its program; what was written is there for it.

        Before `begin` it is one to compile the program with.
        """
        if self._number is None or is_lost(self._number):
            low = self._step % _NUMBERS
            number = np.array([low], np.uint32).view(np.int32)
            device = torch_xla.device()
            with torch.inference_mode(False):
                self._number = torch.from_numpy(number).to(device)
        if self._is_begun:  # else the slot may be another step's still
            self._fed[self._step % self._slots] = self._step % _NUMBERS
        return self._number

    def end(self, following: torch.Tensor) -> FedStep:
        """Notes that the step's program is launched.

        Args:
            following: the next step's number, of the program's results.
        """
        fed = FedStep(self, self._step)
        self._number = following
        self._step += 1
        self._is_begun = False
        return fed

    def _is_there(self, step: int, channel: int, timeout_us: int) -> bool:
        request = (self._feed, step % _NUMBERS, channel, timeout_us)
        (is_there,) = _runtime.plan(self._path, "xla_ops_host_feed_wait", request, 1)
        return bool(is_there)

    def _read(self, step: int, channel: int, elements: int) -> np.ndarray | None:
        if not self._is_there(step, channel, _PATIENCE_US):
            return None
        slot = step % self._slots
        values = self._results[channel][slot, :elements].copy()
        # Unless a program that overwrites it may have been launched meanwhile, which
        # is after its input was marked; its result is marked when all of it is there.
        return values if self._fed[slot] == step % _NUMBERS else None


class FedStep:
    """A step whose program is launched."""

    def __init__(self, feed: HostFeed, step: int):
        self._feed, self._step = feed, step

    def result(self, elements: int, channel: int = 0) -> np.ndarray | None:
        """Waits for a result that its program sends, [elements] int32.

        Returns:
            it, or None where it has not come within a second, or steps after it have
            taken its place: the tensor that `send` returned has it.
        """
        return self._feed._read(self._step, channel, elements)


def _check(op: str, argument: str, elements: int, most: int) -> None:
    if not 0 < elements <= most:
        raise ValueError(f"{op}: {argument} must be 1 to {most}, got {elements}")


def _infeed(step: torch.Tensor, elements: int, feed: int) -> tuple[torch.Tensor, ...]:
    target = "xla_ops.host_infeed"
    handlers.available(handlers.xla_platform(), target)
    call = CustomCall(
        target,
        ("step",),
        (Spec((elements,), torch.int32), Spec.of(step)),
        {"feed": feed},
    )
    return tuple(call_in_graph(call.bind({"step": step})))


def _outfeed(
    values: torch.Tensor, step: torch.Tensor, feed: int, channel: int
) -> torch.Tensor:
    target = "xla_ops.host_outfeed"
    handlers.available(handlers.xla_platform(), target)
    call = CustomCall(
        target,
        ("values", "step"),
        (Spec.of(values),),
        {"feed": feed, "channel": channel},
    )
    (out,) = call_in_graph(call.bind({"values": values, "step": step}))
    return out


_library.impl("host_infeed", tracing.untraced(_infeed), "XLA")
_library.impl("host_outfeed", tracing.untraced(_outfeed), "XLA")
torch.library.register_fake(
    "xla_ops::host_infeed",
    lambda step, elements, feed: (step.new_empty(elements), torch.empty_like(step)),
    lib=_library,
)
torch.library.register_fake(
    "xla_ops::host_outfeed",
    lambda values, step, feed, channel: torch.empty_like(values),
    lib=_library,
)
