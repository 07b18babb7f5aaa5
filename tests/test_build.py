"""What the package tells of its build, and how it refuses to start."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import gpt_ext
from gpt_ext import _C


def test_build_info() -> None:
    info = gpt_ext.build_info()
    assert json.loads(json.dumps(info)) == info
    assert info["version"] == gpt_ext.__version__
    assert info["torch_running"] == torch.__version__
    compiled, supported = info["simd_levels_compiled"], info["simd_levels_supported"]
    assert supported[0] == "scalar"
    assert set(supported) <= set(compiled)
    assert info["simd_level"] in supported
    assert (info["device"] is None) == (not torch.cuda.is_available())
    assert bool(info["cuda_architectures"]) == _C.build_facts()["with_cuda"]
    if info["device"] is None:
        assert info["why_no_cuda"]


def test_simd_levels_can_be_forced() -> None:
    chosen = _C.simd_level()
    for level in _C.supported_simd_levels():
        _C.set_simd_level(level)
        assert _C.simd_level() == gpt_ext.build_info()["simd_level"] == level
    _C.set_simd_level(chosen)
    with pytest.raises(RuntimeError, match="avx1024"):
        _C.set_simd_level("avx1024")
    assert _C.simd_level() == chosen


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


def test_the_environment_forces_a_level() -> None:
    answer = run("import gpt_ext; print(gpt_ext.build_info()['simd_level'])", GPT_EXT_SIMD="scalar")
    assert answer.stdout.strip() == "scalar", answer.stderr


def test_an_old_torch_is_refused_in_one_sentence() -> None:
    answer = run("import torch; torch.__version__ = '2.10.1+cpu'; import gpt_ext")
    last = answer.stderr.strip().splitlines()[-1]
    assert last == "ImportError: gpt_ext needs torch >= 2.11, but torch 2.10.1+cpu is installed"


def test_a_missing_native_module_is_told_in_one_sentence() -> None:
    answer = run("import sys; sys.modules['gpt_ext._C'] = None; import gpt_ext")
    last = answer.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: gpt_ext's native module cannot be loaded (")
    assert last.endswith("compile it for this Python and torch: pip install . in the source folder")


def test_import_leaves_the_compiler_alone() -> None:
    answer = run("import sys, gpt_ext; print('torch._dynamo' in sys.modules)")
    assert answer.stdout.strip() == "False", answer.stderr  # it takes a second to load


def test_import_needs_torch_only() -> None:
    code = """
import sys
for name in ("safetensors", "rich", "jsonargparse", "matplotlib", "numpy"):
    sys.modules[name] = None
import warnings
warnings.simplefilter("ignore")
import gpt_ext
"""
    answer = run(code)
    assert answer.returncode == 0, answer.stderr
