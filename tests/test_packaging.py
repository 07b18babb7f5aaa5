"""What the package is made of: the build backend, CUDA's detection, the module that came of it.

Whole installs are tried by .ci/run, in clean environments.
"""

import importlib.metadata
import importlib.util
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from setuptools import Distribution, Extension

import gpt_ext
from gpt_ext import _C

ROOT = Path(__file__).parent.parent
SOABI = sysconfig.get_config_var("SOABI")


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True)


# The package that is installed


def test_version_has_one_source() -> None:
    declared = re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared is not None
    assert gpt_ext.__version__ == declared[1]
    assert importlib.metadata.version("gpt-ext") == declared[1]


def test_import_needs_torch_alone() -> None:
    others = [
        "huggingface_hub",
        "jsonargparse",
        "matplotlib",
        "numpy",
        "onnx",
        "pybind11",
        "rich",
        "safetensors",
        "setuptools",
        "tiktoken",
        "tokenizers",
        "transformers",
    ]
    code = f"import sys; sys.modules.update(dict.fromkeys({others})); import torch, gpt_ext\n"
    code += "model = gpt_ext.GPT(5, 4, 8, 1, 2); print(model(torch.zeros(1, 3).long()).shape)"
    done = run_python(code)
    assert "torch.Size([1, 3, 5])" in done.stdout, done.stderr


def test_older_torch_is_refused_in_one_sentence() -> None:
    done = run_python("import torch; torch.__version__ = '2.10.1'; import gpt_ext")
    assert done.stderr.splitlines()[-1] == (
        "ImportError: gpt_ext needs torch >= 2.11, but torch 2.10.1 is installed"
    )


def test_extension_loads_beside_any_torch() -> None:
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("no readelf on this machine")
    listed = subprocess.run(
        [readelf, "-d", _C.__file__], capture_output=True, text=True, check=True
    )
    needed = re.findall(r"NEEDED.*\[(.*)\]", listed.stdout)
    assert "libtorch_cpu.so" in needed
    assert [n for n in needed if re.match(r"libcudart|libc10_cuda|libtorch_(cuda|python)", n)] == []
    assert "RUNPATH" not in listed.stdout


# The backend: which torch a build uses


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "gpt_ext_build", ROOT / "build_tools/gpt_ext_build.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    return module


@pytest.fixture
def isolated(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The backend where torch is out of sight, as front ends run it."""
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backend, "candidate_pythons", lambda: iter([]))
    monkeypatch.delenv("GPT_EXT_TORCH_PYTHON", raising=False)
    return backend


def fake_python(folder: Path, version: str, soabi: str = SOABI) -> str:
    """An interpreter whose answer to the probe is the given torch."""
    answer = f'["{folder}/site/torch", "{version}", "{soabi}"]'
    return str(executable(folder / "python", f"echo '{answer}'"))


def test_backend_finds_the_torch_of_an_interpreter(backend: ModuleType) -> None:
    site, version = backend.find_torch(sys.executable)
    assert Path(site) == Path(torch.__file__).parent.parent
    assert version == importlib.metadata.version("torch")


@pytest.mark.parametrize(
    ("version", "soabi", "usable"),
    [
        ("2.11.0", SOABI, True),
        ("2.14.1+cu130", SOABI, True),
        ("3.0.0", SOABI, True),
        ("2.10.1", SOABI, False),
        ("2.13.0", "cpython-27-other", False),
    ],
)
def test_backend_takes_what_is_new_enough_and_for_this_python(
    backend: ModuleType, tmp_path: Path, version: str, soabi: str, usable: bool
) -> None:
    found = backend.find_torch(fake_python(tmp_path, version, soabi))
    assert found == ((f"{tmp_path}/site", version) if usable else None)


def test_backend_goes_past_interpreters_that_do_not_work(
    backend: ModuleType, tmp_path: Path
) -> None:
    assert backend.find_torch(str(tmp_path / "none")) is None
    assert backend.find_torch(str(executable(tmp_path / "fails", "exit 1"))) is None
    assert backend.find_torch(str(executable(tmp_path / "chats", "echo hello"))) is None


def test_backend_looks_in_the_environments_it_may_be_for(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("VIRTUAL_ENV", "/venv")
    monkeypatch.setenv("CONDA_PREFIX", "/conda")
    monkeypatch.chdir(tmp_path)
    local = str(tmp_path / ".venv/bin/python")
    expected = [sys.executable, "/venv/bin/python", "/conda/bin/python", local]
    assert list(backend.candidate_pythons()) == expected


def test_backend_asks_for_torch_only_where_there_is_none(
    isolated: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert isolated.get_requires_for_build_wheel() == ["torch>=2.11"]
    assert isolated.get_requires_for_build_editable({}) == ["torch>=2.11"]
    assert isolated.get_requires_for_build_sdist() == []
    new_enough = fake_python(tmp_path, "2.12.0")
    monkeypatch.setattr(isolated, "candidate_pythons", lambda: iter(["/none", new_enough]))
    assert isolated.get_requires_for_build_wheel() == []


def test_backend_takes_the_torch_it_is_told(
    isolated: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = fake_python(tmp_path, "2.12.0")
    assert isolated.get_requires_for_build_wheel({"torch-python": told}) == []
    monkeypatch.setenv("GPT_EXT_TORCH_PYTHON", told)
    assert isolated.get_requires_for_build_wheel() == []
    with pytest.raises(SystemExit, match=r"no torch >= 2\.11 for this Python in /none"):
        isolated.get_requires_for_build_wheel({"torch-python": "/none"})


def test_backend_serves_modules_without_a_path(backend: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "only_there.py").write_text("answer = 42\n")
    sys.meta_path.append(backend.SiteFinder(str(tmp_path)))
    import only_there  # type: ignore[import-not-found]

    assert only_there.answer == 42
    assert str(tmp_path) not in sys.path
    del sys.modules["only_there"]


# CUDA in setup.py, with toolkits that only look like one


@pytest.fixture
def setup_py() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "setup.py"), run_name="setup")


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    folder = tmp_path / "cuda"
    says = 'case "$1" in --version) echo "Cuda compilation tools, release 13.1, V13.1.2";;'
    executable(folder / "bin/nvcc", f"{says} *) echo '#$ TOP={folder}/bin/..' >&2;; esac")
    (folder / "include").mkdir()
    (folder / "include/cuda_runtime.h").touch()
    return folder


def test_toolkit_is_found_behind_a_wrapper(
    setup_py: dict[str, Any], toolkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(tmp_path / "local/bin/nvcc", f'exec {toolkit}/bin/nvcc "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}/local/bin", prepend=":")
    monkeypatch.delenv("CUDA_PATH", raising=False)
    for home in ("", str(tmp_path / "local")):  # unset, and the wrapper's folder, which is none
        monkeypatch.setenv("CUDA_HOME", home)
        assert setup_py["cuda_toolkit"]() == toolkit


def test_toolkit_named_outright_comes_first(
    setup_py: dict[str, Any], toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    assert setup_py["cuda_toolkit"]() == toolkit


def test_reasons_for_no_cuda(
    setup_py: dict[str, Any], toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    why_no_cuda = setup_py["why_no_cuda"]
    monkeypatch.setattr(torch.version, "cuda", None)
    assert why_no_cuda(toolkit) == f"torch {torch.__version__} has no CUDA"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert why_no_cuda(None).startswith("no CUDA toolkit found (CUDA_HOME is to be the folder")
    assert why_no_cuda(toolkit) == f"{toolkit} is CUDA 13.1 and torch was built with CUDA 12.8"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert why_no_cuda(toolkit) is None


def configured(setup_py: dict[str, Any]) -> Extension:
    extension = Extension("gpt_ext._C", setup_py["sources"]("csrc/cpu/*.cpp"))
    setup_py["configure"](extension, "1.2.3")
    return extension


def test_cuda_build_links_what_every_torch_has(
    setup_py: dict[str, Any], toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", None)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    extension = configured(setup_py)
    flags: Any = extension.extra_compile_args
    assert "csrc/cuda/attention_forward.cu" in extension.sources
    assert "-DGPT_EXT_WITH_CUDA" in flags["cxx"]
    assert "-gencode=arch=compute_90a,code=sm_90a" in flags["nvcc"]
    assert "-gencode=arch=compute_90,code=compute_90" in flags["nvcc"]  # PTX for later GPUs
    assert "-lcudart_static" in extension.extra_link_args
    linked = [*extension.libraries, *extension.extra_link_args]
    assert not {"cudart", "c10_cuda", "torch_cuda"} & {name.removeprefix("-l") for name in linked}
    home = torch.utils.cpp_extension.CUDA_HOME
    assert home == str(toolkit)


def test_user_chooses_the_architectures(
    setup_py: dict[str, Any], toolkit: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.utils.cpp_extension, "CUDA_HOME", None)
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0a")
    flags: Any = configured(setup_py).extra_compile_args
    assert '-DGPT_EXT_CUDA_ARCHS="9.0a"' in flags["cxx"]
    assert not [flag for flag in flags["nvcc"] if "gencode" in flag]  # torch's build adds them


def test_cpu_build_says_why(
    setup_py: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    flags: Any = configured(setup_py).extra_compile_args
    reason = f"torch {torch.__version__} has no CUDA"
    assert f"gpt_ext: CPU backend only: {reason}" in capsys.readouterr().out
    assert f'-DGPT_EXT_NO_CUDA_REASON="{reason}"' in flags["cxx"]
    assert not [
        flag for flag in flags["cxx"] if flag.startswith("-m")
    ]  # levels are chosen at run time


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("/none/c++", r"no C\+\+ compiler '/none/c\+\+'"),
        ("false", r"false cannot compile C\+\+20 with OpenMP"),
    ],
)
def test_compiler_that_will_not_do_is_told(
    setup_py: dict[str, Any], compiler: str, message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        setup_py["check_compiler"](compiler)


def test_editable_install_compiles_only_what_has_changed(
    setup_py: dict[str, Any], tmp_path: Path
) -> None:
    distribution = Distribution({"cmdclass": {"build_ext": setup_py["BuildExt"]}})
    distribution.get_command_obj("build").build_temp = str(tmp_path)  # as setuptools does for it
    command = distribution.get_command_obj("build_ext")
    command.ensure_finalized()
    assert command.build_temp == f"{setup_py['BUILD']}/objects"
