"""tools/build_wheel in a copy of the tree with another Bazel and setup: what it asks
Bazel for, on which machine, and the lines that it prints."""

import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
WHEEL = "xla_ops-0.1.0-cp311-cp311-manylinux_2_28_x86_64.whl"

# Answers as Bazel does, in the folder of the workspace alone, and notes what was asked.
BAZEL = f"""\
[[ -f .bazelrc ]] || exit 2
echo "$XLA_OPS_PYTHON|$*" >>../calls
case $1 in
  info) echo "$PWD/bin" ;;
  build) mkdir -p bin/xla_ops/default_wheel
    echo wheel >bin/xla_ops/default_wheel/{WHEEL}
    echo "${{XLA_OPS_PYTHON:-{sys.executable}}}" >bin/xla_ops/default_python.txt ;;
esac
"""

# Stands for the driver's program: GPUS holds compute capabilities.
NVIDIA_SMI = """\
case "$*" in
  *compute_cap*) printf '%b' "$GPUS" ;;
  *driver_version*) echo "$DRIVER" ;;
  *) exit 2 ;;
esac
"""


def program(path: pathlib.Path, code: str) -> None:
    path.write_text("#!/bin/bash\n" + code)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


class Machine:
    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.tree = folder / "tree"
        self.programs = folder / "bin"
        (self.tree / "tools").mkdir(parents=True)
        self.programs.mkdir()
        for name in ("tools/build_wheel", "tools/common.sh", ".bazelrc"):
            shutil.copy(ROOT / name, self.tree / name)
        program(self.tree / "tools" / "setup", f"echo setup >>'{folder}/calls'")
        program(self.programs / "bazel", BAZEL)

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().splitlines() if path.exists() else []

    def asked(self) -> tuple[str, str]:
        """XLA_OPS_PYTHON, and the options that the wheel was built with."""
        (call,) = [c for c in self.calls() if "|build " in c]
        python, _, command = call.partition("|build ")
        targets = " //xla_ops:default_wheel //xla_ops:default_python"
        assert (" " + command).endswith(targets)
        return python, command[: -len(targets) + 1].strip()

    def run(self, *arguments: str, gpus: str | None = None, **env: str):
        """Runs the tool on a machine with such GPUs, one a line; None: no driver."""
        nothing = "echo failed to communicate with the driver; exit 9"
        program(self.programs / "nvidia-smi", nothing if gpus is None else NVIDIA_SMI)
        base = {k: v for k, v in os.environ.items() if k != "VIRTUAL_ENV"}
        base.pop("XLA_OPS_PYTHON", None)
        base["PATH"] = f"{self.programs}:/usr/bin:/bin"
        env = {"DRIVER": "580.65.06", "GPUS": gpus or "", **env}
        return subprocess.run(
            ["bash", str(self.tree / "tools" / "build_wheel"), *arguments],
            env={**base, "TMPDIR": str(self.folder), **env},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def installed(stdout: str) -> str:
    """What the printed line gives to pip."""
    (wheel,) = re.findall(r"^  .*pip install '(.*)'$", stdout, re.MULTILINE)
    return wheel


RELEASE = ""  # the flag's default


@pytest.mark.parametrize(
    "arguments, gpus, options, extra",
    [
        ((), None, "--config=cpu", ""),
        ((), "9.0\n", "--//third_party/cuda:archs=9.0a", "[cuda13]"),
        ((), "9.0\n9.0\n", "--//third_party/cuda:archs=9.0a", "[cuda13]"),
        ((), "12.0\n8.6\n", "--//third_party/cuda:archs=8.6,12.0+PTX", "[cuda13]"),
        ((), "7.0\n", "--//third_party/cuda:archs=7.0+PTX", "[cuda12]"),
        # No config of its own: 8.7 runs code for 8.6, 10.3 that for 10.0.
        ((), "8.7\n", RELEASE, "[cuda13]"),
        (("--cpu",), "9.0\n", "--config=cpu", ""),
        (("--all-archs",), None, RELEASE, "[cuda13]"),
        (("--gpu", "8.0"), None, "--//third_party/cuda:archs=8.0", "[cuda13]"),
        (("--gpu=9.0,7.5",), None, "--//third_party/cuda:archs=7.5,9.0a", "[cuda13]"),
    ],
)
def test_builds_for_the_gpus_that_are_here_or_asked_for(
    machine, arguments, gpus, options, extra
):
    done = machine.run(*arguments, gpus=gpus)
    assert done.returncode == 0, done.stderr
    assert machine.calls()[0] == "setup"
    assert machine.asked() == ("", options)
    wheel = machine.tree / "dist" / WHEEL
    assert wheel.read_text() == "wheel\n"
    assert installed(done.stdout) == f"{wheel}{extra}"
    assert not list(machine.folder.glob("*.log"))


def test_every_config_of_bazelrc_is_known(machine):
    names = re.findall(
        r"^build:sm(\d+) ", (ROOT / ".bazelrc").read_text(), re.MULTILINE
    )
    assert len(names) >= 8
    for name in names:
        done = machine.run("--gpu", f"{name[:-1]}.{name[-1]}")
        assert done.returncode == 0, done.stderr
        assert f"compute capability {name[:-1]}.{name[-1]}" in done.stdout
        assert "--//third_party/cuda:archs=" in machine.calls()[-2]


def test_says_what_it_found(machine):
    done = machine.run()
    assert "No NVIDIA driver was found: the wheel will be for the CPU" in done.stdout
    done = machine.run("--cpu")
    assert "No NVIDIA driver" not in done.stdout
    done = machine.run(gpus="8.0\n9.0\n")
    assert "building for compute capability 8.0 9.0" in done.stdout


def test_makes_a_virtual_environment_where_none_is_active(machine):
    done = machine.run()
    wheel = machine.tree / "dist" / WHEEL
    assert done.stdout.splitlines()[-3:] == [
        f"  {sys.executable} -m venv ~/xla_ops_env",
        f"  ~/xla_ops_env/bin/pip install '{wheel}'",
        "  ~/xla_ops_env/bin/python -m xla_ops doctor",
    ]


def test_uses_the_virtual_environment_that_is_active(machine):
    (machine.programs / "python3").symlink_to(sys.executable)
    done = machine.run(VIRTUAL_ENV=str(machine.folder))
    wheel = machine.tree / "dist" / WHEEL
    assert done.stdout.splitlines()[-2:] == [
        f"  pip install '{wheel}'",
        "  python -m xla_ops doctor",
    ]
    # One of another Python is of no use to the wheel.
    other = machine.programs / "other_python"
    program(other, "")
    done = machine.run("--python", str(other), VIRTUAL_ENV=str(machine.folder))
    assert f"  {other} -m venv ~/xla_ops_env" in done.stdout


@pytest.mark.parametrize("form", ["absolute", "on PATH", "relative"])
def test_python_is_given_to_bazel_by_its_path(machine, form):
    path = machine.programs / "python3.99"
    program(path, "")
    given = {
        "absolute": str(path),
        "on PATH": path.name,
        "relative": f"bin/{path.name}",
    }
    done = machine.run("--cpu", f"--python={given[form]}")
    assert done.returncode == 0, done.stderr
    assert machine.asked() == (str(path), "--config=cpu")
    assert f"  {path} -m venv" in done.stdout


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--wheel"], "unknown argument '--wheel'"),
        (["--cpu", "--all-archs"], "--all-archs must come without --cpu"),
        (["--gpu", "9.0", "--gpu", "8.0"], "--gpu must come without --gpu"),
        (
            ["--gpu"],
            "--gpu must be compute capabilities such as 9.0 or 8.0,9.0, got ''",
        ),
        (["--gpu", "sm90"], "--gpu must be compute capabilities .*, got 'sm90'"),
        (["--gpu", "7.0,9.0"], "7.0 must be built alone, got 7.0 9.0"),
        (["--python", "python0"], "--python must be the path .*, got 'python0'"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_runs(machine, arguments, message):
    done = machine.run(*arguments)
    assert done.returncode == 1
    assert re.search(f"^tools/build_wheel: {message}", done.stderr, re.MULTILINE)
    assert machine.calls() == []


@pytest.mark.parametrize(
    "gpus, driver, oldest",
    [("9.0\n", "570.86.15", 580), ("7.0\n", "520.61.05", 525)],
)
def test_driver_that_cannot_run_the_kernels_is_refused(machine, gpus, driver, oldest):
    done = machine.run(gpus=gpus, DRIVER=driver)
    assert done.returncode == 1
    message = f"the NVIDIA driver must be {oldest} or newer, got {driver}: update it"
    assert message in done.stderr
    assert machine.calls() == []
    # Nor need it be there for a machine elsewhere.
    assert machine.run("--gpu", "9.0", gpus=gpus, DRIVER=driver).returncode == 0


def test_failed_build_shows_the_end_of_the_log(machine):
    program(machine.programs / "bazel", "echo no compiler; exit 1")
    done = machine.run()
    assert done.returncode == 1
    assert "no compiler" in done.stderr
    assert "failed with status 1; the whole log: " in done.stderr


def test_help_is_the_header(machine):
    done = machine.run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Builds the wheel for this machine")
    assert "SPDX" not in done.stdout
    assert machine.calls() == []
