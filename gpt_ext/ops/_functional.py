"""What the public calls of the ops share: autocast, checks, and which of three ways to take.

1. Under torch.func transforms and forward-mode AD: plain PyTorch, which they can see through.
2. Where some input needs a gradient: an autograd.Function above the raw op. Its backward calls the
   raw backward op, or, where grad mode says that it is itself to be differentiated
   (create_graph=True), differentiates plain PyTorch.
3. Otherwise the raw op.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gpt_ext import _C

_BUILD = _C.build_facts()
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
_DTYPES = {
    "cpu": _CPU_DTYPES,
    "meta": (*_CPU_DTYPES, torch.float16),
    **({"cuda": (*_CPU_DTYPES, torch.float16)} if _BUILD["with_cuda"] else {}),
}


def transforms_active() -> bool:
    """Whether torch.func transforms or forward-mode AD are at work (two private names of torch)."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd is to record a call with these inputs."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def is_known_to_be_one(x: Tensor) -> bool:
    """Whether a single number is 1, which a loss's backward() begins with, if it is told at once.

    It isn't of one on a GPU, in a compiled graph, of a batch of numbers, or of a fake one.
    """
    if not x.is_cpu or torch.compiler.is_compiling():
        return False
    try:
        return bool(x.item() == 1)
    except RuntimeError:
        return False


def differentiate(
    plain: Callable[..., Tensor], arguments: Sequence[Any], wanted: Sequence[bool], dout: Tensor
) -> tuple[Tensor | None, ...]:
    """Differentiable gradients of plain(*arguments) for the wanted arguments, else None."""
    places = [i for i, want in enumerate(wanted) if want]

    def of_wanted(*tensors: Tensor) -> Tensor:
        replaced = list(arguments)
        for i, tensor in zip(places, tensors, strict=True):
            replaced[i] = tensor
        return plain(*replaced)

    vjp = torch.func.vjp(of_wanted, *(arguments[i] for i in places))[1]
    gradients = dict(zip(places, vjp(dout), strict=True))
    return tuple(gradients.get(i) for i in range(len(arguments)))


def wanted_only(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    """What a raw backward op gave, with None in the place of what was not wanted."""
    return tuple(g if want else None for g, want in zip(gradients, wanted, strict=True))


def allow_tf32() -> bool:
    """Whether torch takes products of float32 on CUDA in tf32: by its setting at the time."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# A constant of a compiled graph, as all of them are guarded by the setting. It is what
# torch.compiler.assume_constant_result does, which would load the compiler with us: a second.
allow_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]


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


class Operands(NamedTuple):
    """What the operands of one call are to agree on: the device, and two dtypes.

    Parameters and the residual stream are kept in one dtype, and products read and give the other:
    autocast's, under autocast, else the same (csrc/ops/linear.h).
    """

    first: str  # the name of the parameter that the rest is compared with
    device: torch.device
    stream: torch.dtype
    product: torch.dtype
    casts: bool  # as autocast does

    def take(
        self, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], dims: str
    ) -> Tensor:
        """The tensor, contiguous, once it is seen to have this dtype and this shape.

        Raises TypeError for what is no tensor or has a wrong dtype, ValueError for a wrong device
        or a wrong shape, which dims says in letters.
        """
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.dtype != dtype:
            tensor = self._cast(name, tensor, dtype)
        if tensor.device != self.device:
            raise ValueError(
                f"{name} is on {tensor.device}, expected {self.device} as {self.first}"
            )
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected {dims} = {tuple(shape)}"
            )
        return tensor.contiguous()

    def _cast(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not (self.casts and _takes_part_in_autocast(tensor)):
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected {dtype} as {self.first}")
        return tensor.to(dtype)


def operands_like(name: str, parameter: Tensor) -> Operands:
    """The Operands of a call with this parameter.

    Raises TypeError for what is no tensor or has a wrong dtype, ValueError for a wrong device.
    """
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{name} is {type(parameter).__name__}, expected a torch.Tensor")
    dtype, device = parameter.dtype, parameter.device
    device_type = device.type
    product, casts = dtype, _autocast_enabled(device_type)
    if casts and _takes_part_in_autocast(parameter):
        product = torch.get_autocast_dtype(device_type)
    supported = _DTYPES.get(device_type, ())
    for needed in (dtype, product):
        if needed not in supported:
            raise _refusal(name, needed, device)
    return Operands(name, device, dtype, product, casts)


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
            if _takes_part_in_autocast(t):
                tensors[name] = t.to(dtype)
    first_name, first = next(iter(tensors.items()))
    dtype, device = first.dtype, first.device
    if dtype not in _DTYPES.get(device.type, ()):
        raise _refusal(first_name, dtype, device)
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected {dtype} as {first_name}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, expected {device} as {first_name}")
    return tuple(tensors.values())


def _takes_part_in_autocast(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64


def _refusal(name: str, dtype: torch.dtype, device: torch.device) -> Exception:
    """Why there are no kernels for a tensor of this dtype on this device."""
    if device.type == "cuda" and "cuda" not in _DTYPES:
        reason = _BUILD["no_cuda_reason"]
        return ValueError(f"{name} is on {device}, but gpt_ext was built without CUDA: {reason}")
    if device.type not in _DTYPES:
        return ValueError(f"{name} is on {device}, expected a CPU or CUDA device")
    if dtype == torch.float16:
        return TypeError(f"{name} has dtype torch.float16, which is for CUDA only")
    return TypeError(
        f"{name} has dtype {dtype}, expected float64, float32, bfloat16 or, on CUDA, float16"
    )


def check_indices(name: str, tensor: Tensor) -> None:
    """Raises TypeError unless the tensor is one of int64."""
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64:
        got = getattr(tensor, "dtype", type(tensor).__name__)
        raise TypeError(f"{name} has dtype {got}, expected torch.int64")


def check_number(name: str, value: Any, kind: type = Real, expected: str = "a number") -> None:
    """Raises TypeError for what is no number, or none of the kind."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {value!r}, expected {expected}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], dims: str) -> None:
    """Raises ValueError unless the tensor has this shape, which dims says in letters."""
    if tensor.shape != expected:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}, expected {dims} = {tuple(expected)}"
        )


def draw_dropout_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    """One number (1), int64, from torch's default generator; None where nothing is dropped.

    Raises TypeError for a dropout_p that is no number, ValueError for one that is no probability.
    """
    check_number("dropout_p", dropout_p)
    if dropout_p == 0:
        return None
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p is {dropout_p}, expected 0 to 1")
    return torch.randint(2**63 - 1, (1,), device=device)
