"""The devices that tests run on."""

import torch

from gpt_ext import _C

DEVICES = [
    "cpu",
    *(["cuda"] if torch.cuda.is_available() and _C.build_facts()["with_cuda"] else []),
]
