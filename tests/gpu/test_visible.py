"""How many GPUs are visible (gpu/visible.py); a fake (fakes.py) stands for NVML."""

from __future__ import annotations

import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fakes
from xla_ops.gpu import visible
from xla_ops.gpu.visible import Gpus

# The first two share their first digits.
GPUS = ("GPU-8932f937-d72c", "GPU-8932aaaa-0001", "GPU-00000000-0002")
MIGS = ("MIG-c6d4f1ef-42e4", "MIG-cba663e8-9bed")
MACHINE = Gpus(GPUS, MIGS)


@pytest.mark.parametrize(
    "value, count",
    [
        (None, 3),
        ("", 0),
        (" ", 0),
        ("-1", 0),
        ("0", 1),
        ("0,1", 2),
        ("2,0,1", 3),
        ("0,1,7", 2),
        ("0,7,1", 1),
        ("7,0", 0),
        ("0,-1,1", 1),
        ("0,,1", 1),
        (",0", 0),
        ("0,1,", 2),
        ("0, 1 ,\t2", 3),
        ("+1", 1),
        ("01,2", 2),
        ("1gpu,2", 2),  # strtol() reads numbers
        ("0x1", 1),
        ("-0,1", 2),
        pytest.param("0" * 5000 + "1,2", 2, id="many zeros"),
        pytest.param("9" * 5000, 0, id="many digits"),  # Python reads 4300
        pytest.param("1,-" + "9" * 5000, 1, id="far below zero"),
        ("all", 0),
        ("none", 0),
        ("NoDevFiles", 0),
        ("\u0661", 0),  # a digit of another script
        ("0,0", 0),
        ("0,1,0", 0),
        ("0,7,0", 1),  # the list has ended before
        (GPUS[0], 1),
        (",".join(GPUS), 3),
        ("GPU-89", 0),  # two GPUs begin so
        ("GPU-8932f", 1),
        ("GPU-8932f,GPU-8932a", 2),
        ("GPU-8932f,GPU-89,GPU-0", 1),
        ("GPU-8932f,GPU-8932f937", 0),  # one GPU twice
        ("GPU-8932f,GPU-ffff,GPU-0", 1),
        ("GPU-8932F", 0),
        ("GPU-8932f,0", 1),  # all are of the first's kind
        ("0,GPU-8932a", 1),
        (" GPU-8932f", 0),
        (MIGS[0], 1),
        (f"{MIGS[0]},{MIGS[1]}", 1),  # one instance a process
        ("MIG-c6", 1),
        ("MIG-0", 0),
    ],
)
def test_count_named(value, count):
    assert visible.count_named(value, MACHINE) == count


def test_where_the_machine_is_not_known_names_count():
    for value, count in [("0,1,7", 3), ("5,5", 0), ("GPU-3f", 1), ("", 0), ("-1", 0)]:
        assert visible.count_named(value, None) == count
    assert visible.count_named("MIG-3f,MIG-40", None) == 1


def shown_by_the_driver(entries, gpus):
    """The rule again, told of lists: which GPUs `entries` show, in order."""
    if not entries:
        return []
    kinds = ["uuid" if entry.startswith("GPU-") else "number" for entry in entries]
    shown = []
    for entry, kind in zip(entries, kinds, strict=True):
        if kind != kinds[0]:
            return shown
        if kind == "uuid":
            those = [uuid for uuid in gpus if uuid[: len(entry)] == entry]
            if len(those) != 1:
                return shown
            gpu = those[0]
        else:
            try:
                number = int(entry)
            except ValueError:
                return shown
            if not 0 <= number < len(gpus):
                return shown
            gpu = gpus[number]
        if gpu in shown:
            return []
        shown.append(gpu)
    return shown


@given(st.data())
def test_any_list_of_any_machine(data):
    digits = st.text("01", min_size=4, max_size=4)
    numbers = data.draw(st.lists(digits, max_size=6, unique=True))
    gpus = [f"GPU-{number}" for number in numbers]
    entry = st.one_of(
        st.integers(-2, 8).map(str),
        st.text("01", max_size=4).map(lambda start: f"GPU-{start}"),
        st.sampled_from(["", "x"]),
    )
    entries = data.draw(st.lists(entry, min_size=1, max_size=8))
    shown = shown_by_the_driver(entries, gpus)
    assert visible.count_named(",".join(entries), Gpus(gpus)) == len(shown)


@pytest.fixture
def nvml(monkeypatch):
    """Has visible.py load the fake NVML; returns it."""
    path = fakes.build("fake_nvml")
    monkeypatch.setattr(visible, "_NVML_LIBRARY", str(path))
    for name in ("INIT", "GPUS", "MIGS"):
        monkeypatch.delenv(f"FAKE_NVML_{name}", raising=False)
    return ctypes.CDLL(str(path))


def test_query(nvml, monkeypatch):
    monkeypatch.setenv("FAKE_NVML_GPUS", ",".join(GPUS))
    assert visible.query() == Gpus(GPUS)
    monkeypatch.setenv("FAKE_NVML_MIGS", ",".join(MIGS))
    assert visible.query() == MACHINE
    monkeypatch.setenv("FAKE_NVML_GPUS", f"{GPUS[0]},lost,{GPUS[2]}")
    assert visible.query().gpus == (GPUS[0], "", GPUS[2])
    assert visible.count({}) == 3
    assert visible.count({"CUDA_VISIBLE_DEVICES": "GPU-8,1"}) == 1
    assert visible.count({"CUDA_VISIBLE_DEVICES": "0,2,3"}) == 2
    assert nvml.fake_nvml_users() == 0


def test_nvml_that_cannot_tell(nvml, monkeypatch):
    monkeypatch.setenv("FAKE_NVML_INIT", "9")
    assert visible.query() is None
    assert visible.count({}) is None
    assert visible.count({"CUDA_VISIBLE_DEVICES": "0,1"}) == 2
    monkeypatch.setattr(visible, "_NVML_LIBRARY", "libno_such_nvml.so.1")
    assert visible.count({}) is None
    assert nvml.fake_nvml_users() == 0
