"""The examples of docs/in_place.md do what it says, and are measured rightly."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

import in_place_ways

LAZY = pytest.mark.parametrize("compiled", [False, True], ids=["lazy", "compiled"])
CACHES = 8


@pytest.fixture(scope="module")
def num_blocks():
    """A size that no other row has: programs are found by the shape of the cache."""
    return iter(range(1101, 1200))


def measure(way, compiled, num_blocks, hlo_dump):
    blocks = next(num_blocks)
    row = in_place_ways.measure(way, compiled, blocks, hlo_dump)
    return row | {"caches": CACHES * blocks * 16 * 2 * 128 * 2}


@LAZY
@pytest.mark.parametrize("way", ["front", "copy_with_donation"])
def test_in_place_ways_copy_nothing(way, compiled, num_blocks, hlo_dump):
    row = measure(way, compiled, num_blocks, hlo_dump)
    assert row["cache_bytes_copied"] == 0
    assert row["caches"] < row["device_bytes"] < 1.1 * row["caches"]


@LAZY
def test_clone_and_return_copies_every_cache(compiled, num_blocks, hlo_dump):
    row = measure("clone_and_return", compiled, num_blocks, hlo_dump)
    assert row["cache_bytes_copied"] > 0.99 * row["caches"]
    assert row["device_bytes"] > 1.99 * row["caches"]
    assert not row["over_host"]


def test_another_library_goes_over_the_host(num_blocks, hlo_dump):
    assert "error" in measure("other_library", False, num_blocks, hlo_dump)
    row = measure("other_library", True, num_blocks, hlo_dump)
    assert row["over_host"]
    assert row["cache_bytes_copied"] > 1.9 * row["caches"]  # there and back


@pytest.mark.parametrize("way", in_place_ways.WAYS)
def test_values_are_right(way, capsys):
    import common

    module = in_place_ways.importlib.import_module(way)
    common.demonstrate(module.step, module.BACKEND)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    raises = way == "other_library"
    assert lines[0].startswith("lazily: " + ("raises" if raises else "values right: T"))
    assert "values right: True" in lines[1]


def test_table_is_made_from_the_json(tmp_path):
    row = {"way": "front", "megabytes": 16, "compiled": True, "ms_per_step": 1.234}
    row |= {"cache_bytes_copied": 2**24, "over_host": False, "device_bytes": 2**31}
    bad = {"way": "other_library", "megabytes": 16, "compiled": False, "error": "no"}
    result = {"device": "D", "version": "1", "layers": 4, "rows": [row, bad]}
    path = tmp_path / "in_place_cpu.json"
    path.write_text(json.dumps(result))
    command = [sys.executable, in_place_ways.__file__, "--plot", "--out"]
    subprocess.run([*command, str(tmp_path)], env={"PJRT_DEVICE": "CPU"}, check=True)
    table = path.with_suffix(".md").read_text()
    assert "| xla_ops front | compiled | 16 MB | 16 MB | 2 GB | 1.23 |" in table
    assert "| other library's op | lazy | 16 MB | no | | |" in table


@pytest.mark.parametrize(
    "report",
    [
        "Total bytes used: 3000 (2.9KiB)\nAllocations sorted by size:\n",
        "Memory Space: default (color=0)\nTotal bytes: 2864 (2.8KiB)\n"
        "Memory Space: temp (color=1)\nTotal bytes: 136 (136B)\n",
    ],
    ids=["CPU", "GPU"],
)
def test_device_bytes_of_both_reports(report, tmp_path):
    (tmp_path / "module_0001.step-memory-usage-report.txt").write_text(report)
    program = SimpleNamespace(name="module_0001.step.txt")
    assert in_place_ways._device_bytes(tmp_path, program) == 3000
