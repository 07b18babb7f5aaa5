"""ONNX Runtime: a graph of its fused operators (attention with past, skip and norm, activation)."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from models import blocks_of
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import Tensor

from gpt_ext import GPT

FUSED = "com.microsoft"  # the domain of ONNX Runtime's own operators


class OnnxRuntime:
    def __init__(self, model: GPT, dtype: str, batch: int) -> None:
        config = model.config
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            onnx.save(Graph(model).build(), path)
            if dtype == "int8":
                logging.disable(logging.WARNING)  # it advises what a graph of fused operators has
                quantized = Path(folder) / "quantized.onnx"
                quantize_dynamic(
                    path,
                    quantized,
                    weight_type=QuantType.QInt8,
                    extra_options={"DefaultTensorType": TensorProto.FLOAT},
                )
                path = quantized
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.log_severity_level = 3
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.past_names = [f"past_{i}" for i in range(config.num_blocks)]
        dim = config.model_dim // config.num_heads
        self.no_past = (2, batch, config.num_heads, 0, dim)

    def generate(self, prompt: Tensor, new: int) -> Tensor:
        value_of = onnxruntime.OrtValue.ortvalue_from_numpy
        token = value_of(prompt.numpy())
        pasts = [value_of(np.zeros(self.no_past, np.float32)) for _ in self.past_names]
        length, tokens = 0, []
        for _ in range(new):
            count = token.shape()[1]
            feeds = dict(zip(self.past_names, pasts, strict=True))
            feeds["tokens"] = token
            feeds["positions"] = value_of(np.arange(length, length + count))
            token, *pasts = self.session.run_with_ort_values(self.outputs, feeds)
            tokens.append(token.numpy())
            length += count
        return torch.from_numpy(np.concatenate(tokens, axis=1))


class Graph:
    """tokens (B, T), positions (T) and each block's past (2, B, H, P, D) -> the likeliest (B, 1)
    and each block's past with the new tokens."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def weight(self, name: str, value: Any) -> str:
        value = value.detach().numpy() if isinstance(value, Tensor) else value
        self.weights.append(numpy_helper.from_array(np.array(value, order="C"), name))
        return name

    def node(
        self, kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any
    ) -> str:
        self.nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))
        return outputs[0]

    def norm_weights(self, name: str, norm: torch.nn.LayerNorm) -> list[str]:
        return [self.weight(f"{name}.w", norm.weight), self.weight(f"{name}.b", norm.bias)]

    def skip_norm(self, x: str, skip: str, bias: str, norm: list[str], name: str) -> list[str]:
        """[norm(x + bias + skip), x + bias + skip]"""
        outputs = [f"{name}.normed", "", "", f"{name}.sum"]
        inputs = [x, skip, *norm, bias]
        self.node("SkipLayerNormalization", inputs, outputs, FUSED, epsilon=1e-5)
        return [outputs[0], outputs[3]]

    def activate(self, x: str, bias: str, name: str) -> str:
        kind = self.model.config.activation
        if kind == "relu":
            return self.node("Relu", [self.node("Add", [x, bias], [f"{name}.z"])], [name])
        return self.node("BiasGelu" if kind == "gelu" else "FastGelu", [x, bias], [name], FUSED)

    def block(self, i: int, x: str, normed: str, next_norm: list[str]) -> list[str]:
        """[norm of the next block, the residual stream] after block i."""
        block, name = blocks_of(self.model)[i], f"block_{i}"
        qkv, projection = block.attention.qkv, block.attention.projection
        up, down = block.feed_forward.up, block.feed_forward.down
        bias = torch.zeros(len(qkv.weight)) if qkv.bias is None else qkv.bias
        attended = self.node(
            "Attention",
            [
                normed,
                self.weight(f"{name}.qkv.w", qkv.weight.T),
                self.weight(f"{name}.qkv.b", bias),
                "",
                f"past_{i}",
            ],
            [f"{name}.attended", f"present_{i}"],
            FUSED,
            num_heads=self.model.config.num_heads,
            unidirectional=1,
        )
        projected = self.product(attended, f"{name}.projection", projection)
        norm = self.norm_weights(f"{name}.norm", block.feed_forward_norm)
        bias_name = self.weight(f"{name}.projection.b", projection.bias)
        normed, x = self.skip_norm(projected, x, bias_name, norm, f"{name}.middle")
        z = self.product(normed, f"{name}.up", up)
        hidden = self.activate(z, self.weight(f"{name}.up.b", up.bias), f"{name}.hidden")
        out = self.product(hidden, f"{name}.down", down)
        bias_name = self.weight(f"{name}.down.b", down.bias)
        return self.skip_norm(out, x, bias_name, next_norm, f"{name}.end")

    def product(self, x: str, name: str, linear: torch.nn.Linear) -> str:
        return self.node("MatMul", [x, self.weight(f"{name}.w", linear.weight.T)], [f"{name}.out"])

    def build(self) -> onnx.ModelProto:
        model, config = self.model, self.model.config
        token = self.weight("token_embedding", model.token_embedding.weight)
        position = self.weight("position_embedding", model.position_embedding.weight)
        token = self.node("Gather", [token, "tokens"], ["embedded_tokens"])
        position = self.node("Gather", [position, "positions"], ["embedded_positions"])
        x = self.node("Add", [token, position], ["embedded"])
        norms = [
            self.norm_weights(f"norm_{i}", block.attention_norm)
            for i, block in enumerate(blocks_of(model))
        ]
        norms.append(self.norm_weights("final_norm", model.final_norm))
        normed = self.node("LayerNormalization", [x, *norms[0]], ["first"], epsilon=1e-5)
        for i in range(config.num_blocks):
            normed, x = self.block(i, x, normed, norms[i + 1])
        last = self.node(
            "Gather", [normed, self.weight("last", np.array(-1))], ["last_row"], axis=1
        )
        logits = self.product(last, "vocabulary", model.vocab_projection)
        bias = self.weight("vocabulary.b", model.vocab_projection.bias)
        logits = self.node("Add", [logits, bias], ["logits"])
        self.node("ArgMax", [logits], ["next"], axis=-1, keepdims=1)
        past: list[str | int | None] = [
            2, "B", config.num_heads, None, config.model_dim // config.num_heads,
        ]  # fmt: skip
        info, integer, real = helper.make_tensor_value_info, TensorProto.INT64, TensorProto.FLOAT
        blocks = range(config.num_blocks)
        graph = helper.make_graph(
            self.nodes,
            "gpt",
            [
                info("tokens", integer, ["B", "T"]),
                info("positions", integer, ["T"]),
                *(info(f"past_{i}", real, past) for i in blocks),
            ],
            [info("next", integer, ["B", 1]), *(info(f"present_{i}", real, past) for i in blocks)],
            self.weights,
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid(FUSED, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=8)
