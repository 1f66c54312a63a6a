"""Handlers are registered with JAX's CUDA plugin, for which a fake stands."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

import fakes
import xla_ops
from xla_ops import _runtime

BRIDGE = pathlib.Path(xla_ops.__file__).parent / "lib" / "libxla_ops_pjrt.so"

# In processes of their own: a handler is registered once a process.
REGISTER = """
import ctypes, importlib.util, json, sys
bridge, fake, ops, path = sys.argv[1:]
# The module alone: it needs nothing of the package, whose torch takes seconds.
spec = importlib.util.spec_from_file_location("_runtime", path)
_runtime = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_runtime)
_runtime.load_library(ops)
if fake: _runtime.open_plugin(bridge, fake)
outcomes = _runtime.register_gpu(bridge)
names = [name for name, why in outcomes.items() if not why]
refused = {name: why for name, why in outcomes.items() if why}
again = _runtime.register_gpu(bridge)
if not fake:
    print(json.dumps({"names": names, "refused": refused, "again": again}))
    raise SystemExit
class Registration(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char * 64), ("api", ctypes.c_int),
                ("stages", ctypes.c_void_p * 4), ("traits", ctypes.c_int64)]
fake = ctypes.CDLL(fake)
fake.fake_registrations.restype = ctypes.POINTER(Registration)
count = ctypes.c_int()
entries = fake.fake_registrations(ctypes.byref(count))
print(json.dumps({"names": names, "refused": refused, "again": again,
    "registered": _runtime.registered(),
    "seen": {e.name.decode(): [e.api, [s is not None for s in e.stages], e.traits]
             for e in entries[:count.value]}}))
"""


def register(tmp_path, plugin_path, ops=None):
    """Registers fake CUDA handlers in a new process; returns what it printed."""
    bridge = fakes.copy(BRIDGE, tmp_path / "libxla_ops_pjrt.so")
    ops = ops or fakes.build("fake_ops", PLATFORM="CUDA", ARCHS="9.0")
    arguments = [bridge, plugin_path, ops, _runtime.__file__]
    done = subprocess.run(
        [sys.executable, "-c", REGISTER, *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("extension, traits", [(2, -1), (3, 1)])
def test_register_gpu_registers_all_stages_once(tmp_path, extension, traits):
    answer = register(tmp_path, fakes.build("fake_pjrt_plugin", EXTENSION=extension))
    assert "fake.shapes" in answer["names"]
    assert answer["refused"] == answer["again"] == {}
    assert answer["registered"]["Host"] == []
    assert sorted(answer["registered"]["CUDA"]) == sorted(answer["names"])
    assert set(answer["seen"]) == set(answer["names"])
    execute_only = [False, False, False, True]
    assert answer["seen"]["fake.shapes"] == [1, execute_only, traits]
    assert answer["seen"]["fake.stages"] == [1, [True] * 4, traits]


def test_register_gpu_without_the_extension(tmp_path):
    answer = register(tmp_path, fakes.build("fake_pjrt_plugin", EXTENSION=0))
    assert answer["names"] == []
    why = answer["refused"]["fake.shapes"]
    assert why.startswith("fake.shapes cannot be registered")
    assert "has no custom-call extension: install xla_ops[cuda13], or" in why


def test_register_gpu_without_a_plugin(tmp_path):
    answer = register(tmp_path, "")
    assert "no PJRT plugin is open" in answer["refused"]["fake.shapes"]
    assert answer["again"] == answer["refused"]


def test_a_refused_target_takes_no_other_down(tmp_path):
    # The fake plugin refuses the target fake.refused: rename one as long.
    data = fakes.build("fake_ops", PLATFORM="CUDA", ARCHS="9.0").read_bytes()
    assert b"fake.threads\0" in data
    ops = tmp_path / "refused.so"
    ops.write_bytes(data.replace(b"fake.threads\0", b"fake.refused\0"))
    answer = register(tmp_path, fakes.build("fake_pjrt_plugin"), ops)
    text = "fake.refused cannot be registered: fake plugin: refused"
    assert answer["refused"] == {"fake.refused": text}
    # Those behind it in the table are registered, and it alone is tried again.
    assert {"fake.shapes", "fake.stream", "fake.wait"} <= set(answer["names"])
    assert answer["again"] == answer["refused"]
    assert "fake.refused" not in answer["registered"]["CUDA"]
