"""What a training run can be told; saved with the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from gpt_ext.errors import UserError


def option(default: Any, text: str) -> Any:
    """A dataclass field with the line that `--help` shows for it."""
    return field(default=default, metadata={"help": text})


def check_seed(seed: int) -> None:
    """UserError for what torch's generators do not take."""
    if not -(2**63) <= seed < 2**64:
        raise UserError(f"seed must be from -2^63 to 2^64 - 1, got {seed}")


@dataclass(frozen=True)
class ModelOptions:
    """The arguments of `GPT` that the data does not give."""

    context_length: int = option(64, "characters that a prediction sees")
    model_dim: int = option(128, "width of the residual stream")
    num_blocks: int = option(4, "decoder blocks")
    num_heads: int = option(4, "attention heads a block")
    dropout: float = option(0.0, "probability, on what attention and feed-forward add")
    activation: Literal["relu", "gelu", "gelu_tanh"] = option("relu", "of the feed-forward network")
    qkv_bias: bool = option(False, "a bias on queries, keys and values")


@dataclass(frozen=True)
class TrainOptions:
    """How to train; UserError for values that make no run."""

    steps: int = option(2000, "optimisation steps")
    batch_size: int = option(32, "sequences a step, of all processes together")
    micro_batch_size: int | None = option(
        None, "sequences that a process computes at once, adding up gradients; default: its share"
    )
    learning_rate: float = option(1e-3, "AdamW's peak, reached after the warmup")
    final_learning_rate: float = option(1e-4, "where the cosine decay ends")
    warmup_steps: int = option(100, "steps of linear warmup")
    weight_decay: float = option(0.1, "AdamW's, on the weights of linear layers")
    beta1: float = option(0.9, "AdamW's decay of the mean gradient")
    beta2: float = option(0.99, "AdamW's decay of the mean squared gradient")
    clip_norm: float = option(1.0, "gradients are scaled down to this norm")
    ema: float = option(0.0, "decay of a moving average of the weights, to be used instead of them")
    precision: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "of products, by autocast; parameters stay float32"
    )
    compile: bool = option(False, "compiles the blocks by torch.compile")
    cuda_graph: bool = option(
        False, "on CUDA: captures a step in a graph, for models whose time is that of launches"
    )
    recompute: bool = option(False, "computes a block again in backward: less memory, more time")
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp", "under torchrun: a whole model in each process, or a share of each parameter"
    )
    eval_every: int = option(250, "steps from one evaluation and checkpoint to the next")
    keep_last: int = option(2, "checkpoints to keep")
    eval_batches: int = option(20, "batches an evaluation")
    log_every: int = option(50, "steps from one log line to the next")
    tensorboard: bool = option(False, "logs for TensorBoard, too, in RUN/tensorboard")
    max_skipped: int = option(10, "stop after so many steps in a row without a finite loss")
    seed: int = option(0, "of initial weights, batches and dropout")
    device: str = option("cpu", "PyTorch's name of the device, such as cpu or cuda")

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_every", "eval_batches", "log_every",
                     "keep_last", "max_skipped", "learning_rate", "clip_norm"):  # fmt: skip
            if not getattr(self, name) > 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("warmup_steps", "final_learning_rate", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 0 and below 1, got {getattr(self, name)}")
        if self.micro_batch_size is not None and self.micro_batch_size <= 0:
            raise UserError(f"micro_batch_size must be above 0, got {self.micro_batch_size}")
        check_seed(self.seed)
