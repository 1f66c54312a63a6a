"""What is in the wheels, and that their names tell the truth: auditwheel, which
knows nothing of the build, must come to the same."""

import base64
import csv
import hashlib
import importlib
import io
import pathlib
import re
import subprocess
import sys
import zipfile
from importlib import metadata

import pytest
from auditwheel.architecture import Architecture
from auditwheel.libc import Libc
from auditwheel.wheel_abi import analyze_wheel_abi
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection, GNUVerSymSection
from elftools.elf.sections import SymbolTableSection
from packaging.metadata import Metadata

from support import setting

FOLDER = setting("XLA_OPS_TEST_WHEELS", "the folder bazel-bin/xla_ops/wheel")
WHEELS = sorted(pathlib.Path(FOLDER).glob("*.whl"))
OPS = setting("XLA_OPS_TEST_OPS", "the ops in the wheel").split(",")
HOST_OPS = setting("XLA_OPS_TEST_HOST_OPS", "those for the CPU alone").split(",")
GPU_OPS = setting("XLA_OPS_TEST_GPU_OPS", "those for GPUs alone").split(",")
# The architectures that the build was asked for; empty without CUDA.
LIST = setting("XLA_OPS_TEST_ARCHS", "the file bazel-bin/third_party/cuda/archs.txt")
ARCHS = pathlib.Path(LIST).read_text()
ROOT = pathlib.Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "wheel"
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


def newest_glibc(file: ELFFile) -> set[str]:
    """Which symbols of `file` glibc 2.28 lacks, with their versions."""
    symbols = file.get_section_by_name(".dynsym")
    numbers = file.get_section_by_name(".gnu.version")
    needs = file.get_section_by_name(".gnu.version_r")
    assert isinstance(symbols, SymbolTableSection)
    assert isinstance(numbers, GNUVerSymSection)
    assert isinstance(needs, GNUVerNeedSection)
    names = {
        version["vna_other"]: version.name
        for _, versions in needs.iter_versions()
        for version in versions
    }
    found = set()
    for index, symbol in enumerate(symbols.iter_symbols()):
        version = names.get(numbers.get_symbol(index)["ndx"], "")
        match = re.match(r"GLIBC_2\.(\d+)", version)
        if match and int(match[1]) > 28:
            found.add(f"{symbol.name}@{version}")
    return found


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


def test_wheel_is_for_glibc_2_28(wheel, archive):
    """What is missing where this fails: third_party/glibc/BUILD."""
    for name in archive.namelist():
        if name.endswith(".so"):
            assert newest_glibc(elf(archive, name)) == set(), name
    assert wheel.name.endswith("-manylinux_2_28_x86_64.whl")


def test_auditwheel_finds_nothing_that_the_tag_does_not_say(wheel):
    found = analyze_wheel_abi(
        Libc.GLIBC,
        Architecture.x86_64,
        wheel,
        # Which the wheel's requirement brings; a tag knows of no requirements.
        exclude=frozenset({"libc10.so", "libtorch_cpu.so"}),
        disable_isa_ext_check=False,
        allow_graft=False,
    )
    tag = re.fullmatch(r"manylinux_2_(\d+)_x86_64", found.overall_policy.name)
    assert tag is not None, found.overall_policy
    assert int(tag[1]) <= 28


@pytest.fixture
def build_wheel(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOL))
    return importlib.import_module("build_wheel")


def shared_object(path: pathlib.Path, code: str, *options: str) -> pathlib.Path:
    command = ["gcc", "-shared", "-fPIC", "-nostdlib", "-x", "c", "-", "-o", str(path)]
    subprocess.run([*command, *options], input=code, text=True, check=True)
    return path


def test_tag_is_of_the_newest_symbol(build_wheel, tmp_path):
    """A library that calls itself libc and has a symbol of the future."""
    versions = tmp_path / "versions.lds"
    versions.write_text("GLIBC_2.5 { old; }; GLIBC_2.99 { young; };")
    libc = shared_object(
        tmp_path / "libc.so",
        "void old(void) {} void young(void) {}",
        "-Wl,-soname,libc.so.6",
        f"-Wl,--version-script={versions}",
    )
    users = [
        shared_object(
            tmp_path / f"{name}_user.so",
            f"void {name}(void); void f(void) {{ {name}(); }}",
            # gcc has read the code before it comes to -x none.
            "-x",
            "none",
            str(libc),
        )
        for name in ("old", "young")
    ]
    assert build_wheel.platform_tag(users[:1]) == "manylinux_2_28_x86_64"
    assert build_wheel.platform_tag(users) == "manylinux_2_99_x86_64"


def test_library_that_no_wheel_may_expect_is_refused(build_wheel, tmp_path):
    other = shared_object(tmp_path / "other.so", "void f(void) {}", "-Wl,-soname,o.so")
    user = shared_object(
        tmp_path / "user.so",
        "void f(void); void g(void) { f(); }",
        "-x",
        "none",
        str(other),
    )
    with pytest.raises(
        ValueError, match=r"user\.so must need only .*, got \['o\.so'\]"
    ):
        build_wheel.platform_tag([user])


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
    expected |= {f"xla_ops/lib/libxla_ops_{op}_cpu.so" for op in HOST_OPS}
    expected.add("xla_ops/lib/libxla_ops_pjrt.so")
    expected.add("xla_ops/lib/libxla_ops_torch_op.so")
    if "cuda" in PLATFORMS:
        expected |= {f"xla_ops/lib/libxla_ops_{op}_cuda.so" for op in GPU_OPS}
        expected.add("xla_ops/lib/libxla_ops_launch_kernel_cuda.so")
    binaries = {name for name in archive.namelist() if name.endswith(".so")}
    (extension,) = [name for name in binaries if "/_runtime." in name]
    assert f"cpython-{python_tag(wheel)[2:]}" in extension
    assert binaries - {extension} == expected
    # What type checkers read (PEP 561).
    assert {"xla_ops/py.typed", "xla_ops/_runtime.pyi"} <= set(archive.namelist())
    # Neither tests nor sources of C++.
    suffixes = {pathlib.PurePath(n).suffix for n in archive.namelist()}
    assert not suffixes & {".cc", ".pyc"}


def test_wheel_holds_the_headers_that_op_libraries_are_built_against(archive):
    held = {name for name in archive.namelist() if name.endswith((".h", ".cuh"))}
    ours = {name for name in held if name.startswith("xla_ops/include/xla_ops/cc/")}
    assert {path.rpartition("/")[0] for path in ours} == {
        "xla_ops/include/xla_ops/cc/core",
        "xla_ops/include/xla_ops/cc/device",
    }
    xla = {"api.h", "c_api.h", "ffi.h"}
    assert held - ours == {f"xla_ops/include/xla/ffi/api/{name}" for name in xla}
    # No header asks for one that is not there.
    for name in held:
        text = archive.read(name).decode()
        for asked in re.findall(r'^#include "(.+)"', text, re.MULTILINE):
            assert f"xla_ops/include/{asked}" in held, f"{name} includes {asked}"


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_op_library_exports_its_table_and_handler_alone(archive, op, platform):
    names = exported(elf(archive, f"xla_ops/lib/libxla_ops_{op}_{platform}.so"))
    assert {name for name in names if not name.startswith("xla_ops_")} == set()
    assert {"xla_ops_handlers", "xla_ops_api_version"} <= names
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
    allowed.add("libgcc_s")  # the unwinder, as torch needs it
    for name in archive.namelist():
        if name.endswith(".so"):
            tags = elf(archive, name).get_section_by_name(".dynamic").iter_tags()
            needed = {
                t.needed.split(".so")[0] for t in tags if t.entry.d_tag == "DT_NEEDED"
            }
            of_torch = {"libc10", "libtorch_cpu"} if "torch_op" in name else set()
            assert needed - allowed == of_torch, name


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


def test_wheel_holds_every_source_of_the_package(archive):
    """Modules, stubs and py.typed; and what is installed beside the package."""
    tree = ROOT / "xla_ops"
    expected = {path.name for path in tree.glob("*.py")}
    for pattern in ("*.py", "*.pyi", "py.typed"):
        paths = (path.relative_to(tree / "py") for path in (tree / "py").rglob(pattern))
        expected |= {f"xla_ops/{path.as_posix()}" for path in paths}
    held = {
        name
        for name in archive.namelist()
        if ".dist-info/" not in name and not name.endswith((".so", ".h", ".cuh"))
    }
    assert held == expected
    (top,) = [n for n in archive.namelist() if n.endswith(".dist-info/top_level.txt")]
    packages = {name.split("/")[0].removesuffix(".py") for name in held}
    assert set(archive.read(top).decode().split()) == packages
    assert packages == {"xla_ops", "xla_ops_pjrt", "xla_ops_vllm"}


def test_metadata_is_valid_and_leads_to_the_project(archive):
    (name,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
    found = Metadata.from_email(archive.read(name), validate=True)
    assert found.author and found.keywords and found.summary
    assert set(found.project_urls) == {"Source", "Documentation", "Changelog", "Issues"}
    source = found.project_urls["Source"]
    assert all(url.startswith(source) for url in found.project_urls.values())
    # README.md, its links made absolute: test_readme.py.
    assert found.description_content_type == "text/markdown"
    assert f"]({source}/blob/v{found.version}/docs/" in found.description
    assert "](docs/" not in found.description


def test_metadata_pins_the_frameworks_and_names_the_entry_points():
    # Of the installed form, that is, of the wheel for this interpreter.
    distribution = metadata.distribution("xla_ops")
    required = distribution.requires
    assert {"torch==2.9.0", "torch_xla==2.9.0"} <= set(required)
    points = {
        (point.group, point.name): point.value for point in distribution.entry_points
    }
    assert points == {
        ("torch_dynamo_backends", "xla_ops"): "xla_ops.programs.backend:backend",
        ("torch_xla.plugins", "CUDA"): "xla_ops_pjrt:GpuPlugin",
        ("torch_xla.plugins", "GPU"): "xla_ops_pjrt:GpuPlugin",
        ("vllm.platform_plugins", "xla_ops"): "xla_ops_vllm:register",
    }


def test_version_stands_in_one_place():
    import xla_ops

    assert metadata.version("xla_ops") == xla_ops.__version__
    for path in WHEELS:
        assert path.name.split("-")[1] == xla_ops.__version__
