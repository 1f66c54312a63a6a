"""Measures a decode step of 32 layers: what it costs the host, and what it copies.

A worker process of run.py. The host's time is that of step.py's narrow decoder. Copies
and CUDA graphs are looked for in a step with wide KV caches (8 GiB in 64 tensors on a
GPU), so that a copy of one would show: norm, rotary, cache write, attention, norm and
gated activation by our ops, the products between them by XLA.
"""

from __future__ import annotations

import os
import pathlib
import tempfile

# Before XLA starts: what it made of the step is read from its dump.
DUMP = pathlib.Path(tempfile.mkdtemp(prefix="xla_ops_step_"))
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + f" --xla_dump_to={DUMP} --xla_dump_hlo_as_text"
    + " --xla_dump_hlo_module_re=.*"
)

import torch  # noqa: E402
import torch_xla  # noqa: E402
import torch_xla.core.xla_model as xm  # noqa: E402
import torch_xla.runtime as xr  # noqa: E402

import alone  # noqa: E402
import step  # noqa: E402
import worker  # noqa: E402
import xla_dump  # noqa: E402
import xla_ops  # noqa: E402

BF16, I32 = torch.bfloat16, torch.int32
SEQS, HIDDEN, HEADS, HEAD_DIM, PAGE, EPS = 64, 256, 8, 128, 16, 1e-6
CONTEXT_PAGES = 4
OPS_A_LAYER = 7  # K and V are two tensors, so written by two calls


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        size = HEADS * HEAD_DIM

        def weight(*shape):
            return torch.nn.Parameter(0.02 * torch.randn(*shape, dtype=BF16))

        self.norm, self.norm2 = weight(HIDDEN), weight(HIDDEN)
        self.qkv, self.out = weight(HIDDEN, 3 * size), weight(size, HIDDEN)
        self.gate_up, self.down = weight(HIDDEN, 2 * HIDDEN), weight(HIDDEN, HIDDEN)

    def forward(self, x, residual, caches, rope, batch):
        slots, lens, tables, starts, count, positions = batch
        x, residual = xla_ops.fused_add_rms_norm(x, residual, self.norm, EPS)
        q, k, v = (x @ self.qkv).chunk(3, -1)
        q, k = xla_ops.rotary_embedding(positions, q, k, HEAD_DIM, rope, True)
        q, k, v = (t.unflatten(-1, (HEADS, HEAD_DIM)) for t in (q, k, v))
        xla_ops.reshape_and_cache_flash(k, v, *caches, slots)
        x = xla_ops.paged_attention(
            q, caches, lens, tables, starts, count, HEAD_DIM**-0.5
        )
        x = x.flatten(1) @ self.out
        x, residual = xla_ops.fused_add_rms_norm(x, residual, self.norm2, EPS)
        x = xla_ops.silu_and_mul(x @ self.gate_up) @ self.down
        return x, residual


class Step(torch.nn.Module):
    def __init__(self, num_layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(num_layers))

    def forward(self, x, caches, rope, batch):
        residual = torch.zeros_like(x)
        for layer, pair in zip(self.layers, caches, strict=True):
            x, residual = layer(x, residual, pair, rope, batch)
        return x + residual


def wait() -> None:
    torch_xla.sync()
    xm.wait_device_ops()


class Bench:
    """A step, its caches and two batches that it is given in turn."""

    def __init__(self, num_layers: int, cache_bytes: int):
        for path in DUMP.iterdir():  # of the other programs of this process
            path.unlink()
        self.device = torch_xla.device()
        self.num_layers = num_layers
        blocks = cache_bytes // (num_layers * 2 * PAGE * HEADS * HEAD_DIM * 2)
        shape = (max(blocks, SEQS * CONTEXT_PAGES), PAGE, HEADS, HEAD_DIM)
        self.cache_shape = shape
        self.model = Step(num_layers).to(self.device)
        self.caches = [
            tuple(torch.zeros(shape, dtype=BF16, device=self.device) for _ in "kv")
            for _ in range(num_layers)
        ]
        self.x = torch.randn(SEQS, HIDDEN, dtype=BF16).to(self.device)
        self.rope = torch.randn(4096, HEAD_DIM, dtype=BF16).to(self.device)
        self.batches = [self._batch(context) for context in (17, 50)]
        wait()

    def _batch(self, context):
        tables = torch.randperm(self.cache_shape[0])[: SEQS * CONTEXT_PAGES]
        tables = tables.view(SEQS, CONTEXT_PAGES)
        slots = tables[:, (context - 1) // PAGE] * PAGE + (context - 1) % PAGE
        batch = (
            slots,
            torch.full((SEQS,), context, dtype=I32),
            tables.to(I32),
            torch.arange(SEQS + 1, dtype=I32),
            torch.full((1,), SEQS, dtype=I32),
            torch.full((SEQS,), context - 1),
        )
        return tuple(t.to(self.device) for t in batch)

    @property
    def cache_tensors(self):
        return [t for pair in self.caches for t in pair]

    def addresses(self):
        wait()
        return [torch_xla._XLAC._unsafe_buffer_pointer(t) for t in self.cache_tensors]

    def bytes_moved(self, decode, steps=4) -> int:
        """Runs steps; returns the bytes of the caches that are then elsewhere."""
        before = self.addresses()
        for i in range(steps):
            decode(self.x, self.caches, self.rope, self.batches[i % 2])
        after = self.addresses()
        tensors = zip(self.cache_tensors, before, after, strict=True)
        return sum(t.nbytes for t, a, b in tensors if a != b)


def cache_copies(shape) -> int:
    """Instructions in XLA's final programs that copy an array of the caches' shape."""
    texts = [path.read_text() for path in DUMP.glob("*after_optimizations.txt")]
    texts = [text for text in texts if 'target="xla_ops.' in text]
    if not texts:
        raise RuntimeError("XLA dumped no program with our calls")
    return sum(xla_dump.copies(text, shape) for text in texts)


def target(least: float, aim: float) -> dict:
    return {"metric": "value", "least": least, "aim": aim, "against": ""}


def copy_row(bench: Bench, decode) -> dict:
    """A row on how many bytes of cache a step copies."""
    bench.bytes_moved(decode)  # compiles
    moved = bench.bytes_moved(decode)
    copies = cache_copies(bench.cache_shape)
    return {
        "value": moved + copies * bench.cache_tensors[0].nbytes,
        "unit": "bytes copied",
        "cache bytes": sum(t.nbytes for t in bench.cache_tensors),
        "copies in programs": copies,
        "target": target(0, 0),
    }


def compiled_row(bench: Bench) -> dict:
    torch._dynamo.reset()
    decode = torch.compile(bench.model, backend="openxla", fullgraph=True)
    return copy_row(bench, decode)


def lazy_row(bench: Bench) -> dict:
    def decode(*args):
        result = bench.model(*args)
        torch_xla.sync()
        return result

    return copy_row(bench, decode)


def capture_row(bench: Bench) -> dict:
    texts = [path.read_text() for path in DUMP.glob("*thunk_sequence*.txt")]
    launches = xla_dump.launches(texts)
    expected = OPS_A_LAYER * bench.num_layers
    return {
        "value": launches["outside"] + max(0, expected - launches["inside"]),
        "unit": f"of {expected}, {launches['launches']} launches",
        **launches,
        "target": target(0, 0),
    }


def host_rows(
    job: worker.Job, on_gpu: bool, mode: str, layers: int, steps: int
) -> None:
    """Adds the rows that come of one measurement of step.py."""
    found: dict = {}

    def measured() -> dict:
        torch._dynamo.reset()
        found.update(step.measure(mode, layers, steps))
        return {
            "value": found["host_ms_median"],
            "unit": "ms",
            "target": target(1.2, 0.5) if on_gpu else None,
            **found,
        }

    def traced() -> dict:
        return {
            "value": found["retraces_and_recompilations"],
            "unit": "times",
            "target": target(0, 0),
        }

    job.measure(f"{layers} layers: host time, {mode}", measured)
    if found:
        job.measure(f"{layers} layers: traced in {steps} steps, {mode}", traced)


def main() -> None:
    job = worker.Job.from_arguments()
    on_gpu = xr.device_type() != "CPU"
    job.set("versions", alone.versions("cuda" if on_gpu else "cpu"))
    if not job.wants_group("step"):
        return job.finish()
    layers, steps = (32, 1000) if on_gpu else (4, 100)
    with torch.no_grad():
        for mode in ("openxla", "xla_ops"):
            host_rows(job, on_gpu, mode, layers, steps)
        torch.manual_seed(0)
        bench = Bench(layers, (8 << 30) if on_gpu else (64 << 20))
        name = f"{layers} layers: "
        job.measure(name + "zero copy, compiled", lambda: compiled_row(bench))
        if on_gpu:
            job.measure(name + "calls outside CUDA graphs", lambda: capture_row(bench))
        job.measure(name + "zero copy, lazily", lambda: lazy_row(bench))
    job.finish()


if __name__ == "__main__":
    main()
