"""The benchmark of one model over several devices, on those of the CPU client."""

import json
import os
import pathlib
import subprocess
import sys

import several_gpus

PROGRAM = pathlib.Path(several_gpus.__file__)

HLO = """
  %a = f32[4,256]{1,0} all-reduce(%x), replica_groups={{0,1}}
  ROOT %b = (bf16[8]{0}, s32[2,2]{1,0}) all-gather(%y, %z), dimensions={0}
  %c = f32[1,2]{1,0} custom-call(%a), custom_call_target="xla_ops.host_collective"
  %d = f32[99]{0} add(%a, %a)
"""


def test_counts_what_collectives_give():
    assert several_gpus.moved_bytes(HLO) == 4 * 4 * 256 + 16 + 16 + 8


def test_counts_what_calls_through_the_gpus_memory_give():
    hlo = """
  %c = bf16[2,4]{1,0} custom-call(%a, %b), custom_call_target="xla_ops.peer_collective"
  %d = f32[8]{0} custom-call(%a), custom_call_target="xla_ops.rms_norm"
"""
    assert several_gpus.collectives(hlo) == [(16, "peer_collective")]


def test_counts_a_sum_that_is_normed_once():
    hlo = """
  %c = (bf16[2,8]{1,0}, bf16[2,8]{1,0}) custom-call(%a, %b, %r, %w), custom_call_target="xla_ops.peer_add_rms_norm"
"""  # noqa: E501
    assert several_gpus.collectives(hlo) == [(32, "peer_add_rms_norm")]


def test_one_model_both_ways(tmp_path):
    out = tmp_path / "record.json"
    command = [sys.executable, str(PROGRAM), "--devices", "2", "--out", str(out)]
    env = {**os.environ, "PJRT_DEVICE": "CPU"}
    subprocess.run([*command, "--only", "right"], check=True, env=env)
    record = json.loads(out.read_text())
    assert record["right"]
    ways = record["cases"]["right"]
    assert set(ways) == {"one", "sharded", "ranks"}
    assert ways["one"]["bytes_moved"] == 0
    # Two all-reduces a layer, and the embedding's and the likeliest tokens on top.
    for way in ("sharded", "ranks"):
        assert 1 <= ways[way]["of_two_all_reduces_a_layer"] < 2
