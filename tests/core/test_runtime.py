"""xla_ops._runtime: op libraries, ELF symbols, direct calls, CPU registration.

The libraries under test are the wheel's own and fakes built on the spot (fakes.py).
Registration with a GPU plugin is in tests/gpu/test_registration.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import random
import struct
import subprocess
import sys
import threading
import time

import _XLAC
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fakes
import xla_ops
from xla_ops import _runtime

S64 = 5
F32 = 11
LIB = pathlib.Path(xla_ops.__file__).parent / "lib"
GET_API = "_ZN3xla3ffi12GetXlaFfiApiEv"


def call(target, args=(), results=(), *, platform="Host", stream=0, **attrs):
    """Calls a fake handler on int64 tensors."""

    def buffers(tensors):
        return [(t.data_ptr(), S64, tuple(t.shape)) for t in tensors]

    _runtime.call(target, platform, stream, buffers(args), buffers(results), attrs)


def ints(*shape):
    return torch.full(shape, -1, dtype=torch.int64)


@pytest.fixture(scope="session", autouse=True)
def fake_ops():
    """The fake library, loaded once: it stays in the process."""
    path = fakes.build("fake_ops")
    _runtime.load_library(str(path))
    return path


# ---------------------------------------------------------------- op libraries


def test_load_library_lists_the_handlers_and_is_idempotent(fake_ops):
    first = _runtime.load_library(str(fake_ops))
    assert ("fake.shapes", "Host") in first
    assert _runtime.load_library(str(fake_ops)) == first


def test_wheel_has_a_host_handler_for_each_op():
    targets = set()
    for path in LIB.glob("libxla_ops_*_cpu.so"):
        handlers = _runtime.load_library(str(path))
        assert {platform for _, platform in handlers} == {"Host"}
        assert _runtime.cuda_archs(str(path)) == ""
        assert _runtime.cuda_version(str(path)) == 0
        targets |= {target for target, _ in handlers}
    assert {
        "xla_ops.rms_norm",
        "xla_ops.reshape_and_cache_flash",
        "xla_ops.paged_attention",
    } <= targets


def test_cuda_archs_and_version_come_from_the_library():
    macros = {"PREFIX": "archs", "PLATFORM": "CUDA", "ARCHS": "8.0 9.0a"}
    path = fakes.build("fake_ops", **macros, VERSION=13020)
    assert _runtime.cuda_archs(str(path)) == "8.0 9.0a"
    assert _runtime.cuda_version(str(path)) == 13020


@pytest.mark.parametrize(
    "macros, text",
    [
        ({"NO_TABLE": None}, "does not export xla_ops_handlers"),
        ({"UNDEFINED": None, "PREFIX": "u"}, "no_library_has_this_symbol"),
        ({"PREFIX": "p", "PLATFORM": "TPU"}, "platform TPU, which is neither"),
        ({"PREFIX": "i", "INCOMPLETE": None}, "has an incomplete entry"),
        ({"PREFIX": "t", "TWICE": None}, "handler table has t.wait for Host twice"),
        ({"NO_TABLE": None, "PREFIX": "n"}, "is not an op library"),
    ],
)
def test_bad_library_raises_os_error_naming_it(macros, text):
    path = fakes.build("fake_ops", **macros)
    with pytest.raises(OSError, match=text) as info:
        _runtime.load_library(str(path))
    assert str(path) in str(info.value)


def test_missing_file_raises_os_error_naming_it():
    with pytest.raises(OSError, match="/no/such/file.so: cannot open"):
        _runtime.load_library("/no/such/file.so")


def test_plan_passes_structs_that_begin_with_their_size(fake_ops):
    fields = _runtime.plan(str(fake_ops), "xla_ops_fake_plan", [5, 2**40], 3)
    assert fields == [8 * 3, 8 * 4, 5 + 2**40]


def test_refused_plan_raises_with_the_librarys_text(fake_ops):
    text = "xla_ops_fake_plan: the first field must be at least 0"
    with pytest.raises(ValueError, match=text):
        _runtime.plan(str(fake_ops), "xla_ops_fake_plan", [-1], 3)


def test_plan_without_a_function_or_a_library_raises(fake_ops):
    with pytest.raises(OSError, match="does not export xla_ops_no_plan"):
        _runtime.plan(str(fake_ops), "xla_ops_no_plan", [], 0)
    with pytest.raises(OSError, match="/no/such/file.so: cannot open"):
        _runtime.plan("/no/such/file.so", "xla_ops_fake_plan", [], 0)


def test_target_in_two_libraries_raises_naming_both(fake_ops, tmp_path):
    twin = fakes.copy(fake_ops, tmp_path / "twin.so")
    with pytest.raises(OSError, match=r"fake.shapes for Host is in .*fake_ops") as info:
        _runtime.load_library(str(twin))
    assert str(twin) in str(info.value)


# ---------------------------------------------------------------- direct calls


def test_call_passes_dtypes_and_shapes():
    out = ints(16)
    call("fake.shapes", [ints(2, 3), ints(0), ints()], [out])
    assert out.tolist()[:8] == [3, S64, 2, 2, 3, S64, 1, 0]
    assert out.tolist()[8:10] == [S64, 0]


def show_attrs(**attrs):
    out = torch.zeros(4096, dtype=torch.uint8)
    _runtime.call(
        "fake.attrs", "Host", 0, [], [(out.data_ptr(), 6, tuple(out.shape))], attrs
    )
    return bytes(out.tolist()).split(b"\0")[0].decode()


@pytest.mark.parametrize(
    "value, shown",
    [
        (True, "a:3:1:01;"),
        (False, "a:3:1:00;"),
        (7, "a:3:5:0700000000000000;"),
        (-1, "a:3:5:ffffffffffffffff;"),
        (1.5, "a:3:11:0000c03f;"),
        ("fp8", "a:4:0:667038;"),
        ("", "a:4:0:;"),
        ([1, 2], "a:1:5:01000000000000000200000000000000;"),
        ((1.0, 2), "a:1:11:0000803f00000040;"),
        ([], "a:1:5:;"),
    ],
)
def test_attribute_types(value, shown):
    assert show_attrs(a=value) == shown


def test_attributes_arrive_sorted_by_name():
    assert [item.split(":")[0] for item in show_attrs(b=1, a=2, c=3).split(";")] == [
        "a",
        "b",
        "c",
        "",
    ]


@pytest.mark.parametrize("value", [None, {}, object(), [True], ["x"]])
def test_attribute_of_another_type_raises(value):
    with pytest.raises(TypeError, match="attribute a"):
        show_attrs(a=value)


@pytest.mark.parametrize("code", range(1, 17))
def test_error_code_becomes_an_exception_with_the_handlers_text(code):
    expected = ValueError if code == 3 else RuntimeError
    with pytest.raises(expected) as info:
        call("fake.fail", code=code)
    assert str(info.value) == "fake.fail: code must be 0, got another"


def test_unknown_target_raises():
    with pytest.raises(RuntimeError, match="no handler|has a handler fake.none"):
        call("fake.none")


def test_negative_dim_raises():
    with pytest.raises(ValueError, match="dims of argument 0 must be at least 0"):
        _runtime.call("fake.shapes", "Host", 0, [(0, S64, (2, -1))], [], {})


def test_instantiate_runs_once_for_each_set_of_attributes():
    out = ints(4)
    seen = []
    for value in (5, 6, 5, 6, 6):
        call("fake.stages", results=[out], value=value)
        state, instantiate, prepare, initialize = out.tolist()
        assert state == value
        seen.append((instantiate, prepare, initialize))
    start = seen[0]
    assert [n - start[0] for n, _, _ in seen] == [0, 1, 1, 1, 1]
    for stage in (1, 2):
        assert [s[stage] - start[stage] for s in seen] == [0, 1, 2, 3, 4]


def test_failed_instantiate_is_an_error_each_time():
    for _ in range(2):
        with pytest.raises(ValueError, match="value must be 0 or more"):
            call("fake.stages", results=[ints(4)], value=-2)


def test_threads_are_lent_and_run_all_tasks():
    code = (
        "import torch, sys; from xla_ops import _runtime\n"
        "_runtime.load_library(sys.argv[1])\n"
        "out = torch.zeros(2, dtype=torch.int64)\n"
        "result = (out.data_ptr(), 5, (2,))\n"
        "_runtime.call('fake.threads', 'Host', 0, [], [result], {})\n"
        "print(*out.tolist())"
    )

    def run(cpus):
        return subprocess.run(
            [sys.executable, "-c", code, str(fakes.build("fake_ops"))],
            preexec_fn=lambda: os.sched_setaffinity(0, cpus),
            capture_output=True,
            check=False,
            text=True,
        )

    usable = sorted(os.sched_getaffinity(0))
    many = run(usable)
    if len(usable) > 1:
        assert many.stdout.split() == [str(len(usable)), "4950"], many.stderr
    one = run(usable[:1])
    assert "this call has no thread pool" in one.stderr


def test_threads_work_in_a_forked_child():
    out = ints(2)
    if len(os.sched_getaffinity(0)) > 1:
        call("fake.threads", results=[out])
        assert out.tolist()[1] == 4950
        child = os.fork()
        if child == 0:
            call("fake.threads", results=[out])
            os._exit(0 if out.tolist()[1] == 4950 else 1)
        assert os.waitpid(child, 0)[1] == 0


def test_stream_reaches_cuda_handlers_alone():
    path = fakes.build("fake_ops", PREFIX="stream_test", PLATFORM="CUDA", ARCHS="9.0")
    _runtime.load_library(str(path))
    out = ints(1)
    call("stream_test.stream", results=[out], platform="CUDA", stream=0x1234)
    assert out.item() == 0x1234
    call("stream_test.stream", results=[out], platform="CUDA")
    assert out.item() == 0
    with pytest.raises(RuntimeError, match="this call has no stream"):
        call("fake.stream", results=[out], stream=0x1234)


def test_call_releases_the_gil():
    flag = torch.zeros(1, dtype=torch.int64)
    out = ints(1)

    def set_flag():
        time.sleep(0.05)
        flag.fill_(1)

    thread = threading.Thread(target=set_flag)
    thread.start()
    call("fake.wait", [flag], [out])
    thread.join()
    assert out.item() == 1


def test_calls_from_many_threads():
    failures = []

    def work(seed):
        for value in range(seed, seed + 50):
            out = ints(4)
            call("fake.stages", results=[out], value=value)
            if out[0].item() != value:
                failures.append((value, out.tolist()))

    threads = [threading.Thread(target=work, args=(10 * i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


# ----------------------------------------------------------------- ELF symbols


def elf(
    *,
    symbols=(("f", 0x1230, 2, 1),),
    sections=("symtab", "strtab"),
    extended_count=False,
) -> bytes:
    """A minimal ELF64 shared object; symbols are (name, value, type, section)."""
    strings = b"\0"
    table = struct.pack("<IBBHQQ", 0, 0, 0, 0, 0, 0)
    for name, value, kind, place in symbols:
        table += struct.pack("<IBBHQQ", len(strings), kind, 0, place, value, 8)
        strings += name.encode() + b"\0"
    header_size, table_at = 64, 64
    strings_at = table_at + len(table)
    sections_at = strings_at + len(strings)
    count = 1 + len(sections)

    def section(kind, offset, size, link, entry):
        return struct.pack(
            "<IIQQQQIIQQ", 0, kind, 0, 0, offset, size, link, 0, 1, entry
        )

    headers = section(0, 0, count if extended_count else 0, 0, 0)
    for name in sections:
        if name == "symtab":
            headers += section(2, table_at, len(table), 2, 24)
        elif name == "strtab":
            headers += section(3, strings_at, len(strings), 0, 0)
    header = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header += struct.pack(
        "<HHIQQQIHHHHHH",
        3,
        62,
        1,
        0,
        0,
        sections_at,
        0,
        header_size,
        0,
        0,
        64,
        0 if extended_count else count,
        0,
    )
    return header + table + strings + headers  # fmt: skip


def find(data: bytes, names, tmp_path):
    path = tmp_path / "file.so"
    path.write_bytes(data)
    return _runtime._find_symbols(str(path), names)


def test_finds_local_functions(tmp_path):
    data = elf(symbols=[("ab", 1, 2, 1), ("b", 2, 2, 1), ("b", 3, 1, 1)])
    assert find(data, ["b"], tmp_path) == {"b": 2}
    assert find(data, ["ab", "b"], tmp_path) == {"ab": 1, "b": 2}


def test_finds_a_name_that_shares_the_tail_of_another(tmp_path):
    # Linkers store "f" inside "gf": both names are wanted, one string is there.
    data = bytearray(elf(symbols=[("gf", 0x10, 2, 1), ("x", 0x20, 2, 1)]))
    data[64 + 48 : 64 + 52] = struct.pack("<I", 2)  # the second one's name
    assert find(bytes(data), ["f", "gf"], tmp_path) == {"f": 0x20, "gf": 0x10}


def test_finds_with_more_sections_than_the_header_can_count(tmp_path):
    assert find(elf(extended_count=True), ["f"], tmp_path) == {"f": 0x1230}


def test_agrees_with_the_loader(fake_ops):
    found = _runtime._find_symbols(str(fake_ops), ["xla_ops_handlers"])
    other = ctypes.CDLL(str(fake_ops))
    address = ctypes.cast(other.xla_ops_handlers, ctypes.c_void_p).value
    # The load bias is a multiple of the page size.
    assert address % 4096 == found["xla_ops_handlers"] % 4096


@pytest.mark.parametrize(
    "data, text",
    [
        (b"", "not an ELF file"),
        (b"hello", "not an ELF file"),
        (b"\x7fELF", "not an ELF file"),
        (b"MZ" + bytes(100), "not an ELF file"),
        (elf()[:4] + b"\x01" + elf()[5:], "not a 64-bit"),
        (elf()[:5] + b"\x02" + elf()[6:], "not a 64-bit"),
        (elf()[:18] + b"\xb7\x00" + elf()[20:], "not a 64-bit"),
        (elf()[:16] + b"\x02\x00" + elf()[18:], "not a shared object"),
        (elf()[:40] + bytes(8) + elf()[48:], "stripped"),
        (elf()[:40] + b"\xff" * 8 + elf()[48:], "truncated: the section table"),
        (elf()[:-1], "truncated: the section table"),
        (elf()[:64], "truncated: the section table"),
        (elf()[:58] + b"\x20\x00" + elf()[60:], "size of a section header"),
        (elf(sections=()), "the file was stripped"),
        (elf(sections=("strtab",)), "the file was stripped"),
        (elf(sections=("symtab",)), "has no string table"),
        (elf(sections=("symtab", "symtab")), "has no string table"),
        (elf(symbols=[("g", 1, 2, 1)]), "no function f"),
        (elf(symbols=[("ff", 1, 2, 1)]), "no function f"),
        (elf(symbols=[("f", 1, 1, 1)]), "no function f"),  # an object
        (elf(symbols=[("f", 0, 2, 0)]), "no function f"),  # undefined
        (elf(symbols=[]), "no function f"),
    ],
)
def test_bad_file_raises_with_the_reason(data, text, tmp_path):
    with pytest.raises(RuntimeError, match=text):
        find(data, ["f"], tmp_path)


@pytest.mark.parametrize("field", [24, 32])  # offset, size
@pytest.mark.parametrize("section", [1, 2])
def test_section_outside_the_file_raises(field, section, tmp_path):
    data = bytearray(elf())
    at = len(data) - 64 * (3 - section) + field
    for value in (len(data), 2**63, 2**64 - 1, 2**64 - 24):
        data[at : at + 8] = struct.pack("<Q", value)
        with pytest.raises(RuntimeError, match="truncated: the (symbol|string) table"):
            find(bytes(data), ["f"], tmp_path)


def test_missing_file_and_folder_raise(tmp_path):
    with pytest.raises(RuntimeError, match="No such file"):
        _runtime._find_symbols(str(tmp_path / "none"), ["f"])
    with pytest.raises(RuntimeError, match="not an ELF file"):
        _runtime._find_symbols(str(tmp_path), ["f"])


def survives(data, tmp_path):
    with contextlib.suppress(RuntimeError):
        assert isinstance(find(data, ["f"], tmp_path), dict)


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    st.integers(0, 400),
)
def test_no_bytes_crash_the_reader(tmp_path_factory, edits, length):
    data = bytearray(elf(symbols=[("f", 1, 2, 1), ("gf", 2, 2, 1)]))
    for at, byte in edits:
        if at < len(data):
            data[at] = byte
    survives(bytes(data[: max(length, 64)]), tmp_path_factory.getbasetemp())


def test_no_edit_of_a_real_library_crashes_the_reader(fake_ops, tmp_path):
    original = fake_ops.read_bytes()
    sections = struct.unpack_from("<Q", original, 40)[0]
    rng = random.Random(0)
    for _ in range(300):
        data = bytearray(original)
        for _ in range(rng.randrange(1, 5)):
            # Half of the edits hit the file's header or the section headers.
            at = rng.choice(
                [rng.randrange(64), rng.randrange(sections, len(data))]
                if rng.random() < 0.5
                else [rng.randrange(len(data))]
            )
            data[at] = rng.choice([0, 0xFF, rng.randrange(256)])
        survives(bytes(data[: rng.choice([len(data), rng.randrange(len(data))])]),
                 tmp_path)  # fmt: skip


# ------------------------------------------------------------ CPU registration


def test_symbol_search_in_torch_xla_is_fast():
    _runtime._find_symbols(_XLAC.__file__, [GET_API])  # reads the file from disk
    start = time.perf_counter()
    found = _runtime._find_symbols(_XLAC.__file__, [GET_API])
    assert time.perf_counter() - start < 0.3
    assert found[GET_API] > 0


def test_register_cpu_registers_what_is_loaded_once(fake_ops):
    _runtime.register_cpu(_XLAC.__file__)
    registered = _runtime.registered()
    assert set(registered) == {"Host", "CUDA"}
    assert "fake.shapes" in registered["Host"]
    assert _runtime.register_cpu(_XLAC.__file__) == {}
    path = fakes.build("fake_ops", PREFIX="later")
    _runtime.load_library(str(path))
    assert _runtime.register_cpu(_XLAC.__file__)["later.shapes"] == ""
    assert "later.shapes" in _runtime.registered()["Host"]


def test_register_cpu_of_a_library_that_is_not_loaded_raises(fake_ops, tmp_path):
    copy = fakes.copy(fake_ops, tmp_path / "_XLAC.so")
    for path in (copy, tmp_path / "none.so"):
        with pytest.raises(RuntimeError, match="is not loaded: import torch_xla first"):
            _runtime.register_cpu(str(path))


def test_register_cpu_of_another_library_raises(fake_ops):
    with pytest.raises(RuntimeError, match="is not torch_xla's library"):
        _runtime.register_cpu(str(fake_ops))


def test_stripped_library_raises(fake_ops, tmp_path):
    stripped = tmp_path / "stripped.so"
    subprocess.run(["strip", str(fake_ops), "-o", str(stripped)], check=True)
    with pytest.raises(RuntimeError, match="the file was stripped"):
        _runtime._find_symbols(str(stripped), ["xla_ops_handlers"])


def test_registered_handler_runs_in_an_xla_program():
    x = torch.randn(4, 64)
    weight = torch.randn(64)
    expected = torch.nn.functional.rms_norm(x, (64,), weight, 1e-6)
    out = xla_ops.rms_norm(x.to("xla"), weight.to("xla"), 1e-6)
    torch.testing.assert_close(out.cpu(), expected)
    assert "xla_ops.rms_norm" in _runtime.registered()["Host"]


WAITS_WITH_THE_GIL = "ctypes.PyDLL(None).usleep(3_000_000)"


@pytest.mark.parametrize(
    "calls, text, status",
    [
        ("start_deadline(200, 'too long')", "too long\n", 1),
        ("start_deadline(200, 'no'); _runtime.end_deadline()", "", 0),
        ("start_deadline(200, 'no'); _runtime.start_deadline(400, 'yes')", "yes\n", 1),
        ("start_deadline(60_000, 'no')", "", 0),
        ("end_deadline()", "", 0),
    ],
)
def test_deadline_ends_a_process_that_holds_the_gil(calls, text, status):
    code = f"import ctypes; from xla_ops import _runtime; _runtime.{calls}"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {WAITS_WITH_THE_GIL}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stderr, done.returncode) == (text, status)
