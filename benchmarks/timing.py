"""Stopwatches: device time of calls on torch tensors, and the device's own ceilings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

WARM_UP_SECONDS = 0.04
# Reading this much replaces what any L2 cache of today holds.
FLUSH_BYTES = 256 << 20


def spread(samples: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile of microseconds, and how many there were."""
    ranks = statistics.quantiles(samples, n=5, method="inclusive")
    return {
        "us": statistics.median(samples),
        "us_p20": ranks[0],
        "us_p80": ranks[3],
        "samples": len(samples),
    }


class CudaTimer:
    """Times calls by replaying them as one CUDA graph.

    Launch costs so stay out of the figures. Before each replay the L2 cache is filled
    with clean lines, by reading: lines left dirty would be written back on the clock.
    Each call should have operands of its own; its results it gets anew.
    """

    def __init__(self, seconds: float):
        """`seconds`: how long to measure one list of calls, roughly."""
        self._seconds = seconds
        self._flush = torch.ones(FLUSH_BYTES // 4, device="cuda")

    def __call__(self, calls: Sequence[Callable]) -> dict[str, float]:
        # Outside the graph first: libraries load, plans are made, code is compiled.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:2]:
                call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            # All results stay alive, so that each call writes memory of its own.
            results = [call() for call in calls]
        # After a pause, or after work that drew much power, replays were seen to take
        # 16% more for 10 to 15 ms.
        end = time.perf_counter() + WARM_UP_SECONDS
        first = self._replay(graph, 2)
        while time.perf_counter() < end:
            first = self._replay(graph, 2)
        count = min(20, max(5, int(self._seconds / (min(first) * 1e-3))))
        milliseconds = self._replay(graph, count)
        del results
        return spread([1e3 * t / len(calls) for t in milliseconds])

    def _replay(self, graph, count: int) -> list[float]:
        events = []
        for _ in range(count):
            # While the flush runs, the host has queued the rest.
            self._flush.sum()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
            start.record()
            graph.replay()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]

    def once(self, calls: Sequence[Callable]) -> dict[str, float]:
        """The same without a graph, for calls long enough to hide their launch."""
        calls[0]()
        samples = []
        for _ in range(3):
            for call in calls:
                start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
                start.record()
                call()
                end.record()
                samples.append((start, end))
        torch.cuda.synchronize()
        return spread([1e3 * start.elapsed_time(end) for start, end in samples])


class CpuTimer:
    """Times calls on CPU tensors by the host's clock."""

    def __init__(self, seconds: float):
        self._seconds = seconds

    def __call__(self, calls: Sequence[Callable]) -> dict[str, float]:
        for call in calls[:2]:
            call()
        samples: list[float] = []
        end = time.perf_counter() + self._seconds
        while len(samples) < 5 or time.perf_counter() < end:
            start = time.perf_counter()
            for call in calls:
                call()
            samples.append(1e6 * (time.perf_counter() - start) / len(calls))
        return spread(samples)

    once = __call__


# Source, destination: the driver's copy, and a kernel's.
COPIES = (lambda s, d: d.copy_(s), lambda s, d: torch.abs(s, out=d))


def ceilings(device: str, timer) -> dict[str, float]:
    """Measures what no kernel here can beat.

    Returns: `bytes/s` of the fastest copy from device memory to device memory, read
    plus written: the driver's, or a kernel's (the absolute value); `flop/s` of a bf16
    matrix product.
    """
    cuda = device == "cuda"
    size = (512 if cuda else 32) << 20
    pairs = [
        [torch.randn(size // 2, device=device, dtype=torch.bfloat16) for _ in "sd"]
        for _ in range(2)
    ]
    microseconds = min(
        timer([lambda s=s, d=d, way=way: way(s, d) for s, d in pairs])["us"]
        for way in COPIES
    )
    del pairs
    n = 8192 if cuda else 512
    a, b = (torch.randn(n, n, dtype=torch.bfloat16, device=device) for _ in "ab")
    product = timer.once([lambda: a @ b] * 4)
    return {
        "bytes/s": 2 * size / (microseconds * 1e-6),
        "flop/s": 2 * n**3 / (product["us"] * 1e-6),
    }
