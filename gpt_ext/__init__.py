"""gpt_ext: GPT decoders whose attention and feed-forward networks are native kernels."""

import torch

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
    raise ImportError(f"gpt_ext needs torch >= 2.11, but torch {torch.__version__} is installed")

try:
    from gpt_ext import _C
except ImportError as error:
    raise ImportError(
        f"gpt_ext's native module cannot be loaded ({error}); "
        "compile it for this Python and torch: pip install . in the source folder"
    ) from error

from gpt_ext import ops
from gpt_ext.adamw import AdamW
from gpt_ext.build import build_info
from gpt_ext.generation import generate
from gpt_ext.model import GPT, GPTConfig

__version__ = _C.build_facts()["version"]
__all__ = ["GPT", "AdamW", "GPTConfig", "build_info", "generate", "ops"]
