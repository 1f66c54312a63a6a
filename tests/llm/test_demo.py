"""Runs the example's command line as a user does, in a process of its own, and
reads what it reports; and tools/demo as far as it goes without building.

What the command line refuses: test_llm_options.py, test_llm_files.py.
"""

import re
import shutil

import pytest

from checkpoints import LLM
from command import DEVICE, reported, run, run_generate

DEMO = LLM.parents[1] / "tools" / "demo"
ITEM_SIZE = {"cpu": 4, "gpu": 2}[DEVICE]  # fp32, bf16


# 8 layers: 17 norms, two cache writes and an attention each. "all" adds the rotary
# embedding and the gated activation of each; its norms add the residual as well.
CALLS = {"attention": 17 + 8 * 3, "all": 17 + 8 * 3 + 8 * 2}


@pytest.mark.parametrize("ops, backend", [("all", "openxla"), ("attention", "xla_ops")])
def test_report(ops, backend):
    done = run_generate(
        "--prompt", "Pip the mouse", "--prompt", "In the middle of the night,",
        "--max-new-tokens", "12", "--max-batch", "2",
        "--ops", ops, "--backend", backend,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "> Pip the mouse\n" in done.stdout
    assert "generate: 100%" in done.stderr  # progress
    report = reported(done.stdout)
    assert report["device"].startswith(f"xla:0, {DEVICE.upper()}")
    assert report["plugin"].startswith(
        {"cpu": "torch_xla's own", "gpu": "xla_ops bridge"}[DEVICE]
    )
    assert float(report["tokens/s"].split()[0]) > 0
    assert re.match(r"[\d.]+ ms median of 1 steps", report["prefill step"])
    assert re.match(r"[\d.]+ ms median of 11 steps", report["decode step"])
    # 8 layers of K and V; 2 sequences of 2 blocks of 16 tokens of 2 heads of 64.
    assert report["cache"].startswith(f"{16 * 2 * 2 * 16 * 2 * 64 * ITEM_SIZE} bytes")
    copied = report["cache bytes copied per step"]
    assert re.match(r"0 \(.* 12 steps; .* of 3 programs\)", copied), copied
    assert report["recompilations after warm-up"] == "0"
    assert report["xla_ops custom calls"] == f"{CALLS[ops]} to {CALLS[ops]} a step"


def test_tools_demo_checks_its_device(tmp_path):
    done = run("bash", DEMO, "--device", "tpu")
    assert done.returncode == 1
    assert "--device must be cpu or gpu, got 'tpu'" in done.stderr
    # A machine without nvidia-smi, even where there is one.
    for program in ("bash", "dirname"):
        (tmp_path / program).symlink_to(shutil.which(program))
    done = run("bash", DEMO, "--device=gpu", PATH=str(tmp_path))
    assert done.returncode == 1
    assert "must find an NVIDIA driver" in done.stderr


@pytest.mark.parametrize(
    "capability, driver, oldest",
    [("9.0", "570.86.15", 580), ("7.0", "520.61.05", 525)],
)
def test_tools_demo_refuses_a_driver_too_old_for_the_kernels(
    capability, driver, oldest, tmp_path
):
    """Before it builds and downloads anything: no Bazel is on this PATH."""
    for name in ("bash", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name))
    smi = tmp_path / "nvidia-smi"
    smi.write_text(
        f'#!{tmp_path}/bash\ncase "$*" in *compute_cap*) echo {capability} ;;'
        f" *driver_version*) echo {driver} ;; esac\n"
    )
    smi.chmod(0o755)
    done = run("bash", str(DEMO), "--device", "gpu", PATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stdout == ""
    message = f"the NVIDIA driver must be {oldest} or newer, got {driver}"
    assert message in done.stderr


def test_tools_demo_help_needs_no_build():
    done = run("bash", DEMO, "--help")
    assert done.returncode == 0
    assert "--max-new-tokens" in done.stdout
