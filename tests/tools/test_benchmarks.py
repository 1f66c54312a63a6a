"""Runs the benchmark on the CPU as a user does, and checks how it judges results."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils import _pytree as pytree

import alone
import cases
import report
import run as runner
import xla_dump
from batch import Batch

FOLDER = Path(runner.__file__).parent


def run(out: Path, *options: str) -> tuple[subprocess.CompletedProcess, dict]:
    """Runs the benchmark on the CPU; returns how it ended and what it wrote."""
    done = subprocess.run(
        [
            sys.executable,
            FOLDER / "run.py",
            "--out",
            out,
            "--name",
            "results",
            *options,
        ],
        env=dict(os.environ, PJRT_DEVICE="CPU", CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    path = out / "results.json"
    return done, json.loads(path.read_text()) if path.exists() else {}


def test_rows_alone_and_in_xla(tmp_path):
    done, results = run(tmp_path, "--only", "rms_norm", "--quick", "--parts", "alone",
                        "in XLA")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    of_ops, in_xla = results["parts"]["alone"], results["parts"]["in XLA"]
    for part in (of_ops, in_xla):
        names = ["rms_norm 512x1024", "rms_norm backward 512x1024"]
        assert list(part["rows"]) == names
        assert part["finished"] and part["left out"] == []
        assert part["versions"]["torch"]
        for row in part["rows"].values():
            assert row["error"] <= 1e-2
            assert 0 < row["us_p20"] <= row["us"] <= row["us_p80"]
    assert of_ops["ceilings"]["bytes/s"] > 0 and of_ops["ceilings"]["flop/s"] > 0
    assert of_ops["rows"]["rms_norm 512x1024"]["peers"]["torch eager"]["us"] > 0
    row = in_xla["rows"]["rms_norm 512x1024"]
    assert row["lazy"]["us"] > 0 and row["peers"]["XLA"]["us"] > 0
    assert results["device"]["name"] in done.stdout
    assert "rms_norm 512x1024" in done.stdout


@pytest.mark.parametrize("case", cases.declare("cuda"), ids=lambda case: case.name)
def test_case_for_a_gpu_has_the_shapes_and_bytes_it_says(case):
    operands = case.make(torch.device("meta"))
    result = case.ours(*operands)
    # Of what is updated in place: read, and written.
    tensors = pytree.tree_leaves((operands, result))
    touched = sum(t.nbytes for t in tensors)
    # Operands may hold more than is read: a table of angles, the rest of a cache.
    assert case.moved <= touched
    if case.group in ("elementwise", "prefill", "decode"):
        assert touched <= 1.05 * case.moved
    if case.check is None:
        results = [pytree.tree_leaves(r) for r in (result, case.reference(*operands))]
        kinds = [[(t.shape, t.dtype) for t in leaves] for leaves in results]
        assert kinds[0] == kinds[1]
    if case.chain is not None:
        following = case.chain(operands, result)
        assert [t.shape for t in following] == [t.shape for t in operands]


def test_spent_budget_leaves_rows_out_and_says_so(tmp_path):
    done, results = run(
        tmp_path, "--only", "small", "--parts", "alone", "--budget", "0"
    )
    part = results["parts"]["alone"]
    assert part["rows"] == {}
    assert "rms_norm 1x1024" in part["left out"]
    assert "left out, for want of time: alone: rms_norm 1x1024" in done.stdout


def test_process_that_dies_costs_one_row(tmp_path, monkeypatch):
    script = tmp_path / "dies.py"
    script.write_text(
        f"import os, sys; sys.path.insert(0, {str(FOLDER)!r})\n"
        "import worker; job = worker.Job.from_arguments()\n"
        "job.measure('before', lambda: {'us': 1.0})\n"
        "job.measure('killer', lambda: os._exit(1))\n"
        "job.measure('after', lambda: {'us': 2.0})\n"
        "job.finish()\n"
    )
    monkeypatch.setattr(runner, "HERE", tmp_path)
    part = runner.run_part(["dies.py"], [], dict(os.environ), until=2e10)
    assert part["rows"]["before"]["us"] == 1.0
    assert part["rows"]["killer"] == {"failed": "the process that ran it died"}
    assert part["rows"]["after"]["us"] == 2.0
    assert part["finished"] and "ended" not in part


def test_wrong_result_is_not_timed_and_fails_the_run():
    row = {"failed": "relative error 1.00e+00", "error": 1.0}
    results = {
        "device": {"name": "none"},
        "parts": {"alone": {"rows": {"rms_norm 1x8": row}, "left out": []}},
    }
    assert report.failed(results) == ["alone: rms_norm 1x8"]
    assert "relative error 1.00e+00" in report.text(results)


def test_batch_of_attention():
    batch = Batch((1, 0, 3), (20, 5, 16), 8, 2, 64)
    assert batch.query_starts == [0, 1, 1, 4] and batch.kv_starts == [0, 20, 25, 41]
    assert batch.num_pages(16) == [2, 1, 1]
    assert batch.deal([7, 6, 5, 4], 16) == [[7, 6], [5], [4]]
    assert batch.kv_bytes == 2 * 2 * 41 * 2 * 64
    assert batch.moved - batch.kv_bytes == 2 * 2 * 4 * 8 * 64
    # Two products of 2 flops; rows see half of their own square less.
    assert batch.flops == 2 * 2 * (19.5 + 0 + 48 - 4.5) * 8 * 64
    assert replace(batch, causal=False).flops == 2 * 2 * (20 + 48) * 8 * 64


CEILINGS = {"bytes/s": 3e12, "flop/s": 700e12}


def judged(
    metric: str, least: float, aim: float, row: dict, rows=(), against=""
) -> str:
    target = {"metric": metric, "least": least, "aim": aim, "against": against}
    verdict = report.judge(row | {"target": target}, dict(rows), CEILINGS)
    assert verdict is not None
    return verdict.met


@pytest.mark.parametrize("us, met", [(1.9, "aim"), (2.1, "least"), (4.1, "missed")])
def test_times_are_to_be_short(us, met):
    assert judged("us", 4, 2, {"us": us}) == met


def test_rates_are_to_be_high():
    row = {"us": 100.0, "bytes": 285_000_000, "flops": 50_000_000_000}
    assert judged("TB/s", 2.8, 2.9, row) == "least"
    assert judged("TFLOP/s", 400, 500, row) == "aim"
    assert judged("of copy", 0.9, 0.97, row) == "least"
    assert judged("of copy", 0.96, 0.97, row) == "missed"


def test_targets_beside_other_rows_and_peers():
    rows = {"bf16": {"us": 100.0, "flops": 10}}
    fp8 = {"us": 60.0, "flops": 5, "peers": {"XLA": {"us": 66.0}}}
    assert judged("relative time", 0.65, 0.55, fp8, rows, "bf16") == "least"
    assert judged("relative rate", 0.85, 0.95, fp8, rows, "bf16") == "missed"
    assert judged("speedup", 1.0, 1.1, fp8, rows, "XLA") == "aim"
    target = {"metric": "speedup", "least": 1, "aim": 1, "against": "not measured"}
    assert report.judge(fp8 | {"target": target}, rows, CEILINGS) is None


def test_floor_is_the_slower_of_bytes_and_operations():
    assert report.floor_us({"bytes": 3e9, "flops": 7e9}, CEILINGS) == 1000
    assert report.floor_us({"bytes": 3e3, "flops": 7e12}, CEILINGS) == 10_000


def test_inductor_rows_join_those_alone():
    row = {"us": 2.0, "peers": {"torch eager": {"us": 3.0}}}
    inductor = {"rows": {"a": {"peers": {"inductor": {"us": 4.0}}}}, "left out": ["b"]}
    results = {"parts": {"alone": {"rows": {"a": row}}, "inductor": inductor}}
    report.merge_inductor(results)
    assert row["peers"] == {"torch eager": {"us": 3.0}, "inductor": {"us": 4.0}}
    assert inductor == {"rows": {}, "left out": ["b"]}


def test_a_copy_as_large_stands_beside_the_peers():
    assert alone.Alone("cpu", seconds=0.001)._copy(1 << 12, 2)["us"] > 0
    row = {"us": 2.0, "copy": {"us": 1.9}, "peers": {"torch eager": {"us": 3.0}}}
    assert list(report._ratios(row)) == ["a copy as large 0.95x", "torch eager 1.50x"]


THUNKS = """\
kCustomCall    custom-call.1
kKernel        fusion.1
kCustomCall    custom-call.2
"""
CAPTURED = """\
kCommandBuffer command_buffer
  kCustomCall    custom-call.1
  kKernel        fusion.1

kCustomCall    custom-call.2
"""


def test_launches_are_those_after_capture():
    other = "000: kKernel fusion\n001: kCustomCall custom-call\n"
    assert xla_dump.launches([other]) == {"launches": 2, "inside": 0, "outside": 1}
    found = xla_dump.launches([CAPTURED, other, THUNKS])
    assert found == {"launches": 2, "inside": 1, "outside": 1}
    with pytest.raises(ValueError, match="no sequence of thunks"):
        xla_dump.launches(["kKernel fusion\n"])


def test_copies_are_of_the_shape():
    program = """
      %copy.1 = bf16[8,16]{1,0} copy(%p)
      %copy.2 = bf16[8,17]{1,0} copy(%q)
      ROOT %fusion = bf16[8,16]{1,0:T(8,128)} fusion(%p), kind=kLoop
      %call = bf16[8,16]{1,0} custom-call(%p), custom_call_target="xla_ops.x"
    """
    assert xla_dump.copies(program, (8, 16)) == 2
