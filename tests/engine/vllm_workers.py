"""What tests ask in a worker's process, which imports this and no test."""

import torch_xla
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met


def facts(worker) -> dict:
    """Of a worker, told by itself."""
    runner = worker.model_runner
    xm.wait_device_ops()
    return dict(
        compiled=met.counter_value("UncachedCompile"),
        addresses=[torch_xla._XLAC._unsafe_buffer_pointer(c) for c in runner.caches],
        heads=[c.shape[3] for c in runner.caches],
        bytes=runner.model_memory_usage,
        rank=worker.rank,
    )
