"""tools/new_op: what it writes builds, passes its own tests and spoils nothing.

The scaffold runs in a copy of the files that it reads and changes. Its C++ is compiled
with the compiler that Bazel uses, and its Python tests run against a copy of the
installed package to which the new op is added. CUDA files are checked for includes
that no longer exist; the author's first build compiles them. What ops.bzl makes of the
names of files is tested here too.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

import xla_ops
from support import setting

NAME = "scaled_copy"
FOLDER = f"xla_ops/cc/ops/{NAME}"
NEW = [
    *(f"{FOLDER}/{NAME}{end}" for end in (".h", "_checks.h", "_launch.h", ".cc")),
    *(f"{FOLDER}/{NAME}{end}" for end in ("_cpu.cc", "_cuda.cc", ".cu.cc", "_test.cc")),
    f"xla_ops/py/ops/{NAME}.py",
    f"tests/ops/test_{NAME}.py",
]
SHARED = [
    "xla_ops/ops.bzl",
    "xla_ops/py/ops/__init__.py",
    "tests/ops/test_conformance.py",
]
HEADER = setting("XLA_OPS_TEST_FFI_HEADER", "jaxlib's include/xla/ffi/api/ffi.h")
FFI = pathlib.Path(HEADER).absolute().parents[3]
# As tools/build_defs/cc.bzl has it, but without optimisation, which takes the longest.
COMPILE = ["g++", "-std=c++17", "-O0", "-fPIC", "-Wall", "-Wextra", "-Werror"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A writable copy of the sources in the runfiles."""
    root = tmp_path_factory.mktemp("tree")
    for folder in ("tests", "tools", "xla_ops/cc", "xla_ops/py"):
        shutil.copytree(folder, root / folder)
    shutil.copy("xla_ops/ops.bzl", root / "xla_ops")
    return root


def scaffold(tree, name):
    command = [sys.executable, tree / "tools/new_op", name]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def contents(tree):
    return {p: p.read_bytes() for p in tree.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def scaffolded(tree, tmp_path_factory):
    """A copy in which the scaffold has run."""
    root = tmp_path_factory.mktemp("scaffolded") / "tree"
    shutil.copytree(tree, root)
    done = scaffold(root, NAME)
    assert done.returncode == 0, done.stderr
    return root


def compile_to(output, tree, sources, *options):
    command = [*COMPILE, f"-I{tree}", f"-isystem{FFI}", *options, "-o", output]
    done = subprocess.run(
        [*command, *(tree / s for s in sources)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_writes_and_changes_the_files_it_names(tree, scaffolded):
    before = {p.relative_to(tree): text for p, text in contents(tree).items()}
    after = {p.relative_to(scaffolded): t for p, t in contents(scaffolded).items()}
    changed = {str(p) for p in after if after[p] != before.get(p)}
    assert changed == {*NEW, *SHARED}
    assert set(before) <= set(after)
    for path in NEW:
        assert not re.search("new_op|NewOp|NEW_OP", after[pathlib.Path(path)].decode())


def test_shared_files_gain_lines_and_stay_sorted(tree, scaffolded):
    for file, gained in zip(SHARED, (1, 2, 1), strict=True):
        old = (tree / file).read_text().splitlines()
        new = (scaffolded / file).read_text().splitlines()
        added = [line for line in new if NAME in line]
        assert [line for line in new if NAME not in line] == old
        assert len(added) == gained
    scope = {}
    text = (scaffolded / "xla_ops/ops.bzl").read_text()
    exec(
        text[text.index("OPS = [") : text.index("]", text.index("OPS = [")) + 1], scope
    )
    assert scope["OPS"] == sorted(scope["OPS"])
    assert NAME in scope["OPS"]


def test_includes_exist(scaffolded):
    for path in NEW:
        text = (scaffolded / path).read_text()
        for include in re.findall(r'#include "(xla_ops/.*)"', text):
            assert (scaffolded / include).is_file(), f"{path} includes {include}"


def test_cpp_test_passes(scaffolded, tmp_path):
    sources = [f"{FOLDER}/{NAME}{end}" for end in (".cc", "_cpu.cc", "_test.cc")]
    program = tmp_path / "test"
    call_frame = "xla_ops/cc/core/call_frame.cc"
    compile_to(program, scaffolded, [*sources, call_frame], "-pthread")
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_python_tests_pass(scaffolded, tmp_path):
    """The scaffolded tests, and the conformance tests of the new op alone."""
    package = tmp_path / "site/xla_ops"
    shutil.copytree(pathlib.Path(xla_ops.__file__).parent, package)
    for folder in (package / "lib", package / "ops"):  # Bazel's are read-only
        folder.chmod(0o755)
    (package / "ops/__init__.py").chmod(0o644)
    library = package / f"lib/libxla_ops_{NAME}_cpu.so"
    sources = [f"{FOLDER}/{NAME}{end}" for end in (".cc", "_cpu.cc")]
    compile_to(library, scaffolded, sources, "-shared", "-Wl,-z,defs", "-pthread")
    for module in (f"{NAME}.py", "__init__.py"):
        shutil.copy(scaffolded / "xla_ops/py/ops" / module, package / "ops" / module)

    tests = scaffolded / "tests/ops"
    path = os.pathsep.join([str(tmp_path / "site"), str(scaffolded / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "PJRT_DEVICE": "CPU"}
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rfEs"]
    pytest += ["--import-mode=importlib", f"-k={NAME} or every_op_has_a_sample"]
    done = subprocess.run(
        [*pytest, tests / f"test_{NAME}.py", tests / "test_conformance.py"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    # 8 conformance tests of the op, 36 of its own; a few may come and go.
    passed = re.search(r"(\d+) passed", done.stdout)
    assert int(passed[1]) > 30, done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize(
    "name, rule",
    [
        ("ScaledCopy", "be lower-case words joined by single underscores"),
        ("scaled-copy", "be lower-case words joined by single underscores"),
        ("scaled__copy", "be lower-case words joined by single underscores"),
        ("_scaled", "be lower-case words joined by single underscores"),
        ("2scaled", "be lower-case words joined by single underscores"),
        ("../scaled", "be lower-case words joined by single underscores"),
        ("a" * 49, "have at most 48 characters"),
        ("lambda", "not be a Python keyword"),
        ("scaled_cpu", "not end as files of an op do"),
        ("scaled_sm90", "not end as files of an op do"),
        ("all", "not be a target of //xla_ops"),
        ("core", "not be a module of xla_ops"),
        ("doctor", "not be a module of xla_ops"),
        ("silu_and_mul", "be new to __all__ in xla_ops/py/ops/__init__.py"),
        ("paged_attention_both", None),
    ],
)
def test_names(tree, name, rule, tmp_path):
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    before = contents(root)
    done = scaffold(root, name)
    if rule is None:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 1
    assert done.stderr.startswith(f"new_op: NAME must {rule}")
    assert done.stderr.endswith(f", got {name}\n")
    assert contents(root) == before


@pytest.mark.parametrize("file", NEW)
def test_overwrites_nothing(tree, file, tmp_path):
    root = tmp_path / "tree"
    shutil.copytree(tree, root)
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text("mine\n")
    before = contents(root)
    done = scaffold(root, NAME)
    assert done.returncode == 1
    assert done.stderr == f"new_op: {file} must not exist yet\n"
    assert contents(root) == before
