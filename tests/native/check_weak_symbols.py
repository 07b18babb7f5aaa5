"""No inline function shared by the SIMD levels may hold wide instructions.

Usage: check_weak_symbols.py LIBRARY.a. Of all copies of a weak symbol the linker keeps one: if that
is the copy of a file compiled for AVX2 or wider, a machine without it dies at the first call. Weak
symbols of a level's own namespace are that level's alone, and may hold what they like.
"""

import re
import subprocess
import sys

LEVELS = re.compile(r"\bgpt_ext::cpu::(avx2|avx512|avx512_bf16|amx)::")
WIDE = re.compile(r"%[yz]mm|\tv[a-z0-9]+ ")  # v...: an AVX encoding, whatever its registers


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main(library: str) -> int:
    weak = set(re.findall(r"^[0-9a-f]* +[WVu] (.+)$", run("nm", "-C", library), re.MULTILINE))
    code = run("objdump", "-d", "-C", "--no-show-raw-insn", library)
    functions = re.findall(r"^[0-9a-f]+ <(.+)>:\n((?:.+\n)*)", code, re.MULTILINE)
    shared = [(name, body) for name, body in functions if name in weak and not LEVELS.search(name)]
    if not functions or len(shared) == len(functions):
        print(f"{library}: found {len(functions)} functions, {len(shared)} of them shared")
        return 1
    bad = sorted({name for name, body in shared if WIDE.search(body)})
    for name in bad:
        print(f"weak symbol with wide instructions: {name}")
    print(f"{len(shared)} weak functions shared by the levels, {len(bad)} of them wide")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
