"""Holds what nvcc made of each CUDA kernel against the table beside this file.

    cuda_resources.py --objects FOLDER --launches PROGRAM --cuobjdump PROGRAM [--write]

Of each kernel: registers on every architecture, threads and bytes of shared memory of its launch
(as the program cuda_launches prints them), and whether the machine's code of a kernel for tensor
cores has what it is named for, HMMA, LDSM (ldmatrix) and LDGSTS (cp.async), and keeps nothing in
local memory. Another release of nvcc allots other registers: --write writes the table anew.
"""

from __future__ import annotations

import argparse
import difflib
import re
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path

TABLE = Path(__file__).with_suffix(".txt")
ON_TENSOR_CORES = "_mma_kernel"
INSTRUCTIONS = ("HMMA", "LDSM", "LDGSTS")
LOCAL_MEMORY = ("LDL", "STL")
# They have to transpose 32 bits, LDSM takes 16.
WITHOUT_LDSM = ("gemm_mma_kernel<float, (Layout)2", "gemm_mma_kernel<SplitFloat, (Layout)2")
# A minimum of which two results go to one predicate: code that ptxas 13.0 makes for sm_90, of a
# clamp that is then compared with its upper end, branches wrongly.
WRONG_MINIMUM = re.compile(r"VIMNMX\S* R\d+, (P\d), \1,")


def run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def short(kernel: str) -> str:
    """The name of a demangled kernel, without its return type, namespaces and parameters."""
    name = re.sub(r"gpt_ext::(cuda::)?", "", kernel).removeprefix("void ")
    depth = 0
    for i, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:i]
    return name


def demangled(text: str) -> str:
    command = ["c++filt"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def architectures(text: str) -> list[tuple[str, str]]:
    """(architecture, what cuobjdump says of it) in turn."""
    _, *parts = re.split(r"^arch = (\w+)$", text, flags=re.MULTILINE)
    return list(zip(parts[::2], parts[1::2], strict=True))


def registers_of(cuobjdump: str, objects: list[Path]) -> dict[str, dict[str, int]]:
    """Kernel to architecture to registers."""
    registers: dict[str, dict[str, int]] = defaultdict(dict)
    for file in objects:
        for arch, part in architectures(demangled(run(cuobjdump, "-res-usage", file))):
            for kernel, count in re.findall(r"^ *Function (.*):\n.*?REG:(\d+)", part, re.MULTILINE):
                registers[short(kernel)][arch] = int(count)
    return registers


def wrong_instructions(cuobjdump: str, file: Path) -> list[str]:
    """What a file's kernels have and should not, or for tensor cores lack, in words."""
    wrong = []
    for arch, part in architectures(run(cuobjdump, "-sass", file)):
        _, *functions = re.split(r"^\s*Function : (\S+)$", part, flags=re.MULTILINE)
        names = demangled("\n".join(functions[::2])).splitlines()
        for kernel, code in zip(map(short, names), functions[1::2], strict=True):
            if minimum := WRONG_MINIMUM.search(code):
                wrong.append(f"{kernel} on {arch} has {minimum[0]!r}, which branches wrongly")
            if ON_TENSOR_CORES not in kernel:
                continue
            found = {x for x in INSTRUCTIONS + LOCAL_MEMORY if re.search(rf"{x}\b", code)}
            if kernel.startswith(WITHOUT_LDSM):
                found.add("LDSM")
            wrong += [f"{kernel} on {arch} has no {x}" for x in INSTRUCTIONS if x not in found]
            wrong += [f"{kernel} on {arch} has {x}" for x in LOCAL_MEMORY if x in found]
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares CUDA kernels with their table.")
    parser.add_argument("--objects", type=Path, required=True, help="a folder of *.cu.o")
    parser.add_argument("--launches", required=True, help="the program cuda_launches")
    parser.add_argument("--cuobjdump", default="cuobjdump")
    parser.add_argument("--write", action="store_true", help="write the table, compare nothing")
    options = parser.parse_args()
    objects = sorted(options.objects.glob("*.cu.o"))

    # Emulating launches and searching disassembled code take half a minute of a core each.
    with ProcessPoolExecutor() as pool:
        printed = pool.submit(run, options.launches)
        searched = pool.map(wrong_instructions, repeat(options.cuobjdump), objects)
        wrong = [line for each in searched for line in each]
    registers = registers_of(options.cuobjdump, objects)
    launches = {}
    for line in printed.result().splitlines():
        threads, shared, kernel = line.split(" ", 2)
        launches[short(kernel)] = f"{threads:>7} {shared:>6}"
    if launches.keys() != registers.keys():
        sys.exit(f"compiled or launched only: {sorted(launches.keys() ^ registers.keys())}")
    archs = sorted({arch for each in registers.values() for arch in each})
    header = "".join(f"{arch:>8}" for arch in archs) + "  threads shared  kernel"
    rows = [
        "".join(f"{registers[kernel][arch]:>8}" for arch in archs) + f"  {launch}  {kernel}"
        for kernel, launch in sorted(launches.items())
    ]
    _, release = re.split(r"release ([\d.]+)", run("nvcc", "--version"))[:2]
    title = f"# Registers of a thread, by nvcc {release}; bytes of a block"
    lines = [title, f"#{header[1:]}", *rows]
    if options.write:
        TABLE.write_text("\n".join(lines) + "\n")
    old = TABLE.read_text().splitlines()
    if old[0] == title:
        wrong += difflib.unified_diff(old, lines, TABLE.name, "now", lineterm="", n=0)
    else:
        print(f"registers not compared: the table has {old[0]!r}")
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"{len(rows)} kernels are as {TABLE.name} has them")


if __name__ == "__main__":
    main()
