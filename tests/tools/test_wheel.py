"""What is in the wheels, and that their names tell the truth.

The build reads its platform tag with tools/wheel/elf.py; here auditwheel and
pyelftools, which know nothing of that, must come to the same.
"""

import base64
import csv
import hashlib
import io
import json
import pathlib
import re
import subprocess
import sys
import zipfile
from importlib import metadata, resources

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from support import setting

FOLDER = setting("XLA_OPS_TEST_WHEELS", "the folder bazel-bin/xla_ops/wheel")
WHEELS = sorted(pathlib.Path(FOLDER).glob("*.whl"))
OPS = setting("XLA_OPS_TEST_OPS", "the ops in the wheel").split(",")
# The architectures that the build was asked for; empty without CUDA.
LIST = setting("XLA_OPS_TEST_ARCHS", "the file bazel-bin/third_party/cuda/archs.txt")
ARCHS = pathlib.Path(LIST).read_text()
PLATFORMS = ["cpu", "cuda"] if ARCHS else ["cpu"]


def python_tag(path: pathlib.Path) -> str:
    return path.name.split("-")[2]


@pytest.fixture(params=WHEELS, ids=python_tag)
def wheel(request):
    return request.param


@pytest.fixture
def archive(wheel):
    with zipfile.ZipFile(wheel) as archive:
        yield archive


def elf(archive, name) -> ELFFile:
    return ELFFile(io.BytesIO(archive.read(name)))


def exported(file: ELFFile) -> set[str]:
    symbols = file.get_section_by_name(".dynsym")
    assert isinstance(symbols, SymbolTableSection)
    return {
        symbol.name
        for symbol in symbols.iter_symbols()
        if symbol["st_shndx"] != "SHN_UNDEF"
        and symbol["st_info"]["bind"] in ("STB_GLOBAL", "STB_WEAK")
        and symbol["st_other"]["visibility"] in ("STV_DEFAULT", "STV_PROTECTED")
    }


def test_there_is_a_wheel_for_this_interpreter():
    tags = [python_tag(path) for path in WHEELS]
    assert len(tags) == len(set(tags))
    assert f"cp{sys.version_info[0]}{sys.version_info[1]}" in tags


def test_auditwheel_agrees_with_the_platform_tag(wheel):
    shown = subprocess.run(
        [sys.executable, "-m", "auditwheel", "show", str(wheel)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    tag = re.search(r'following platform\s+tag:\s+"([^"]+)"', shown)
    assert tag is not None, shown
    needed = max(int(minor) for minor in re.findall(r"GLIBC_2\.(\d+)", shown))
    assert wheel.name.endswith(f"-manylinux_2_{needed}_x86_64.whl"), shown
    # On a system newer than auditwheel's list it cannot name the platform.
    expected = f"manylinux_2_{needed}_x86_64"
    if needed > newest_known_glibc():
        expected = "linux_x86_64"
    assert tag[1] == expected, shown


def newest_known_glibc() -> int:
    text = resources.files("auditwheel.policy").joinpath("manylinux-policy.json")
    names = [policy["name"] for policy in json.loads(text.read_text())]
    return max(int(n.split("_")[2]) for n in names if n.startswith("manylinux_2_"))


def test_record_is_complete_and_right(archive):
    (record,) = [n for n in archive.namelist() if n.endswith(".dist-info/RECORD")]
    rows = list(csv.reader(io.StringIO(archive.read(record).decode())))
    assert sorted(row[0] for row in rows) == sorted(archive.namelist())
    for name, digest, size in rows:
        if name == record:
            continue
        data = archive.read(name)
        encoded = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
        assert digest == "sha256=" + encoded.rstrip(b"=").decode(), name
        assert int(size) == len(data), name


def test_wheel_holds_each_op_on_each_platform_and_nothing_else(wheel, archive):
    expected = {
        f"xla_ops/lib/libxla_ops_{op}_{platform}.so"
        for op in OPS
        for platform in PLATFORMS
    }
    expected.add("xla_ops/lib/libxla_ops_pjrt.so")
    binaries = {name for name in archive.namelist() if name.endswith(".so")}
    (extension,) = [name for name in binaries if "/_runtime." in name]
    assert f"cpython-{python_tag(wheel)[2:]}" in extension
    assert binaries - {extension} == expected
    # What type checkers read (PEP 561).
    assert {"xla_ops/py.typed", "xla_ops/_runtime.pyi"} <= set(archive.namelist())
    # Neither tests nor sources of C++.
    suffixes = {pathlib.PurePath(n).suffix for n in archive.namelist()}
    assert not suffixes & {".cc", ".h", ".cuh", ".pyc"}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_op_library_exports_its_table_and_handler_alone(archive, op, platform):
    names = exported(elf(archive, f"xla_ops/lib/libxla_ops_{op}_{platform}.so"))
    assert {name for name in names if not name.startswith("xla_ops_")} == set()
    assert "xla_ops_handlers" in names
    assert any(name.endswith(f"_{platform}") for name in names)
    for name in ("xla_ops_cuda_archs", "xla_ops_cuda_version"):
        assert (name in names) == (platform == "cuda")


def test_bridge_and_extension_export_their_entries_alone(archive):
    bridge = exported(elf(archive, "xla_ops/lib/libxla_ops_pjrt.so"))
    assert "GetPjrtApi" in bridge
    assert {n for n in bridge - {"GetPjrtApi"} if not n.startswith("xla_ops_")} == set()
    (extension,) = [n for n in archive.namelist() if "/_runtime.cpython" in n]
    assert exported(elf(archive, extension)) == {"PyInit__runtime"}


def test_binaries_need_the_c_library_alone(archive):
    allowed = {"libc", "libm", "libdl", "libpthread", "librt", "ld-linux-x86-64"}
    for name in archive.namelist():
        if name.endswith(".so"):
            tags = elf(archive, name).get_section_by_name(".dynamic").iter_tags()
            needed = {
                t.needed.split(".so")[0] for t in tags if t.entry.d_tag == "DT_NEEDED"
            }
            assert needed <= allowed, name


def test_cuda_libraries_say_what_they_were_built_for():
    import xla_ops
    from xla_ops import _runtime

    folder = pathlib.Path(xla_ops.__file__).parent / "lib"
    for op in OPS:
        for platform in PLATFORMS:
            path = folder / f"libxla_ops_{op}_{platform}.so"
            expected = ARCHS if platform == "cuda" else ""
            assert _runtime.cuda_archs(str(path)) == expected
            version = _runtime.cuda_version(str(path))
            assert version >= 12000 if platform == "cuda" else version == 0


def test_metadata_pins_the_frameworks_and_names_the_entry_points():
    # Of the installed form, that is, of the wheel for this interpreter.
    distribution = metadata.distribution("xla_ops")
    required = distribution.requires
    assert {"torch==2.9.0", "torch_xla==2.9.0"} <= set(required)
    for extra, plugin in [("cuda12", "jax-cuda12-pjrt"), ("cuda13", "jax-cuda13-pjrt")]:
        assert any(
            r.startswith(plugin) and f'extra == "{extra}"' in r for r in required
        )
    points = {
        (point.group, point.name): point.value for point in distribution.entry_points
    }
    assert points == {
        ("torch_dynamo_backends", "xla_ops"): "xla_ops.programs.backend:backend",
        ("torch_xla.plugins", "CUDA"): "xla_ops_pjrt:GpuPlugin",
        ("torch_xla.plugins", "GPU"): "xla_ops_pjrt:GpuPlugin",
    }


def test_version_stands_in_one_place():
    import xla_ops

    assert metadata.version("xla_ops") == xla_ops.__version__
    for path in WHEELS:
        assert path.name.split("-")[1] == xla_ops.__version__
