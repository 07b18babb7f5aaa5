"""What the public calls of the ops share: autocast, checks, and which of three ways to take.

1. Under torch.func transforms and forward-mode AD: plain PyTorch, which they can see through.
2. Where some input needs a gradient: an autograd.Function above the raw op. Its backward calls the
   raw backward op, or, where grad mode says that it is itself to be differentiated
   (create_graph=True), differentiates plain PyTorch.
3. Otherwise the raw op.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gpt_ext import _C

_BUILD = _C.build_facts()
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def transforms_active() -> bool:
    """Whether torch.func transforms or forward-mode AD are at work (two private names of torch)."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def needs_grad(*tensors: Tensor) -> bool:
    """Whether autograd is to record a call with these inputs."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which sums are taken and statistics stored."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _autocast_enabled(device_type: str) -> bool:
    # Other devices, meta among them, have no autocast to ask about.
    return device_type in ("cpu", "cuda") and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[None]:
    """A context in which autocast leaves torch's own ops alone."""
    if not _autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


def prepare(**tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, cast as autocast asks, once all are seen to be of one dtype and one device.

    Raises TypeError for what is no tensor or has a wrong dtype, ValueError for a wrong device.
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}, expected a torch.Tensor")
    device_type = next(iter(tensors.values())).device.type
    if _autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        for name, t in tensors.items():
            if t.is_floating_point() and t.dtype != torch.float64:
                tensors[name] = t.to(dtype)
    first_name, first = next(iter(tensors.items()))
    dtype, device = first.dtype, first.device
    _check_dtype(first_name, dtype, device)
    _check_device(first_name, device)
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected {dtype} as {first_name}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, expected {device} as {first_name}")
    return tuple(tensors.values())


def _check_dtype(name: str, dtype: torch.dtype, device: torch.device) -> None:
    if dtype not in _DTYPES:
        raise TypeError(
            f"{name} has dtype {dtype}, expected float64, float32, bfloat16 or, on CUDA, float16"
        )
    if dtype == torch.float16 and device.type == "cpu":
        raise TypeError(f"{name} has dtype torch.float16, which is for CUDA only")


def _check_device(name: str, device: torch.device) -> None:
    if device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name} is on {device}, expected a CPU or CUDA device")
    if device.type == "cuda" and not _BUILD["with_cuda"]:
        reason = _BUILD["no_cuda_reason"]
        raise ValueError(f"{name} is on {device}, but gpt_ext was built without CUDA: {reason}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], dims: str) -> None:
    """Raises ValueError unless the tensor has this shape, which dims says in letters."""
    if tensor.shape != expected:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected {dims} = {tuple(expected)}"
        )
