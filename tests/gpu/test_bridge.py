"""The bridge, on any machine: a fake (fakes.py) stands for JAX's CUDA plugin.

The fake plugin claims to be newer than torch_xla: it refuses every argument struct that
is not longer than torch_xla's, and any that is not zero where it is longer.
Its extensions do so too.
"""

from __future__ import annotations

import ctypes
import pathlib
import threading

import pytest

import fakes
import xla_ops
from xla_ops import _runtime

BRIDGE = pathlib.Path(xla_ops.__file__).parent / "lib" / "libxla_ops_pjrt.so"

# Positions in PJRT's function table.
INITIALIZE, COMPILE, OPTIMIZED_PROGRAM, EXECUTE, AOT_COMPILE = 3, 20, 48, 55, 89
PROFILER, STREAM, LAYOUTS, MEMORY = 1, 3, 4, 6  # types of extensions
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
    def table(self) -> list[int]:
        address = self.library.GetPjrtApi()
        size = ctypes.c_size_t.from_address(address).value
        count = (size - 40) // 8
        table = (ctypes.c_void_p * count).from_address(address + 40)
        return [function or 0 for function in table]

    @property
    def version(self) -> tuple[int, int]:
        address = self.library.GetPjrtApi()
        return tuple((ctypes.c_int * 2).from_address(address + 32))

    @property
    def extensions(self) -> dict[int, list[int]]:
        """By type, the words behind each extension's head, in the list's order."""
        found = {}
        address = ctypes.c_void_p.from_address(self.library.GetPjrtApi() + 8).value
        while address is not None:
            size = ctypes.c_size_t.from_address(address).value
            kind = ctypes.c_int.from_address(address + 8).value
            words = (ctypes.c_uint64 * (size // 8)).from_address(address)
            found[kind] = list(words)[3:]
            address = ctypes.c_void_p.from_address(address + 16).value
        return found

    def call(self, index: int, *fields: int) -> list[int]:
        """Calls a function with the struct {size, null, *fields}; returns its words.

        Raises RuntimeError with the error's text.
        """
        return self.call_address(self.table[index], 0, *fields)

    def call_address(self, address: int, *fields: int, size: int = 0) -> list[int]:
        """Calls the function with {size, *fields}, of which the size may say less."""
        words = (ctypes.c_uint64 * (len(fields) + 1))(0, *fields)
        words[0] = size or ctypes.sizeof(words)
        function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(address)
        error = function(ctypes.addressof(words))
        if error is not None:
            raise RuntimeError(self.take_error(error))
        assert words[0] == (size or ctypes.sizeof(words))
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
    assert opened.table[70] == 0


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


@pytest.mark.parametrize("index, fields", [(COMPILE, 5), (AOT_COMPILE, 6)])
def test_program_is_padded_too(opened, index, fields):
    program = struct(0, 77, 0, 0)
    words = opened.call(index, 0, ctypes.addressof(program), *[0] * (fields - 2))
    assert words[3] == ctypes.addressof(program)
    assert words[-1] == 77


def compiled_with(bridge, options: bytes) -> str:
    """What options the plugin gets where the framework gives these."""
    program = struct(0, 77, 0, 0)
    given = ctypes.create_string_buffer(options, len(options))
    fields = [0, ctypes.addressof(program), ctypes.addressof(given), len(options), 0]
    words = (ctypes.c_uint64 * 7)(56, 0, *fields)
    function = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(bridge.table[COMPILE])
    error = function(ctypes.addressof(words))
    assert list(words)[2:6] == fields[:4], "the caller's are as they were"
    return bridge.take_error(error).removeprefix("fake plugin: compile options ")


def test_options_of_a_thread_follow_the_frameworks(opened):
    path = str(opened.path)
    assert compiled_with(opened, b"ab") == "ab;"
    _runtime.set_compile_options(path, b"cde")
    assert compiled_with(opened, b"ab") == "abcde;"
    assert compiled_with(opened, b"") == "cde;"
    others = []
    thread = threading.Thread(target=lambda: others.append(compiled_with(opened, b"x")))
    thread.start()
    thread.join()
    assert others == ["x;"]
    _runtime.set_compile_options(path, b"")
    assert compiled_with(opened, b"ab") == "ab;"


def test_options_need_the_bridge(tmp_path):
    with pytest.raises(RuntimeError, match="cannot load the bridge"):
        _runtime.set_compile_options(str(tmp_path / "none.so"), b"a")


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


def test_extensions_keep_their_order(opened):
    expected = [4242, 0, PROFILER, MEMORY, LAYOUTS, STREAM]
    assert list(opened.extensions) == expected


# By function: how many words torch_xla 2.9.0 passes, the size among them.
@pytest.mark.parametrize(
    "extension, words",
    [(STREAM, [3, 3]), (LAYOUTS, [3, 7, 7, 4]), (MEMORY, [6])],
)
def test_extensions_get_longer_structs(opened, extension, words):
    for index, count in enumerate(words):
        fields = [2, 3, *[0] * count][: count - 1]
        answer = opened.call_address(opened.extensions[extension][index], *fields)
        assert answer[1:-1] == fields[:-1]
        assert answer[-1] == extension * 1000 + index * 100 + 23


def test_a_size_that_is_no_multiple_of_eight(opened):
    function = opened.extensions[MEMORY][1]
    untouched = 0xABCD << 32  # behind the 44 bytes that are passed
    words = opened.call_address(function, 0, 9, 0, 0, untouched, size=44)
    assert ctypes.string_at(words[3], words[4]) == b"device"
    assert words[5] == untouched + 5


def test_what_torch_xla_does_not_know_of_an_extension_is_the_plugins(opened):
    functions = opened.extensions[LAYOUTS]
    assert functions[4] == 0  # a missing function stays missing
    assert functions[6:] == [1, 0]
    with pytest.raises(RuntimeError, match=r"extension 4.5 size: expected 56, got 40"):
        opened.call_address(functions[5], 2, 3, 0, 0)


def test_the_profilers_table_is_as_long_as_torch_xla_wants_it(opened):
    """It wants the size to be exact, and sets no size of arguments."""
    api, _ = opened.extensions[PROFILER]
    table = (ctypes.c_uint64 * 10).from_address(api)
    assert table[0] == 80
    unset = 0x5555555555555555
    assert opened.call_address(table[5], 0, 0, 0, size=unset) == [unset, 0, 0, 77]


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
    "macros, text",
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
    bridge.library.xla_ops_pjrt_fail(str(info.value).encode())
    with pytest.raises(RuntimeError, match=text):
        bridge.call(INITIALIZE)


@pytest.mark.parametrize("minor", [75, 76, 115])
def test_plugin_generations(bridge, minor, capfd):
    path = fakes.build("fake_pjrt_plugin", MINOR=minor)
    assert bridge.open(path).version == (0, minor)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("minor", [116, 900])
def test_a_plugin_newer_than_the_tested_ones_warns_once(bridge, minor, capfd):
    path = fakes.build("fake_pjrt_plugin", MINOR=minor)
    assert bridge.open(path).version == (0, minor)
    bridge.open(path)
    warning = capfd.readouterr().err
    assert warning.startswith(
        f"xla_ops: PJRT plugin {path} speaks PJRT API 0.{minor}, newer than 0.115, "
    )
    assert warning.count("\n") == 1


def test_not_a_plugin(bridge):
    with pytest.raises(RuntimeError, match="does not export GetPjrtApi"):
        bridge.open(fakes.build("fake_ops"))
    with pytest.raises(RuntimeError, match="cannot be loaded: /no/such.so: cannot"):
        bridge.open("/no/such.so")


def test_without_a_plugin_every_function_fails(bridge, monkeypatch):
    monkeypatch.delenv("XLA_OPS_PJRT_PLUGIN", raising=False)
    assert len(bridge.table) >= 115
    for index in range(3, len(bridge.table)):
        with pytest.raises(RuntimeError, match="no PJRT plugin to wrap"):
            bridge.call(index, 0, 0)


def test_plugin_named_by_the_environment_is_opened(bridge, monkeypatch):
    path = fakes.build("fake_pjrt_plugin")
    monkeypatch.setenv("XLA_OPS_PJRT_PLUGIN", str(path))
    assert bridge.version == (0, 115)


def test_find_plugin_info():
    path = str(fakes.build("fake_pjrt_plugin"))
    assert _runtime.find_plugin_info(path) == {
        "path": path,
        "error": "",
        "fix": "",
        "warning": "",
        "major": 0,
        "minor": 115,
        "extensions": [4242, 0, PROFILER, MEMORY, LAYOUTS, STREAM],
        "custom_call": True,
    }
    info = _runtime.find_plugin_info(str(fakes.build("fake_pjrt_plugin", EXTENSION=0)))
    assert (info["extensions"], info["custom_call"]) == (
        [4242, PROFILER, MEMORY, LAYOUTS, STREAM],
        False,
    )
    info = _runtime.find_plugin_info(str(fakes.build("fake_pjrt_plugin", MAJOR=1)))
    assert (info["major"], info["minor"]) == (1, 115)
    assert "speaks PJRT API 1.115" in info["error"]
    assert info["fix"].startswith("install xla_ops[cuda13], or xla_ops[cuda12]")
    info = _runtime.find_plugin_info(str(fakes.build("fake_pjrt_plugin", MINOR=900)))
    assert info["error"] == info["fix"] == ""
    assert "speaks PJRT API 0.900, newer than" in info["warning"]
    info = _runtime.find_plugin_info("/no/such.so")
    assert (info["major"], info["custom_call"]) == (None, False)
    assert "cannot be loaded" in info["error"]
    assert info["fix"].startswith("install xla_ops[cuda13], or xla_ops[cuda12]")
