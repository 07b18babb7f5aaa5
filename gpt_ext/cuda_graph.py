"""A function that is captured in a CUDA graph: one launch where Python made hundreds.

What a small model's step takes is the time of its launches. A graph repeats them with the addresses
that they had, so inputs are copied to where they lay, and what changes from call to call has to be
in the device's memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = (
    3  # calls before the capture: libraries allocate, and kernels are loaded, in the first ones
)


class Replayed:
    """`function` of tensors whose shapes never change, on `device`.

    The first calls run as they are, the next one is captured, and that is what all others replay.
    Their results lie where those of the call before lay. Draws of torch's generator go on from
    replay to replay, and seeding it between them tells, as without a graph.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], device: torch.device) -> None:
        self.function, self.device = function, device
        self.calls = 0
        self.inputs: tuple[Tensor, ...] = ()
        self.replay: Callable[[], tuple[Tensor, ...]] | None = None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        if self.calls == 0:
            self.inputs = tuple(torch.empty_like(each, device=self.device) for each in inputs)
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.aside()
        if self.replay is None:
            self.replay = self.captured()
        return self.replay()

    def aside(self) -> tuple[Tensor, ...]:
        """A call on a stream of its own, as captures are: autograd remembers where it first ran."""
        current, side = torch.cuda.current_stream(self.device), torch.cuda.Stream(self.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            outputs = self.function(*self.inputs)
        current.wait_stream(side)
        return outputs

    def captured(self) -> Callable[[], tuple[Tensor, ...]]:
        """What does once more, at each call, what one call would do now."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.Stream(self.device)):
            outputs = self.function(*self.inputs)

        def replay() -> tuple[Tensor, ...]:
            graph.replay()
            return outputs

        return replay
