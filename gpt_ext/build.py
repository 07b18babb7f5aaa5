"""What this build of gpt_ext is, and what it found on this machine."""

from __future__ import annotations

import re
from typing import Any

import torch

from gpt_ext import _C

OLDEST_CUDA_CAPABILITY = (8, 0)


def build_info() -> dict[str, Any]:
    """Facts of the build and of this machine, ready for json.dumps.

    Its keys:

    * version: of gpt_ext.
    * torch_built_with, torch_running: versions of torch; they may differ (stable ABI).
    * compiler: of the C++ code.
    * simd_levels_compiled, simd_levels_supported: lists, narrowest first; supported are those
      compiled that this CPU has.
    * simd_level: the one in use; the environment variable GPT_EXT_SIMD forces another.
    * cuda_architectures: compiled into this build, an empty list without CUDA.
    * device: the GPU the CUDA backend would use, or None.
    * why_no_cuda: why the CUDA backend cannot be used here, or None if it can.
    """
    facts = _C.build_facts()
    why_no_cuda = _why_no_cuda(facts)
    return {
        "version": facts["version"],
        "torch_built_with": facts["torch"],
        "torch_running": str(torch.__version__),
        "compiler": facts["compiler"],
        "simd_levels_compiled": _C.compiled_simd_levels(),
        "simd_levels_supported": _C.supported_simd_levels(),
        "simd_level": _C.simd_level(),
        "cuda_architectures": re.findall(r"[^\s;]+", facts["cuda_archs"]),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "why_no_cuda": why_no_cuda,
    }


def _why_no_cuda(facts: _C.BuildFacts) -> str | None:
    if not facts["with_cuda"]:
        return f"this build has no CUDA: {facts['no_cuda_reason']}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CUDA_CAPABILITY:
        return f"the device's compute capability is {capability[0]}.{capability[1]}, 8.0 is needed"
    return None
