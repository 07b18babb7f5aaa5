"""The tolerance rule: our error is at most twice PyTorch's own in the same dtype, plus a floor.

Both errors are the largest over the tensor, against a float64 reference. The floor covers the cases
in which PyTorch is lucky or exact (one key, one row): the rounding of the result to its dtype, and
rounding errors of sums taken in another order, in the accumulation type. Of those 20 were measured
at most (float32 gradients of q and k, D = 256), relative to the largest value or to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

SUM_ROUNDINGS = 32

# The dtype of inputs and parameters; under autocast, products are taken in bfloat16.
MODES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "autocast": torch.float32,
}


def autocast_of(mode: str, device: str) -> AbstractContextManager[None]:
    """The context that a mode runs in."""
    return torch.autocast(device, torch.bfloat16, enabled=mode == "autocast")


def floor(dtype: torch.dtype, largest: float) -> float:
    """The error allowed even where PyTorch makes none."""
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    of_sums = SUM_ROUNDINGS * torch.finfo(accumulation).eps * max(1.0, largest)
    return of_sums + torch.finfo(dtype).eps / 2 * largest


def assert_as_good_as_torch(
    names: Sequence[str],
    ours: Sequence[Tensor],
    torchs: Sequence[Tensor],
    references: Sequence[Tensor],
    product: torch.dtype | None = None,
) -> None:
    """Applies the rule to each of several results; a failure prints the worst coordinate.

    product is the dtype that the operation computes in where that is narrower than its results'.
    """
    for name, our, theirs, reference in zip(names, ours, torchs, references, strict=True):
        assert our.shape == reference.shape, f"{name}: {our.shape}, expected {reference.shape}"
        assert our.dtype == theirs.dtype, f"{name}: {our.dtype}, expected {theirs.dtype}"
        if reference.numel() == 0:
            continue
        our_error = (our.cpu().double() - reference).abs()
        torch_error = (theirs.cpu().double() - reference).abs().max().item()
        limit = 2 * torch_error + floor(product or our.dtype, reference.abs().max().item())
        if not our_error.max().item() <= limit:  # so that NaN fails
            worst = our_error.nan_to_num(torch.inf).argmax()
            place = tuple(int(i) for i in torch.unravel_index(worst, our.shape))
            raise AssertionError(
                f"{name}{list(place)} is {our[place].item()}, the reference "
                f"{reference[place].item()}: error {our_error[place].item():.3g}, "
                f"limit {limit:.3g}, torch's own error {torch_error:.3g}"
            )
