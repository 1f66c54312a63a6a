"""Counts the cache-sized copies in what XLA really compiled.

SPDX-License-Identifier: Apache-2.0

A buffer that keeps its address over a step may still have been copied inside
it, to a temporary and back. Whether it was stands in the optimised HLO, which
XLA writes out where XLA_FLAGS says so (`dump_flags`). The rule used here is
strict: an instruction whose result has the cache's shape makes a copy, unless
it is one of those that only rename a buffer.
"""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

# Instructions that own no buffer of their own: the result is an operand's, or
# is counted where it is made (in a called computation; at copy-start).
RENAMES = {
    "parameter", "tuple", "get-tuple-element", "bitcast", "call", "while",
    "conditional", "copy-done", "async-done", "async-update",
    "opt-barrier",
}  # fmt: skip
DTYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}

INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (?P<type>.*?) (?P<op>[\w-]+)\(")
COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.-]+) \(.*\{$")
PARAMETER = re.compile(r"^\s+%?[\w.-]+ = (?P<type>.*?) parameter\((?P<number>\d+)\)")
ALIAS = re.compile(r"\{[\d, ]*\}: \(\d+, \{[\d, ]*\}")
SAME_BUFFER = re.compile(r"\{[\d, ]*\}: \((\d+), \{\}, \w+-alias\)")
FUSED = re.compile(r"fusion\(.*calls=%?([\w.-]+)")


COLLECTIVES = {
    *("all-reduce", "all-gather", "all-to-all", "reduce-scatter"),
    *("collective-permute", "collective-broadcast"),
}


class Program(NamedTuple):
    """One compiled program.

    Attributes:
      cache_copies: how often it copies the cache of a layer.
      caches_elsewhere: caches that it takes and does not update in their own buffers.
      custom_calls: of xla_ops.
      collectives: how many of each kind.
    """

    name: str
    cache_copies: int
    caches_elsewhere: int
    custom_calls: int
    collectives: Counter


def dump_flags(folder: Path) -> str:
    """XLA_FLAGS that write every program to `folder`; to be set before XLA starts."""
    return f"--xla_dump_to={folder} --xla_dump_hlo_as_text"


def instructions(hlo: str) -> list[str]:
    """What the instructions of a module are called, such as "fusion"."""
    found = map(INSTRUCTION.match, hlo.splitlines())
    return [instruction["op"] for instruction in found if instruction]


def collectives(hlo: str) -> Counter:
    """The instructions of a module that move data between devices, by name."""
    names = (name.removesuffix("-start") for name in instructions(hlo))
    found = Counter(name for name in names if name in COLLECTIVES)
    # What stands for them between processes.
    calls = r'"xla_ops\.(?:host|peer)_collective".*?gathers = (\w+)'
    for gathers in re.findall(calls, hlo):
        found["all-gather" if gathers == "true" else "all-reduce"] += 1
    found["all-reduce"] += hlo.count('"xla_ops.peer_add_rms_norm"')
    return +found


def inputs_elsewhere(shape: str, hlo: str) -> int:
    """Inputs of `shape` in whose buffers a module leaves no result."""
    header, _, body = hlo.partition("\n")
    kept = {int(number) for number in SAME_BUFFER.findall(header)}
    entry = body[body.index("\nENTRY ") :]
    inputs = filter(None, map(PARAMETER.match, entry.splitlines()))
    return sum(shape in i["type"] and int(i["number"]) not in kept for i in inputs)


def copies_of(shape: str, hlo: str) -> int:
    """Copies of an array of `shape`, such as "f32[64,16,2,64]", in one program.

    Args:
      shape: as HLO writes it, without layout.
      hlo: a scheduled HLO module as text.
    """
    fused = set(FUSED.findall(hlo))  # inside a fusion there are no buffers
    count, inside_fusion = 0, False
    for line in hlo.splitlines():
        computation = COMPUTATION.match(line)
        if computation:
            inside_fusion = computation["name"] in fused
        instruction = INSTRUCTION.match(line)
        if not instruction or inside_fusion or shape not in instruction["type"]:
            continue
        op = instruction["op"]
        if op == "copy-start":  # its type names operand and result
            count += 1
        elif op == "custom-call":
            # One that updates the cache must have been given it to overwrite.
            made = instruction["type"].count(shape)
            attributes = line.partition("output_to_operand_aliasing={")[2]
            count += max(0, made - len(ALIAS.findall(attributes)))
        elif op not in RENAMES:
            count += instruction["type"].count(shape)
    return count


def step_programs(
    folder: Path, cache_shape: tuple[int, ...], dtype: str
) -> list[Program]:
    """The dumped programs that take the cache and compute: those of the steps.

    One that only hands the cache on is none: xla_ops runs it where a cache has to get
    a buffer of its own, before it is updated for the first time.

    Args:
      folder: what dump_flags was given.
      cache_shape: of one layer's K or V, as one device has it.
      dtype: of the cache, as torch names it.
    """
    shape = f"{DTYPES[dtype]}[{','.join(map(str, cache_shape))}]"
    found = []
    for path in sorted(folder.glob("*after_optimizations.txt")):
        hlo = path.read_text()
        entry = re.search(r"^ENTRY .*$", hlo, re.MULTILINE)
        takes_it = entry and shape in entry[0].partition(" -> ")[0]
        if takes_it and not RENAMES.issuperset(instructions(hlo)):
            calls = hlo.count('custom_call_target="xla_ops.')
            found.append(
                Program(
                    path.name,
                    copies_of(shape, hlo),
                    inputs_elsewhere(shape, hlo),
                    calls,
                    collectives(hlo),
                )
            )
    return found
