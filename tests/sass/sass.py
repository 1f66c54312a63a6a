"""Reads machine code (SASS) of the kernels in an op library, without a GPU.

    kernels = read_library(".../libxla_ops_attention_cuda.so", "sm_90a", tools)
    loop = kernels[name].hot_loop()

A compiler may spill or reorder what the source has in order, and no result shows it:
test_attention.py holds the hot loops to recorded bounds. As a program this prints the
table that the bounds are taken from:

    python3 tests/sass/sass.py --tools=DIR LIBRARY [ARCH]

DIR holds cuobjdump and nvdisasm, which are in wheels of their own
(third_party/requirements.in).
"""

from __future__ import annotations

import argparse
import pathlib
import re
import subprocess
import tempfile
from dataclasses import dataclass

# Products of tensor cores: HMMA of mma.sync, HGMMA of wgmma.
_MATRIX = ("HMMA", "HGMMA")
_SPILLS = ("LDL", "STL")

_SECTION = re.compile(r"^\s*\.section\s+\.text\.([\w$]+)")
_LABEL = re.compile(r"^(\.L_x_\d+):")
# An address in a comment, a predicate perhaps, an opcode, and the rest up to ";".
_INSTRUCTION = re.compile(
    r"^\s*/\*([0-9a-f]+)\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
)
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_RESOURCES = re.compile(
    r"Function ([\w$]+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)"
)


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str  # with its modifiers, such as "LDL.LU"
    operands: str

    def is_a(self, names: tuple[str, ...]) -> bool:
        return self.opcode.split(".")[0] in names


@dataclass(frozen=True)
class Loop:
    """The instructions of a loop, in the order of their addresses."""

    body: list[Instruction]

    def count(self, *names: str) -> int:
        return sum(i.is_a(names) for i in self.body)

    @property
    def products(self) -> int:
        return self.count(*_MATRIX)

    @property
    def spills(self) -> int:
        """Loads and stores of registers that the compiler ran out of."""
        return self.count(*_SPILLS)

    @property
    def spills_among_products(self) -> int:
        """Those between the first product and the last."""
        at = [n for n, i in enumerate(self.body) if i.is_a(_MATRIX)]
        return Loop(self.body[at[0] : at[-1]]).spills if at else 0

    def __len__(self) -> int:
        return len(self.body)


@dataclass(frozen=True)
class Kernel:
    """One function; `labels` says before which instruction each label stands."""

    instructions: list[Instruction]
    labels: dict[str, int]

    def loops(self) -> list[Loop]:
        """Returns the code between each backward branch and its target."""
        found = []
        for at, instruction in enumerate(self.instructions):
            target = _TARGET.search(instruction.operands)
            if not instruction.is_a(("BRA",)) or target is None:
                continue
            start = self.labels.get(target[1], at + 1)
            if start <= at:
                found.append(Loop(self.instructions[start : at + 1]))
        return found

    def hot_loop(self) -> Loop:
        """Returns the innermost loop around the most matrix products.

        A loop over tiles is smaller than the loop over work items around it, whose
        products before and after the inner loop it does not hold.

        Raises:
            ValueError: no loop has a matrix product.
        """
        loops = [loop for loop in self.loops() if loop.products]
        if not loops:
            raise ValueError("no loop has a matrix product")
        return min(loops, key=len)


def parse(text: str) -> dict[str, Kernel]:
    """Reads what `nvdisasm -c` prints: a kernel for each .text section."""
    kernels: dict[str, Kernel] = {}
    kernel = None
    for line in text.splitlines():
        if section := _SECTION.match(line):
            kernel = kernels.setdefault(section[1], Kernel([], {}))
        elif kernel is None:
            continue
        elif label := _LABEL.match(line):
            kernel.labels[label[1]] = len(kernel.instructions)
        elif found := _INSTRUCTION.match(line):
            kernel.instructions.append(
                Instruction(int(found[1], 16), found[2], found[3].strip())
            )
    return kernels


def parse_resources(text: str) -> dict[str, dict[str, int]]:
    """Reads what `cuobjdump -res-usage` prints: registers and stack by function."""
    return {
        match[1]: {"registers": int(match[2]), "stack": int(match[3])}
        for match in _RESOURCES.finditer(text)
    }


def read_library(
    library: str | pathlib.Path, arch: str, tools: str | pathlib.Path
) -> dict[str, Kernel]:
    """Disassembles the device code of a library.

    Args:
        library: the shared object.
        arch: such as "sm_90a"; code for others is left out.
        tools: folder that holds cuobjdump and nvdisasm.

    Raises:
        ValueError: the library has no code for `arch`.
    """
    library, tools = pathlib.Path(library).resolve(), pathlib.Path(tools).resolve()
    kernels: dict[str, Kernel] = {}
    with tempfile.TemporaryDirectory() as folder:
        # It writes into the current folder.
        _run([tools / "cuobjdump", "-xelf", "all", library], folder)
        for cubin in sorted(pathlib.Path(folder).glob(f"*.{arch}.cubin")):
            kernels |= parse(_run([tools / "nvdisasm", "-c", cubin], folder))
    if not kernels:
        raise ValueError(f"{library} has no code for {arch}")
    return kernels


def read_resources(
    library: str | pathlib.Path, arch: str, tools: str | pathlib.Path
) -> dict[str, dict[str, int]]:
    """Reads registers and stack of each kernel of a library; as read_library."""
    library, tools = pathlib.Path(library).resolve(), pathlib.Path(tools).resolve()
    command = [tools / "cuobjdump", "-res-usage", "-arch", arch, library]
    return parse_resources(_run(command, None))


def _run(command: list, folder: str | None) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return result.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library")
    parser.add_argument("arch", nargs="?", default="sm_90a")
    parser.add_argument("--tools", required=True)
    args = parser.parse_args()
    kernels = read_library(args.library, args.arch, args.tools)
    resources = read_resources(args.library, args.arch, args.tools)
    print(
        "registers stack | all: size spills |"
        " hot loop: size products spills, among products MUFU"
    )
    for name, kernel in sorted(kernels.items()):
        used = resources.get(name, {"registers": 0, "stack": 0})
        line = f"{used['registers']:9} {used['stack']:5} | {len(kernel.instructions):9}"
        line += f" {Loop(kernel.instructions).spills:6} |"
        if any(loop.products for loop in kernel.loops()):
            loop = kernel.hot_loop()
            line += f"{len(loop):14} {loop.products:8} {loop.spills:7}"
            line += f" {loop.spills_among_products:14} {loop.count('MUFU'):4}"
        print(line, name)


if __name__ == "__main__":
    main()
