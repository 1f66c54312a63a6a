"""The benchmark of a training step, on the CPU: systems agree, wrong ones are found."""

import json
import pathlib
import subprocess
import sys

import train_step

PROGRAM = pathlib.Path(train_step.__file__)
SMALL = ("--shape", "tiny", "--tokens", "128", "--length", "64", "--steps", "1")


def test_systems_agree(tmp_path):
    out = tmp_path / "record.json"
    systems = ("xla", "xla-replay", "xla-reference")
    command = [sys.executable, str(PROGRAM), "--out", str(out), "--device", "cpu"]
    subprocess.run([*command, *SMALL, "--systems", *systems], check=True)
    found = json.loads(out.read_text())["systems"]
    assert set(found) == set(systems)
    # Traced once or at each step, it is one program.
    assert set(found["xla-replay"]["difference"].values()) == {0.0}
    assert 0 < found["xla-reference"]["difference"]["samples"] < 0.15
    assert all(system["tokens_per_s"] > 0 for system in found.values())


def test_differences_are_found():
    right = {"loss": 2.0, "norms": {"w": 4.0}, "samples": {"w": [3.0, 4.0]}}
    off = {"loss": 2.1, "norms": {"w": 4.4}, "samples": {"w": [3.0, 5.0]}}
    assert set(train_step.difference(right, right).values()) == {0.0}
    found = train_step.difference(off, right)
    assert abs(found["loss"] - 0.05) < 1e-9
    assert abs(found["norms"] - 0.1) < 1e-9
    assert abs(found["samples"] - 0.2) < 1e-9
    assert all(found[name] > bound for name, bound in train_step.BOUNDS.items())
    nan = float("nan")
    for nowhere in (
        right | {"loss": nan},
        right | {"norms": {"v": 4.0, "w": nan}},
        right | {"samples": {"w": [3.0, nan]}},
    ):
        others = right | {"norms": dict.fromkeys(nowhere["norms"], 4.0)}
        for pair in ((nowhere, others), (others, nowhere)):
            assert max(train_step.difference(*pair).values()) == float("inf")
