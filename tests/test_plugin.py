"""The GPU plugin and its bridge, on any machine: fakes (fakes.py) stand for JAX's CUDA
plugin and for the NVIDIA driver.

The fake plugin claims to be newer than torch_xla: it refuses every argument struct that
is not longer than torch_xla's, and any that is not zero where it is longer.
"""

from __future__ import annotations

import ctypes
import importlib
import itertools
import json
import os
import pathlib
import subprocess
import sys

import fakes
import pytest

import xla_ops
from xla_ops import _runtime, cuda_driver, plugin

BRIDGE = pathlib.Path(xla_ops.__file__).parent / "lib" / "libxla_ops_pjrt.so"

# Positions in PJRT's function table.
INITIALIZE, COMPILE, OPTIMIZED_PROGRAM, EXECUTE, AOT_COMPILE = 3, 20, 48, 55, 89
SPECIAL = {0, 1, 2, 3, 10, 12, COMPILE, OPTIMIZED_PROGRAM, EXECUTE, 70, AOT_COMPILE}


class Bridge:
    """A bridge of its own (a copy of the library) and its function table."""

    def __init__(self, folder: pathlib.Path):
        self.path = fakes.copy(BRIDGE, folder / "libxla_ops_pjrt.so")
        self.library = ctypes.CDLL(str(self.path))
        self.library.GetPjrtApi.restype = ctypes.c_void_p

    def open(self, path) -> Bridge:
        _runtime.open_plugin(str(self.path), str(path))
        return self

    @property
    def table(self) -> list[int | None]:
        address = self.library.GetPjrtApi()
        size = ctypes.c_size_t.from_address(address).value
        count = (size - 40) // 8
        return list((ctypes.c_void_p * count).from_address(address + 40))

    @property
    def version(self) -> tuple[int, int]:
        address = self.library.GetPjrtApi()
        return tuple((ctypes.c_int * 2).from_address(address + 32))

    def call(self, index: int, *fields: int) -> list[int]:
        """Calls a function with the struct {size, null, *fields}; returns its words.

        Raises RuntimeError with the error's text.
        """
        words = (ctypes.c_uint64 * (len(fields) + 2))(0, 0, *fields)
        words[0] = ctypes.sizeof(words)
        function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(self.table[index])
        error = function(ctypes.addressof(words))
        if error is not None:
            raise RuntimeError(self.take_error(error))
        assert words[0] == ctypes.sizeof(words)
        return list(words)

    def take_error(self, error: int) -> str:
        void = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        message = (ctypes.c_uint64 * 5)(40, 0, error)
        void(self.table[1])(ctypes.addressof(message))
        text = ctypes.string_at(message[3], message[4]).decode()
        assert self.call(2, error, 0)[3] & 0xFFFFFFFF in (3, 6, 9)
        destroy = (ctypes.c_uint64 * 3)(24, 0, error)
        void(self.table[0])(ctypes.addressof(destroy))
        return text


def struct(*fields: int):
    """A nested PJRT struct {size, null, *fields}."""
    words = (ctypes.c_uint64 * (len(fields) + 2))(0, 0, *fields)
    words[0] = ctypes.sizeof(words)
    return words


@pytest.fixture
def bridge(tmp_path):
    return Bridge(tmp_path)


@pytest.fixture
def opened(bridge):
    return bridge.open(fakes.build("fake_pjrt_plugin"))


# ------------------------------------------------------------------ the bridge


def test_every_function_is_forwarded_with_longer_structs(opened):
    for index in set(range(160)) - SPECIAL:
        words = opened.call(index, 7, 0)
        assert words[2:] == [7, index * 1000 + 7]


def test_the_fake_refuses_what_is_not_padded(opened):
    # Past the functions that torch_xla knows the table is the plugin's own.
    with pytest.raises(RuntimeError, match="expected 48, got 32"):
        opened.call(180, 7, 0)


def test_a_missing_function_stays_missing(opened):
    assert opened.table[70] is None


@pytest.mark.parametrize("words", [63, 64, 65, 100])
def test_structs_as_long_as_the_padding_pass_unchanged(opened, words):
    # The fake writes the size that it saw into the seventh word.
    seen = opened.call(90, *[0] * (words - 2))[6]
    assert seen == (512 if words < 64 else words * 8)


def test_struct_shorter_than_its_head_is_left_to_the_plugin(opened):
    function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(opened.table[90])
    words = (ctypes.c_uint64 * 2)(8, 0)
    assert "got 8" in opened.take_error(function(ctypes.addressof(words)))


def test_platform_is_gpu(opened):
    words = opened.call(12, 0, 0, 0)
    assert ctypes.string_at(words[3], words[4]) == b"gpu"


def test_initialize(opened):
    opened.call(INITIALIZE)


@pytest.mark.parametrize(("index", "fields"), [(COMPILE, 5), (AOT_COMPILE, 6)])
def test_program_is_padded_too(opened, index, fields):
    program = struct(0, 77, 0, 0)
    words = opened.call(index, 0, ctypes.addressof(program), *[0] * (fields - 2))
    assert words[3] == ctypes.addressof(program)
    assert words[-1] == 77


def test_answer_in_the_program_is_copied_back(opened):
    program = struct(0, 0, 0, 0)
    words = opened.call(OPTIMIZED_PROGRAM, 0, ctypes.addressof(program))
    assert words[3] == ctypes.addressof(program)
    assert list(program) == [48, 0, 0, 1234, 0, 0]


def test_execute_options_are_padded_too(opened):
    options = struct(0, 0, 0, 0, 42, 0, 0, 0)
    words = opened.call(EXECUTE, 0, ctypes.addressof(options), *[0] * 6)
    assert words[3] == ctypes.addressof(options)
    assert words[9] == 42
    assert options[0] == 80


def test_error_texts_come_through(opened):
    with pytest.raises(RuntimeError, match="fake plugin: no devices"):
        opened.call(10, *[0] * 9)


def test_head_of_the_table_is_the_plugins(opened):
    assert opened.version == (0, 115)
    assert len(opened.table) == 190


def test_many_threads_call_at_once(opened):
    from concurrent.futures import ThreadPoolExecutor

    def work(value):
        return [opened.call(90 + i % 60, value, 0)[3] for i in range(200)]

    with ThreadPoolExecutor(8) as pool:
        for value, answers in zip(range(32), pool.map(work, range(32)), strict=True):
            assert answers == [(90 + i % 60) * 1000 + value for i in range(200)]


def test_opening_the_same_plugin_again_is_fine(opened):
    table = opened.library.GetPjrtApi()
    opened.open(fakes.build("fake_pjrt_plugin"))
    assert opened.library.GetPjrtApi() == table


def test_a_second_plugin_in_one_process_raises(opened):
    other = fakes.build("fake_pjrt_plugin", MINOR=80)
    with pytest.raises(RuntimeError, match="this process uses .* already"):
        opened.open(other)


@pytest.mark.parametrize(
    ("macros", "text"),
    [
        ({"MAJOR": 1, "MINOR": 3}, "speaks PJRT API 1.3, torch_xla needs major"),
        ({"MINOR": 74}, r"speaks PJRT API 0.74, torch_xla needs 0.75 or newer"),
        ({"FUNCTIONS": 60}, "malformed: its function table has 60"),
        ({"NULL_API": None}, "its GetPjrtApi failed"),
    ],
)
def test_unusable_plugin(bridge, macros, text):
    path = fakes.build("fake_pjrt_plugin", **macros)
    with pytest.raises(RuntimeError, match=text) as info:
        bridge.open(path)
    assert str(path) in str(info.value)
    # The framework's way in gives the same text as an error of its first call.
    _runtime.fail_plugin(str(bridge.path), str(info.value))
    with pytest.raises(RuntimeError, match=text):
        bridge.call(INITIALIZE)


@pytest.mark.parametrize("minor", [75, 76, 116, 900])
def test_plugin_generations(bridge, minor):
    path = fakes.build("fake_pjrt_plugin", MINOR=minor)
    assert bridge.open(path).version == (0, minor)


def test_not_a_plugin(bridge):
    with pytest.raises(RuntimeError, match="does not export GetPjrtApi"):
        bridge.open(fakes.build("fake_ops"))
    with pytest.raises(RuntimeError, match="cannot be loaded: /no/such.so: cannot"):
        bridge.open("/no/such.so")


def test_without_a_plugin_every_function_fails(bridge, monkeypatch):
    monkeypatch.delenv(plugin.PLUGIN_VARIABLE, raising=False)
    assert len(bridge.table) >= 115
    for index in range(3, len(bridge.table)):
        with pytest.raises(RuntimeError, match="no PJRT plugin to wrap"):
            bridge.call(index, 0, 0)


def test_plugin_named_by_the_environment_is_opened(bridge, monkeypatch):
    path = fakes.build("fake_pjrt_plugin")
    monkeypatch.setenv(plugin.PLUGIN_VARIABLE, str(path))
    assert bridge.version == (0, 115)


def test_find_plugin_info():
    path = str(fakes.build("fake_pjrt_plugin"))
    assert _runtime.find_plugin_info(path) == {
        "path": path,
        "error": "",
        "major": 0,
        "minor": 115,
        "extensions": [4242, 0],
        "custom_call": True,
    }
    info = _runtime.find_plugin_info(str(fakes.build("fake_pjrt_plugin", EXTENSION=0)))
    assert (info["extensions"], info["custom_call"]) == ([4242], False)
    info = _runtime.find_plugin_info(str(fakes.build("fake_pjrt_plugin", MAJOR=1)))
    assert (info["major"], info["minor"]) == (1, 115)
    assert "speaks PJRT API 1.115" in info["error"]
    info = _runtime.find_plugin_info("/no/such.so")
    assert (info["major"], info["custom_call"]) == (None, False)
    assert "cannot be loaded" in info["error"]


# ---------------------------------------------------------------- registration

# In processes of their own: a handler is registered once a process.
REGISTER = """
import ctypes, importlib.util, json, sys
bridge, fake, ops, path = sys.argv[1:]
# The module alone: it needs nothing of the package, whose torch takes seconds.
spec = importlib.util.spec_from_file_location("_runtime", path)
_runtime = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_runtime)
_runtime.load_library(ops)
try:
    if fake: _runtime.open_plugin(bridge, fake)
    names = _runtime.register_gpu(bridge)
    again = _runtime.register_gpu(bridge)
except RuntimeError as error:
    print(json.dumps({"error": str(error)}))
    raise SystemExit
class Registration(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char * 64), ("api", ctypes.c_int),
                ("stages", ctypes.c_void_p * 4), ("traits", ctypes.c_int64)]
fake = ctypes.CDLL(fake)
fake.fake_registrations.restype = ctypes.POINTER(Registration)
count = ctypes.c_int()
entries = fake.fake_registrations(ctypes.byref(count))
print(json.dumps({"names": names, "again": again, "registered": _runtime.registered(),
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


@pytest.mark.parametrize(("extension", "traits"), [(2, -1), (3, 1)])
def test_register_gpu_registers_all_stages_once(tmp_path, extension, traits):
    answer = register(tmp_path, fakes.build("fake_pjrt_plugin", EXTENSION=extension))
    assert "fake.shapes" in answer["names"]
    assert answer["again"] == []
    assert answer["registered"] == {"Host": [], "CUDA": answer["names"]}
    assert set(answer["seen"]) == set(answer["names"])
    execute_only = [False, False, False, True]
    assert answer["seen"]["fake.shapes"] == [1, execute_only, traits]
    assert answer["seen"]["fake.stages"] == [1, [True] * 4, traits]


def test_register_gpu_without_the_extension(tmp_path):
    answer = register(tmp_path, fakes.build("fake_pjrt_plugin", EXTENSION=0))
    assert "fake.shapes cannot be registered" in answer["error"]
    assert "has no custom-call extension: install jax-cuda12-pjrt" in answer["error"]


def test_register_gpu_without_a_plugin(tmp_path):
    assert "no PJRT plugin is open" in register(tmp_path, "")["error"]


def test_register_gpu_gives_the_plugins_reason(tmp_path):
    # The fake plugin refuses the target fake.refused: rename one as long.
    data = fakes.build("fake_ops", PLATFORM="CUDA", ARCHS="9.0").read_bytes()
    assert b"fake.threads\0" in data
    ops = tmp_path / "refused.so"
    ops.write_bytes(data.replace(b"fake.threads\0", b"fake.refused\0"))
    answer = register(tmp_path, fakes.build("fake_pjrt_plugin"), ops)
    assert answer["error"] == (
        "fake.refused cannot be registered: fake plugin: refused"
    )


# ------------------------------------------------------------- client options

BASE = {"platform_name": "gpu", "allocator": "default"}


@pytest.mark.parametrize(
    ("environ", "options"),
    [
        ({}, {}),
        ({"PJRT_ALLOCATOR_FRACTION": "0.5"}, {"memory_fraction": 0.5}),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": ".25"}, {"memory_fraction": 0.25}),
        (
            {"PJRT_ALLOCATOR_FRACTION": "1", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.1"},
            {"memory_fraction": 1.0},
        ),
        (
            {"PJRT_ALLOCATOR_FRACTION": "1.5", "TF_FORCE_UNIFIED_MEMORY": "1"},
            {"memory_fraction": 1.5},
        ),
        ({"PJRT_ALLOCATOR_PREALLOCATE": "0"}, {"preallocate": False}),
        ({"PJRT_ALLOCATOR_PREALLOCATE": "1"}, {"preallocate": True}),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}, {"preallocate": False}),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "True"}, {"preallocate": True}),
        ({"PJRT_ALLOCATOR_PREALLOCATE": ""}, {}),
        ({"PJRT_ALLOCATOR_CUDA_ASYNC": "1"}, {"allocator": "cuda_async"}),
        ({"PJRT_ALLOCATOR_CUDA_ASYNC": "0"}, {}),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}, {"allocator": "platform"}),
        ({"XLA_PYTHON_CLIENT_ALLOCATOR": "BFC"}, {"allocator": "bfc"}),
        # torchrun: four processes on two hosts.
        (
            {
                "LOCAL_RANK": "1",
                "RANK": "3",
                "LOCAL_WORLD_SIZE": "2",
                "WORLD_SIZE": "4",
            },
            {"node_id": 3, "num_nodes": 4, "visible_devices": [1]},
        ),
        # xmp.spawn: two processes on this host.
        (
            {"PJRT_LOCAL_PROCESS_RANK": "1", "PJRT_LOCAL_PROCESS_COUNT": "2"},
            {"node_id": 1, "num_nodes": 2, "visible_devices": [1]},
        ),
        # One process on each of two hosts uses all GPUs of its host.
        (
            {
                "LOCAL_RANK": "0",
                "RANK": "1",
                "LOCAL_WORLD_SIZE": "1",
                "WORLD_SIZE": "2",
            },
            {"node_id": 1, "num_nodes": 2},
        ),
        # The launcher shows each process its own GPU only.
        (
            {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "5"},
            {"node_id": 1, "num_nodes": 2, "visible_devices": [0]},
        ),
        (
            {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "5,6"},
            {"node_id": 1, "num_nodes": 2, "visible_devices": [1]},
        ),
    ],
)
def test_client_options(environ, options):
    assert plugin.client_options(environ) == {**BASE, **options}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PJRT_ALLOCATOR_FRACTION", "0"),
        ("PJRT_ALLOCATOR_FRACTION", "1.5"),
        ("PJRT_ALLOCATOR_FRACTION", "-1"),
        ("PJRT_ALLOCATOR_FRACTION", "nan"),
        ("PJRT_ALLOCATOR_FRACTION", "half"),
        ("XLA_PYTHON_CLIENT_MEM_FRACTION", "2"),
        ("PJRT_ALLOCATOR_PREALLOCATE", "maybe"),
        ("XLA_PYTHON_CLIENT_PREALLOCATE", "2"),
        ("PJRT_ALLOCATOR_CUDA_ASYNC", "cuda"),
        ("XLA_PYTHON_CLIENT_ALLOCATOR", "arena"),
        ("LOCAL_RANK", "one"),
        ("RANK", "-1"),
        ("WORLD_SIZE", "0"),
        ("LOCAL_WORLD_SIZE", "1.0"),
    ],
)
def test_wrong_value_raises_naming_the_variable(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got '{value}'$"):
        plugin.client_options({name: value})


def test_fewer_visible_gpus_than_processes_raises():
    environ = {
        "LOCAL_RANK": "2",
        "LOCAL_WORLD_SIZE": "3",
        "CUDA_VISIBLE_DEVICES": "0,1",
    }
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES must name a GPU for"):
        plugin.client_options(environ)


def test_coordinator_is_needed_by_several_processes(monkeypatch):
    gpu = plugin.GpuPlugin()
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "PJRT_LOCAL_PROCESS_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert not gpu.requires_xla_coordinator()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert gpu.requires_xla_coordinator()
    monkeypatch.setenv("WORLD_SIZE", "two")  # library_path reports it
    assert not gpu.requires_xla_coordinator()


@pytest.mark.parametrize(
    ("visible", "count"),
    [("0,1,2", 3), ("GPU-3f", 1), ("", 1), ("-1", 1), ("0,-1,1", 1)],
)
def test_processes_of_spawn(monkeypatch, visible, count):
    monkeypatch.delenv("GPU_NUM_DEVICES", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert plugin.GpuPlugin().physical_chip_count() == count
    monkeypatch.setenv("GPU_NUM_DEVICES", "5")
    assert plugin.GpuPlugin().physical_chip_count() == 5


# ------------------------------------------------------------- finding plugins


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """A Python environment of its own; returns a function that installs a plugin."""
    monkeypatch.delenv(plugin.PLUGIN_VARIABLE, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.startswith("jax_plugins")]:
        monkeypatch.delitem(sys.modules, name)

    def install(name, version):
        path = tmp_path / "jax_plugins" / f"xla_{name}" / "xla_cuda_plugin.so"
        fakes.copy(fakes.build("fake_pjrt_plugin"), path)
        info = tmp_path / f"jax_{name}_pjrt-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: jax-{name}-pjrt\nVersion: {version}\n"
        )
        importlib.invalidate_caches()
        return path

    importlib.invalidate_caches()
    return install


def test_no_plugin_installed(installed):
    with pytest.raises(RuntimeError, match="none is installed: pip install jax-cuda12"):
        plugin.find_plugin()


def test_one_plugin_installed(installed):
    path = installed("cuda13", "0.7.2")
    assert plugin.find_plugin() == path
    assert plugin.describe_plugin(path) == f"{path} (jax-cuda13-pjrt 0.7.2)"


def test_two_plugins_installed(installed, monkeypatch):
    first = installed("cuda12", "0.7.1")
    second = installed("cuda13", "0.12.0.1")
    with pytest.raises(RuntimeError, match="2 CUDA plugins are installed") as info:
        plugin.find_plugin()
    text = str(info.value)
    assert f"{first} (jax-cuda12-pjrt 0.7.1)" in text
    assert f"{second} (jax-cuda13-pjrt 0.12.0.1)" in text
    assert "set XLA_OPS_PJRT_PLUGIN" in text and "pip uninstall" in text
    monkeypatch.setenv(plugin.PLUGIN_VARIABLE, str(second))
    assert plugin.find_plugin() == second


def test_named_plugin_that_does_not_exist(monkeypatch):
    monkeypatch.setenv(plugin.PLUGIN_VARIABLE, "/no/such.so")
    with pytest.raises(RuntimeError, match="XLA_OPS_PJRT_PLUGIN must be the path of"):
        plugin.find_plugin()


# ---------------------------------------------------------- driver and kernels

_numbers = itertools.count()


@pytest.fixture
def driver(monkeypatch):
    """Has cuda_driver load the fake driver; returns a function that configures it."""
    path = fakes.build("fake_cuda_driver")
    monkeypatch.setattr(cuda_driver, "_DRIVER_LIBRARY", str(path))

    # ctypes.CDLL sees the environment of C, which monkeypatch.setenv changes too.
    def configure(init=0, version=13000, devices="9.0"):
        monkeypatch.setenv("FAKE_CUDA_INIT", str(init))
        monkeypatch.setenv("FAKE_CUDA_VERSION", str(version))
        monkeypatch.setenv("FAKE_CUDA_DEVICES", devices)

    configure()
    return configure


@pytest.fixture
def kernels(monkeypatch, tmp_path):
    """Puts one CUDA op library with the given architectures in place of the wheel's."""

    def install(archs, version=12000):
        folder = tmp_path / "lib"
        # Targets of its own: each stays loaded, and no two may have the same.
        prefix = f"kernels{next(_numbers)}"
        ops = fakes.build(
            "fake_ops",
            PREFIX=prefix,
            PLATFORM="CUDA",
            ARCHS=archs,
            VERSION=version,
        )
        fakes.copy(ops, folder / "libxla_ops_fake_cuda.so")
        monkeypatch.setattr(plugin, "_LIB", folder)

    return install


PLUGIN_12 = pathlib.Path("/x/jax_plugins/xla_cuda12/xla_cuda_plugin.so")
PLUGIN_13 = pathlib.Path("/x/jax_plugins/xla_cuda13/xla_cuda_plugin.so")


def test_driver_query(driver):
    driver(version=12080, devices="9.0,7.5")
    found = cuda_driver.query()
    assert found.cuda_version == (12, 8)
    assert [device.capability for device in found.devices] == [(9, 0), (7, 5)]
    assert [device.name for device in found.devices] == ["Fake GPU 0", "Fake GPU 1"]
    assert found.devices[0].memory_bytes == 80 << 30


def test_no_driver(monkeypatch):
    monkeypatch.setattr(cuda_driver, "_DRIVER_LIBRARY", "libno_such_driver.so.1")
    with pytest.raises(RuntimeError, match="no NVIDIA driver: .*install the NVIDIA"):
        plugin.check_machine(PLUGIN_13)


@pytest.mark.parametrize(
    ("init", "text"),
    [
        (100, r"CUDA_ERROR_NO_DEVICE \(100\): no GPU is visible"),
        (999, r"error 999: check that the kernel module is loaded"),
        (803, "have different versions: reboot"),
        (5, "error 5: check that nvidia-smi works"),
    ],
)
def test_driver_that_cannot_start(driver, init, text):
    driver(init=init)
    with pytest.raises(cuda_driver.DriverError, match=text):
        plugin.check_machine(PLUGIN_13)


def test_driver_without_devices(driver):
    driver(devices="")
    with pytest.raises(cuda_driver.DriverError, match="shows no GPU"):
        plugin.check_machine(PLUGIN_13)


def test_driver_too_old_for_the_plugin(driver, kernels):
    kernels("9.0")
    driver(version=12080)
    with pytest.raises(
        RuntimeError, match="runs CUDA up to 12.8, and .* needs CUDA 13"
    ):
        plugin.check_machine(PLUGIN_13)
    plugin.check_machine(PLUGIN_12)


def test_driver_too_old_for_the_kernels(driver, kernels):
    kernels("9.0", version=13020)
    driver(version=12080)
    with pytest.raises(
        RuntimeError,
        match="runs CUDA up to 12.8, and the kernels of libxla_ops_fake_cuda.so were"
        " built with CUDA 13.2: update the driver",
    ):
        plugin.check_machine(PLUGIN_12)
    driver(version=13000)  # any driver of a major version runs its minor ones
    plugin.check_machine(PLUGIN_12)


def test_gpu_older_than_the_kernels(driver, kernels):
    kernels("8.0 9.0a")
    driver(devices="9.0,8.6")
    plugin.check_machine(PLUGIN_13)
    driver(devices="9.0,7.5")
    with pytest.raises(RuntimeError) as info:
        plugin.check_machine(PLUGIN_13)
    assert str(info.value).startswith(
        "GPU 1 (Fake GPU 1) has compute capability 7.5, and the kernels of"
        " libxla_ops_fake_cuda.so were built for 8.0 9.0a: build xla_ops with 7.5"
    )


def test_only_the_gpu_of_this_process_counts(driver, kernels, monkeypatch):
    kernels("9.0")
    driver(devices="9.0,7.5")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    plugin.check_machine(PLUGIN_13)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(RuntimeError, match="compute capability 7.5"):
        plugin.check_machine(PLUGIN_13)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RuntimeError, match="is to use GPU 2, and 2 are visible"):
        plugin.check_machine(PLUGIN_13)


@pytest.mark.parametrize(
    ("archs", "runs", "not_on"),
    [
        ("8.0", ["8.0", "8.6", "8.9"], ["7.5", "9.0", "12.0"]),
        ("8.6", ["8.6", "8.9"], ["8.0"]),
        ("9.0a", ["9.0"], ["8.0", "10.0", "12.0"]),
        ("10.0", ["10.0", "10.3"], ["9.0", "12.0"]),
        ("10.0f", ["10.0", "10.3"], ["12.0"]),
        ("12.0+PTX", ["12.0", "12.1", "13.0"], ["10.0"]),
        ("7.5 8.0 9.0a 12.0+PTX", ["7.5", "8.9", "9.0", "12.0", "15.0"], ["10.0"]),
        ("7.5,8.0", ["7.5", "8.0"], ["7.0"]),
        ("", [], ["9.0"]),
    ],
)
def test_runs_on(archs, runs, not_on):
    for text, expected in [(t, True) for t in runs] + [(t, False) for t in not_on]:
        major, minor = map(int, text.split("."))
        assert plugin.runs_on(archs, (major, minor)) is expected, text


def test_malformed_architecture_raises():
    with pytest.raises(ValueError, match="malformed architecture 'sm_90'"):
        plugin.runs_on("8.0 sm_90", (9, 0))


# ------------------------------------------------------------- through torch_xla

USE_DEVICE = """
import torch, torch_xla
for _ in range(2):
    try:
        torch.ones(2, device="xla") + 1
    except RuntimeError as error:
        print("ERROR:", str(error).replace(chr(10), " "))
print("alive")
"""


def use_device(tmp_path, device, path, **environ):
    """Uses the device twice in a new process with the fake driver; returns stdout."""
    driver_folder = tmp_path / "driver"
    fakes.copy(fakes.build("fake_cuda_driver"), driver_folder / "libcuda.so.1")
    search = os.environ.get("LD_LIBRARY_PATH")
    done = subprocess.run(
        [sys.executable, "-c", USE_DEVICE],
        check=False,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PJRT_DEVICE": device,
            "FAKE_CUDA_DEVICES": "9.0",
            "LD_LIBRARY_PATH": ":".join(filter(None, [str(driver_folder), search])),
            plugin.PLUGIN_VARIABLE: str(path),
            **environ,
        },
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "alive", done.stdout
    errors = [line for line in lines if line.startswith("ERROR: ")]
    assert len(errors) == 2 and errors[0] == errors[1], done.stdout
    return errors[0].removeprefix("ERROR: ")


def test_options_reach_a_newer_plugin_through_torch_xla(tmp_path):
    error = use_device(
        tmp_path,
        "GPU",
        fakes.build("fake_pjrt_plugin"),
        PJRT_ALLOCATOR_FRACTION="0.5",
        PJRT_ALLOCATOR_PREALLOCATE="0",
        PJRT_ALLOCATOR_CUDA_ASYNC="1",
    )
    assert "fake plugin: no devices" in error
    options = error.split("options: ")[1].split(";")[0].split()
    assert sorted(options) == [
        "allocator=cuda_async",
        "memory_fraction=0.500000",
        "platform_name=gpu",
        "preallocate=false",
    ]


@pytest.mark.parametrize(
    ("macros", "environ", "text"),
    [
        ({"MAJOR": 1}, {}, "torch_xla needs major version 0: install another"),
        ({}, {"FAKE_CUDA_INIT": "100"}, "no GPU is visible: check nvidia-smi"),
        ({}, {"PJRT_ALLOCATOR_FRACTION": "3"}, "PJRT_ALLOCATOR_FRACTION must be"),
    ],
)
def test_error_is_torch_xlas_and_the_process_goes_on(tmp_path, macros, environ, text):
    path = fakes.build("fake_pjrt_plugin", **macros)
    assert text in use_device(tmp_path, "CUDA", path, **environ)


def test_import_of_torch_xla_registers_both_names_and_looks_at_nothing():
    code = (
        "import sys, torch_xla\n"
        "from torch_xla.experimental import plugins\n"
        "from xla_ops.plugin import GpuPlugin\n"
        "for name in ('GPU', 'CUDA'):\n"
        "    assert type(plugins._plugin_registry[name]) is GpuPlugin\n"
        "assert 'xla_ops.cuda_driver' not in sys.modules\n"
        "maps = open('/proc/self/maps').read()\n"
        "assert 'libxla_ops_' not in maps and 'libcuda.so' not in maps\n"
        "import torch\n"
        "print((torch.ones(2, device='xla') + 1).sum().item())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "PJRT_DEVICE": "CPU",
            # Would raise if anything looked.
            plugin.PLUGIN_VARIABLE: "/no/such.so",
            "PJRT_ALLOCATOR_FRACTION": "7",
        },
    )
    assert done.stdout.strip() == "4.0"
