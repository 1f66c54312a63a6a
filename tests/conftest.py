"""Fixtures shared by the tests.

Every test of an op runs on each path by which a user reaches the handlers: torch CPU
tensors ("cpu"), XLA tensors lazily ("lazy") and under torch.compile ("compiled"). The
XLA device is what PJRT_DEVICE names, the CPU unless a GPU target sets it; GPU targets
add torch CUDA tensors ("cuda") by XLA_OPS_TEST_TORCH_CUDA=1. Nothing is skipped: a
selected test that lacks its device fails.
"""

import os
import pathlib
import tempfile

os.environ.setdefault("PJRT_DEVICE", "CPU")
# Torch keeps on disk what its compilers made, by the user's program alone: another run
# would take a graph from before a change to an op.
os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(prefix="xla_ops_inductor_")
# The optimised HLO of every program: the in-place tests read it.
HLO_DUMP = tempfile.mkdtemp(prefix="xla_ops_hlo_")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + f" --xla_dump_to={HLO_DUMP} --xla_dump_hlo_as_text"
)

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch_xla  # noqa: E402
import torch_xla.backends  # noqa: E402

from support import Path  # noqa: E402

# XLA:GPU would compute float32 products in TF32, which no reference does.
torch_xla.backends.set_mat_mul_precision("highest")


class _TorchRandom:
    """Torch's random state, for Hypothesis to set anew for each example."""

    def seed(self, value) -> None:
        torch.default_generator.manual_seed(value)

    def getstate(self) -> torch.Tensor:
        return torch.get_rng_state()

    def setstate(self, state) -> None:
        torch.set_rng_state(state)


# An example is a function of its arguments (st.random_module() draws the seed of its
# data), so that a failure replays; and every run tries the same examples, so that none
# fails by luck. --hypothesis-profile=search looks for new ones.
_TORCH_RANDOM = _TorchRandom()  # Hypothesis keeps a weak reference
hypothesis.register_random(_TORCH_RANDOM)
hypothesis.settings.register_profile(
    "fixed",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],  # on a busy machine
)
hypothesis.settings.register_profile("search", deadline=None, print_blob=True)
hypothesis.settings.load_profile("fixed")

PATHS = ["cpu", "lazy", "compiled"]
if os.environ.get("XLA_OPS_TEST_TORCH_CUDA") == "1":
    PATHS.append("cuda")


@pytest.fixture(params=PATHS)
def path(request) -> Path:
    """How the op under test is reached."""
    return Path(request.param)


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.fixture
def hlo_dump() -> pathlib.Path:
    """The folder to which XLA writes each program that it compiles."""
    return pathlib.Path(HLO_DUMP)


@pytest.fixture
def spmd():
    """torch_xla's SPMD over four CPU devices, from here to the end of the process."""
    import torch_xla.runtime as xr

    os.environ.setdefault("CPU_NUM_DEVICES", "4")
    if not xr.is_spmd():
        xr.use_spmd()
    count = xr.global_runtime_device_count()
    if count != 4:
        pytest.fail(f"CPU_NUM_DEVICES must be 4 from the start, got {count} devices")


@pytest.fixture
def mesh(spmd):
    return _mesh((4,), ("tp",))


@pytest.fixture
def grid(spmd):
    return _mesh((2, 2), ("dp", "tp"))


def _mesh(shape, axes):
    import numpy as np
    from torch_xla.distributed import spmd

    return spmd.Mesh(np.arange(4), shape, axes)


@pytest.fixture
def debug_mode():
    import xla_ops

    xla_ops.set_debug(True)
    yield
    xla_ops.set_debug(False)


@pytest.fixture
def lowered(monkeypatch):
    """Collects the calls that the op is lowered to during a test."""
    from xla_ops.core.op import OPS
    from xla_ops.ops import attention

    calls = []
    lower = attention.lower

    def record(*args):
        calls.append(lower(*args))
        return calls[-1]

    monkeypatch.setattr(attention, "lower", record)
    OPS["flash_attn_varlen"]._plans.clear()  # what was lowered before
    return calls
