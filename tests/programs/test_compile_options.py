"""programs.compile_options: XLA's options for one program."""

import itertools
import struct
import threading

import pytest
import torch
import torch_xla
from hypothesis import given, settings
from hypothesis import strategies as st

from xla_ops.programs import compile_options
from xla_ops.programs.replay import compile_calls, replay

_numbers = itertools.count(2)


def fields(message):
    """(number, value) of each field, as protocol buffers have them."""
    found, at = [], 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        match key & 7:
            case 0:
                value = varint()
            case 1:
                (value,) = struct.unpack_from("<d", message, at)
                at += 8
            case 2:
                size = varint()
                value = message[at : at + size]
                assert len(value) == size
                at += size
        found.append((key >> 3, value))
    return found


def decode(message):
    options = {}
    for number, entry in fields(message):
        assert number == 7
        (_, name), (_, override) = fields(entry)
        ((kind, value),) = fields(override)
        match kind:
            case 1:
                value = value.decode()
            case 2:
                value = bool(value)
            case 3:
                value -= 2**64 if value >= 2**63 else 0
        options[name.decode()] = value
    return options


values = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text()
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=300), values, max_size=5))
def test_options_are_what_a_client_reads(options):
    read = decode(compile_options.encode(options))
    assert read == options
    assert {k: type(v) for k, v in read.items()} == {
        k: type(v) for k, v in options.items()
    }


def test_bytes_of_one():
    """As a client's own parser takes them: entry 7 {1: "a", 2: {2: false}}."""
    encoded = compile_options.encode({"a": False})
    assert encoded == bytes.fromhex("3a07 0a01 61 1202 1000".replace(" ", ""))
    assert compile_options.encode({}) == b""


@pytest.fixture
def on_a_gpu(monkeypatch):
    """What each thread has set while it compiles, and whether it took it back."""
    now, seen = threading.local(), []

    def set_options(bridge, options):
        assert bridge == "bridge"
        now.options = options

    class Watched:
        def __getattr__(self, name):
            return getattr(torch_xla._XLAC, name)

        def _xla_warm_up_cache(self, *args):
            seen.append(getattr(now, "options", b""))
            return torch_xla._XLAC._xla_warm_up_cache(*args)

    from xla_ops.programs import calls

    monkeypatch.setattr(compile_options.handlers, "xla_platform", lambda: "CUDA")
    monkeypatch.setattr(compile_options.paths, "bridge_path", lambda: "bridge")
    monkeypatch.setattr(compile_options._runtime, "set_compile_options", set_options)
    monkeypatch.setattr(calls, "_xlac", Watched())
    return seen, now


def power(x, n):
    for _ in range(n):
        x = x * 1.5
    return x.cumsum(0)


def test_a_program_is_compiled_with_its_own(on_a_gpu):
    seen, now = on_a_gpu
    first = next(_numbers)
    f = replay(power, compile_options=lambda x, n: {"size": x.numel(), "n": n})
    plain = replay(power)
    x = torch.ones(3, device="xla")
    torch.testing.assert_close(f(x, first).cpu(), power(torch.ones(3), first))
    assert decode(seen.pop()) == {"size": 3, "n": first}
    assert now.options == b""
    f(x, first)
    assert not seen
    # Of one graph, but compiled in another way.
    torch.testing.assert_close(plain(x, first).cpu(), power(torch.ones(3), first))
    assert seen == [b""]


def test_programs_that_are_compiled_beside_each_other_have_their_own(on_a_gpu):
    seen, _ = on_a_gpu
    f = replay(power, compile_options=lambda x, n: {"n": n})
    x = torch.ones(4, device="xla")
    counts = [next(_numbers) for _ in range(3)]
    compile_calls([(f, (x, n)) for n in counts])
    assert sorted(decode(options)["n"] for options in seen) == counts


def test_a_mapping_is_for_all(on_a_gpu):
    seen, _ = on_a_gpu

    @replay(compile_options={"xla_gpu_enable_triton_gemm": False})
    def f(x, n):
        return power(x, n)

    f(torch.ones(5, device="xla"), next(_numbers))
    assert decode(seen[0]) == {"xla_gpu_enable_triton_gemm": False}


def test_a_wrong_value_is_named():
    f = replay(power, compile_options={"level": None})
    message = r"replay: compile_options\['level'\] must be a bool, an int.*got None"
    with pytest.raises(TypeError, match=message):
        f(torch.ones(3, device="xla"), 1)


def test_the_cpu_client_takes_none():
    f = replay(power, compile_options={"no such option": 3})
    x = torch.ones(3, device="xla")
    torch.testing.assert_close(f(x, 1).cpu(), power(torch.ones(3), 1))
