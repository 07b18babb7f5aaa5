"""The ops: native kernels for CPU and CUDA behind ordinary differentiable PyTorch functions."""

from gpt_ext.ops.attention import causal_attention, packed_causal_attention
from gpt_ext.ops.ffn import feed_forward

__all__ = ["causal_attention", "feed_forward", "packed_causal_attention"]
