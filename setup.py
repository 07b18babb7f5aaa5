"""Builds gpt_ext._C, the kernels of csrc/ and their binding, against the torch that is installed.

Metadata and sdist need no torch. CUDA is compiled in where torch has CUDA and its toolkit is found.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None  # type: ignore[assignment]

ROOT = Path(__file__).parent
TORCH_NEEDED = (2, 11)
TORCH_TARGET = "0x020b000000000000ull"  # 2.11's stable ABI, which every later torch keeps
# A folder for each torch and Python: objects of one must not end up in a build for another.
TORCH_VERSION = torch.__version__ if torch else "none"
BUILD = f"build/torch-{TORCH_VERSION}-{sysconfig.get_config_var('SOABI')}"

CXX_FLAGS = ["-std=c++20", "-O3", "-fopenmp", "-ffp-contract=fast", "-fvisibility=hidden", "-g0"]
CXX_FLAGS += ["-Wno-psabi"]  # vectors as wide as a SIMD level never leave the level's functions
NVCC_FLAGS = [
    "-std=c++20",
    "-O3",
    "-Xcompiler=-fvisibility=hidden",
    # torch's build switches the operators of the half types off; the kernels use them.
    "-U__CUDA_NO_HALF_OPERATORS__",
    "-U__CUDA_NO_HALF_CONVERSIONS__",
    "-U__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-U__CUDA_NO_HALF2_OPERATORS__",
]
# sm_90a for Hopper's own instructions, whose PTX runs nowhere else; compute_90 is for later GPUs.
CUDA_ARCHS = ["sm_80", "sm_86", "sm_89", "sm_90a", "compute_90"]


def sources(pattern: str) -> list[str]:
    """The files of a folder, relative to the root: a new kernel needs no list edited."""
    return sorted(str(file.relative_to(ROOT)) for file in ROOT.glob(pattern))


def cuda_toolkit() -> Path | None:
    """The toolkit's own folder. The nvcc on PATH may be a wrapper: nvcc itself is asked."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        dry_run = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull]
        answer = subprocess.run(dry_run, capture_output=True, text=True, cwd=tempfile.gettempdir())
        candidates += re.findall(r"^#\$ TOP=(.+)$", answer.stderr, re.MULTILINE)
    candidates.append("/usr/local/cuda")
    for folder in map(Path, filter(None, candidates)):
        if (folder / "bin/nvcc").exists() and (folder / "include/cuda_runtime.h").exists():
            return folder.resolve()
    return None


def why_no_cuda(toolkit: Path | None) -> str | None:
    """Why only the CPU backend is built; None if CUDA can be."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if toolkit is None:
        return (
            "no CUDA toolkit found (CUDA_HOME is to be the folder that holds bin/nvcc and "
            "include/cuda_runtime.h)"
        )
    version = subprocess.run([toolkit / "bin/nvcc", "--version"], capture_output=True, text=True)
    release = re.search(r"release ((\d+)\.\d+)", version.stdout)
    if release is None or release[2] != torch.version.cuda.split(".")[0]:
        found = release[1] if release else "unknown"
        return f"{toolkit} is CUDA {found} and torch was built with CUDA {torch.version.cuda}"
    return None


def configure(extension: Extension, version: str) -> None:
    """Settles includes, flags and libraries, and adds the CUDA backend if it can be built."""
    import pybind11

    # pybind11's own headers ahead of torch's copy: the two share no types.
    includes = [str(ROOT / "csrc"), pybind11.get_include(), *cpp_extension.include_paths()]
    libraries = cpp_extension.library_paths()
    link = ["-fopenmp", "-s", "-Wl,--exclude-libs,ALL"]
    cxx = [*CXX_FLAGS, f'-DGPT_EXT_VERSION="{version}"', f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    nvcc = list(NVCC_FLAGS)

    toolkit = cuda_toolkit()
    if reason := why_no_cuda(toolkit):
        print(f"gpt_ext: CPU backend only: {reason}")
        cxx.append(f'-DGPT_EXT_NO_CUDA_REASON="{reason}"')
    else:
        cpp_extension.CUDA_HOME = str(toolkit)
        chosen = os.environ.get("TORCH_CUDA_ARCH_LIST")  # torch's own way, which it obeys itself
        archs = chosen or " ".join(CUDA_ARCHS)
        print(f"gpt_ext: CPU and CUDA backends: toolkit {toolkit}, architectures {archs}")
        cxx += ["-DGPT_EXT_WITH_CUDA", f'-DGPT_EXT_CUDA_ARCHS="{archs}"']
        if not chosen:
            nvcc += [f"-gencode=arch={a.replace('sm', 'compute')},code={a}" for a in CUDA_ARCHS]
        extension.sources = [*extension.sources, *sources("csrc/cuda/*.cu")]
        includes.append(f"{toolkit}/include")
        libraries += [f"{toolkit}/lib64", f"{toolkit}/lib"]
        # cudart inside: a build with CUDA also loads where there is no CUDA.
        link += ["-lcudart_static", "-lrt", "-lpthread", "-ldl"]

    # libtorch leads to whichever backends torch has; some linkers drop it as unused.
    link += ["-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]

    extension.include_dirs = includes
    extension.library_dirs = libraries
    extension.extra_link_args = link
    extension.extra_compile_args = {"cxx": cxx, "nvcc": nvcc}  # type: ignore[assignment]


def check_compiler(compiler: str) -> None:
    """One clear error where the compiler, C++20, OpenMP or Python's headers are missing."""
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").exists():
        sys.exit(f"gpt_ext: no Python.h in {headers} (on Debian: apt-get install python3-dev)")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "probe.cpp")
        program.write_text("#include <omp.h>\n#include <span>\nint n = omp_get_max_threads();\n")
        flags = [*CXX_FLAGS, "-fPIC", "-shared", "-o", f"{folder}/probe.so"]
        try:
            subprocess.run(
                [compiler, *flags, str(program)], capture_output=True, text=True, check=True
            )
        except FileNotFoundError:
            sys.exit(f"gpt_ext: no C++ compiler {compiler!r} (on Debian: apt-get install g++)")
        except subprocess.CalledProcessError as error:
            sys.exit(f"gpt_ext: {compiler} cannot compile C++20 with OpenMP:\n{error.stderr}")


class BuildPy(build_py):
    """Into an empty folder: of an earlier build objects are of use, but no module that is gone."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildExt(cpp_extension.BuildExtension if torch else build_ext):  # type: ignore[misc]
    """torch's build_ext; the extension is configured when it is compiled, not for metadata."""

    build_temp: str | None

    def finalize_options(self) -> None:
        # Set here, for an editable install starts from no option at all, and would compile anew.
        self.build_temp = self.build_temp or f"{BUILD}/objects"
        super().finalize_options()

    def build_extensions(self) -> None:
        if torch is None:
            sys.exit("gpt_ext: compiling needs torch, which cannot be imported here")
        if tuple(map(int, torch.__version__.split(".")[:2])) < TORCH_NEEDED:
            sys.exit(f"gpt_ext: torch >= 2.11 is needed, {torch.__version__} is installed")
        check_compiler(self.compiler.compiler_cxx[0])
        for extension in self.extensions:
            configure(extension, self.distribution.get_version())
        super().build_extensions()


if __name__ == "__main__":
    native = sources("csrc/cpu/*.cpp") + sources("csrc/torch/*.cpp")
    setup(
        ext_modules=[Extension("gpt_ext._C", native, language="c++")],
        cmdclass={"build_py": BuildPy, "build_ext": BuildExt},
        options={"build": {"build_base": BUILD}},
    )
