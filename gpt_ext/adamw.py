"""AdamW (Loshchilov and Hutter, 2019) by a native kernel: PyTorch's optimizer, faster on CPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpt_ext import ops


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW whose step is one native call for all parameters of a group, on CPUs.

    It keeps the state that PyTorch's keeps, under the same names: the state dict of either loads
    into the other, where that one has neither amsgrad nor maximize.

    Args:
        params: parameters or groups of them, contiguous, of one dtype, float32, float64 or
            bfloat16, on a CPU.
        lr, betas, eps, weight_decay: as PyTorch's, and by default what they are there.

    Raises:
        ValueError: a parameter is not on a CPU, or an option is out of range.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            if not parameter.is_cpu:
                self.param_groups.pop()
                raise ValueError(
                    f"a parameter is on {parameter.device}, expected cpu; "
                    "torch.optim.AdamW(fused=True) is for other devices"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """What a loaded state becomes, whose steps PyTorch counts in torch's default dtype."""
        super().__setstate__(state)
        for kept in self.state.values():
            kept["step"] = kept["step"].float()

    def gradient_norm(self) -> float:
        """The 2-norm of all gradients, taken together."""
        gradients = [
            p.grad for group in self.param_groups for p in group["params"] if p.grad is not None
        ]
        return ops.optimizer.norm([g.contiguous() for g in gradients]) if gradients else 0.0

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, gradient_scale: float = 1.0
    ) -> float | None:
        """A step on gradient_scale times the gradients; what closure gave, which is called first.

        Raises:
            ValueError: a group that was loaded has amsgrad or maximize.
            RuntimeError: parameters differ in dtype or are not contiguous.
        """
        for group in self.param_groups:
            for option in ("amsgrad", "maximize"):
                if group[option]:
                    raise ValueError(f"{option} is {group[option]}, expected False")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            states = [self._state_of(p) for p in parameters]
            if parameters:
                ops.optimizer.adamw_(
                    parameters,
                    [p.grad.contiguous() for p in parameters],
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [state["step"] for state in states],
                    learning_rate=float(group["lr"]),
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    gradient_scale=gradient_scale,
                )
        return loss

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state.update(fresh_state(parameter))
        return state


def fresh_state(parameter: Tensor) -> dict[str, Tensor]:
    """What AdamW, ours and PyTorch's fused one, keeps of a parameter, before the first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }
