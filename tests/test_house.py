"""The rules of the house, as CONTRIBUTING.md has them: rows, includes, and what is no source."""

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
OPS = sorted(header.stem for header in (CSRC / "ops").glob("*.h") if header.stem != "backend")
SOURCES = sorted(f for f in CSRC.rglob("*") if f.suffix in {".h", ".cpp", ".cu", ".cuh"})

# What the files of a folder may include of csrc: the arrow ends at ops, the contract.
MAY_INCLUDE = {
    "ops": ("ops/",),
    "common": ("common/", "ops/"),
    "cpu": ("cpu/", "common/", "ops/"),
    "cuda": ("cuda/", "common/", "ops/"),
    "torch": ("torch/", "common/", "ops/", "cpu/isa.h"),
}
TORCH_HEADER = re.compile(r"(torch|ATen|c10|pybind11)/")
CUDA_HEADER = re.compile(r"(cuda|cub/|cublas|cudnn|cooperative_groups|mma\.h|nv/|thrust/|cute/)")


def includes(file: Path) -> list[tuple[bool, str]]:
    """(whether it is <system>, what) of each include."""
    found = re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)[>"]', file.read_text(), re.MULTILINE)
    return [(bracket == "<", name) for bracket, name in found]


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_there_are_ops() -> None:
    assert {"attention", "linear", "ffn", "cross_entropy"} <= set(OPS)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "place",
    [
        "csrc/cpu/{op}_*.cpp",
        "csrc/torch/{op}.cpp",
        "gpt_ext/ops/{op}.py",
        "tests/ops/test_{op}.py",
        "benchmarks/native/bench_{op}.cpp",
    ],
)
def test_an_op_is_a_row_across_the_house(op: str, place: str) -> None:
    assert list(ROOT.glob(place.format(op=op))), f"{op} has no {place.format(op=op)}"


@pytest.mark.parametrize("op", OPS)
def test_an_op_has_its_line_in_the_library(op: str) -> None:
    assert re.search(rf'"{op}_\w+\(', (CSRC / "torch/library.cpp").read_text())


def test_backends_mirror_each_other() -> None:
    kernels = {
        folder: {
            f.stem for f in (CSRC / folder).glob(f"*{suffix}") if f.stem.startswith(tuple(OPS))
        }
        for folder, suffix in (("cpu", ".cpp"), ("cuda", ".cu"))
    }
    for op in OPS:
        on_cpu, on_cuda = (
            {stem for stem in stems if stem.startswith(op)} for stems in kernels.values()
        )
        assert on_cuda in (on_cpu, set()), f"{op} has some of its kernels on CUDA, not all or none"


@pytest.mark.parametrize(
    ("pattern", "prefix"),
    [
        ("csrc/cuda/*.cu", ""),
        ("csrc/cpu/*_*ward.cpp", ""),
        ("benchmarks/native/bench_*.cpp", "bench_"),
    ],
)
def test_nothing_belongs_to_no_op(pattern: str, prefix: str) -> None:
    rows = tuple(prefix + op for op in OPS)
    files = [f.stem for f in ROOT.glob(pattern)]
    assert files
    assert [stem for stem in files if not stem.startswith(rows)] == []


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_includes_follow_the_arrow(file: Path) -> None:
    folder = file.relative_to(CSRC).parts[0]
    for system, name in includes(file):
        if system:
            assert folder == "torch" or not TORCH_HEADER.match(name), (
                f"<{name}>: torch, outside torch/"
            )
            assert folder == "cuda" or not CUDA_HEADER.match(name), f"<{name}>: CUDA, outside cuda/"
        else:
            path = name if (CSRC / name).exists() else f"{folder}/{name}"
            assert (CSRC / path).exists(), f'"{name}" is not in csrc'
            assert path.startswith(MAY_INCLUDE[folder]), f'{folder} may not include "{name}"'


@pytest.mark.parametrize(
    "header",
    sorted([*(CSRC / "ops").glob("*.h"), *(CSRC / "common").glob("*.h"), CSRC / "cpu/isa.h"]),
    ids=name_of,
)
def test_header_stands_alone(header: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-I", str(CSRC)]
    code = f'#include "{header}"\n#include "{header}"\n'
    done = subprocess.run(
        [compiler, *flags, "-x", "c++", "-"], input=code, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", sorted((ROOT / "gpt_ext/ops").glob("*.py")), ids=name_of)
def test_ops_know_no_model(file: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name for name in imported if name.split(".")[0] == "gpt_ext"}
    assert [name for name in ours if not name.startswith(("gpt_ext._C", "gpt_ext.ops"))] == []


def test_both_builds_compile_for_the_same_gpus() -> None:
    setup = re.search(r"^CUDA_ARCHS = (\[.*\])$", (ROOT / "setup.py").read_text(), re.MULTILINE)
    cmake = re.search(
        r"set\(CMAKE_CUDA_ARCHITECTURES (.*)\)", (ROOT / "CMakeLists.txt").read_text()
    )
    assert setup is not None
    assert cmake is not None
    kinds = {"real": "sm", "virtual": "compute"}
    from_cmake = [arch.split("-") for arch in cmake[1].split()]
    assert ast.literal_eval(setup[1]) == [f"{kinds[kind]}_{arch}" for arch, kind in from_cmake]


def test_nothing_generated_is_committed() -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not in a git checkout")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    generated = re.compile(
        r"(\.(so|o|a|pyc|whl|pt|safetensors|png|log)$|(^|/)(build|dist|runs|__pycache__)/|egg-info)"
    )
    pictures = re.compile(r"docs/images/serve_(light|dark|phone)\.png")  # which take a trained run
    found = [name for name in listed if generated.search(name)]
    assert [name for name in found if not pictures.fullmatch(name)] == []
