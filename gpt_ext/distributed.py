"""The processes that torchrun starts for one run, and what they share.

A process that nobody started so is rank 0 of 1, and none of this costs it anything.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Literal

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from gpt_ext.errors import UserError

Parallel = Literal["ddp", "fsdp"]

# Groups that were left: were DDP's the last reference to one, it would end the group's threads
# while it holds the GIL, which they may be waiting for.
_GROUPS: list[object] = []


class LostProcessError(UserError):
    """Another process of the job is gone."""


class World:
    """The processes of a job, of which this is number `rank` of `size`; `device` is its own."""

    def __init__(self, device: str = "cpu") -> None:
        self.rank = self.local_rank = 0
        self.size = 1
        if distributed.is_torchelastic_launched():
            self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            if device == "cuda":
                device = f"cuda:{os.environ['LOCAL_RANK']}"
        try:
            self.device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {device!r} can't be used: {error}") from None
        if self.device.type not in ("cpu", "cuda"):
            raise UserError(f"device {device!r} can't be used: it is neither cpu nor cuda")

    @contextmanager
    def joined(self) -> Iterator[World]:
        """Connected with the others, whose output goes nowhere but for the first one's.

        LostProcessError where the connection ends before its time.
        """
        if self.size == 1:
            yield self
            return
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        try:
            distributed.init_process_group(backend)
            # A meeting: were the first one to leave now, with an error, it would take along the
            # store through which others still connect.
            self.any(False)
            with (
                open(os.devnull, "w") as nowhere,
                redirect_stdout(nowhere if self.rank else sys.stdout),
            ):
                yield self
        except UserError:
            if self.rank == 0:
                raise
            sys.exit(2)  # it is everybody's, and the first has told it
        except (RuntimeError, distributed.DistError) as error:
            # gloo's errors are RuntimeErrors that bear its name; NCCL's have a type.
            if isinstance(error, distributed.DistError) or "gloo" in str(error):
                raise LostProcessError("another process of the job is gone") from error
            raise
        finally:
            if distributed.is_initialized():
                _GROUPS.append(distributed.group.WORLD)
                distributed.destroy_process_group()

    def spread(self, objective: nn.Module, blocks: nn.ModuleList, parallel: Parallel) -> nn.Module:
        """`objective` as a module whose gradients are means over all processes.

        "ddp" keeps all of it in each; "fsdp" a part of each parameter, of its gradient and of its
        moments, and the whole of one of `blocks` at a time.
        """
        if self.size == 1:
            return objective
        if parallel == "ddp":
            return DistributedDataParallel(objective, gradient_as_bucket_view=True)
        mesh = distributed.init_device_mesh(self.device.type, (self.size,))
        for module in (*blocks, objective):  # the last one has what the blocks have not
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        return objective

    def mean(self, value: Tensor) -> Tensor:
        """The mean over all processes of a number that each has."""
        if self.size > 1:
            distributed.all_reduce(value)
            value /= self.size
        return value

    def any(self, value: bool) -> bool:
        """Whether it is so in some process."""
        return bool(self.mean(torch.tensor(float(value), device=self.device)) > 0)

    def first(self, do: Callable[[], object]) -> None:
        """Does it in the process of rank 0, whose UserError is then that of all."""
        error: list[str | None] = [None]
        if self.rank == 0:
            try:
                do()
            except UserError as told:
                error[0] = str(told)
        if self.size > 1:
            distributed.broadcast_object_list(error)
        if error[0] is not None:
            raise UserError(error[0])


def syncs(module: nn.Module, now: bool) -> None:
    """Whether the next backward makes gradients the same in all processes, or only sums them."""
    if isinstance(module, DistributedDataParallel):
        module.require_backward_grad_sync = now
    elif isinstance(module, FSDPModule):
        module.set_requires_gradient_sync(now)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, of which a process may hold a part; every process has to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
