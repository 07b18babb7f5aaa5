"""The ops: native kernels for CPU and CUDA behind ordinary differentiable PyTorch functions."""

from gpt_ext.ops import optimizer
from gpt_ext.ops.attention import causal_attention, packed_causal_attention
from gpt_ext.ops.cross_entropy import cross_entropy
from gpt_ext.ops.embedding import embedding
from gpt_ext.ops.ffn import feed_forward
from gpt_ext.ops.linear import Norm, linear

__all__ = [
    "Norm",
    "causal_attention",
    "cross_entropy",
    "embedding",
    "feed_forward",
    "linear",
    "optimizer",
    "packed_causal_attention",
]
