"""The inference graph in other programs: torch.export's and ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from compare import assert_as_good_as_torch
from torch import Tensor

from gpt_ext import GPT, export
from gpt_ext.errors import UserError

SIZES = dict(vocab_size=31, context_length=16, model_dim=24, num_blocks=2, num_heads=4)
SHAPES = [(1, 1), (3, 2), (2, 16)]


def tokens(batch: int, time: int) -> Tensor:
    return torch.arange(batch * time).reshape(batch, time) * 7 % 31


@pytest.fixture(
    params=[("relu", False), ("gelu", True), ("gelu_tanh", True)],
    ids=lambda parameter: parameter[0],
)
def model(request: pytest.FixtureRequest) -> GPT:
    activation, qkv_bias = request.param
    model = GPT(**SIZES, activation=activation, qkv_bias=qkv_bias)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return model


def assert_same_logits(model: GPT, shape: tuple[int, int], exported: Tensor) -> None:
    """The exported graph's against the model's own, by the tolerance rule."""
    model.eval()
    with torch.no_grad():
        native = model(tokens(*shape))
        exact = model.double()(tokens(*shape))
        model.float()
    assert_as_good_as_torch(["logits"], [exported], [native], [exact])


def test_the_program_is_of_pytorchs_own_ops_and_has_the_models_logits(model: GPT) -> None:
    program = export.export_program(model)
    assert model.training
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called
    assert [name for name in called if "gpt_ext" in name] == []
    for shape in SHAPES:
        with torch.no_grad():
            assert_same_logits(model, shape, program.module()(tokens(*shape)))


def test_a_context_of_one_token_is_exported_too() -> None:
    model = GPT(vocab_size=31, context_length=1, model_dim=24, num_blocks=1, num_heads=4)
    exported = export.export_program(model).module()(tokens(3, 1))
    assert_same_logits(model, (3, 1), exported)


def test_modes_are_as_before(model: GPT) -> None:
    model.blocks[0].eval()
    export.export_program(model)
    assert [module.training for module in (model, *model.blocks)] == [True, False, True]


def test_what_a_graph_would_not_have_is_refused(model: GPT) -> None:
    model.blocks[0].register_forward_hook(lambda *arguments: arguments[-1] * 2)
    with pytest.raises(UserError, match=r"but blocks\[0\] is no plain Block"):
        export.export_program(model)


def test_a_program_without_gpt_ext_loads_the_file(tmp_path: Path) -> None:
    model = GPT(**SIZES).eval()
    export.save_program(model, tmp_path / "gpt.pt2")
    code = (
        "import sys; sys.modules['gpt_ext'] = None; import torch\n"
        f"program = torch.export.load({str(tmp_path / 'gpt.pt2')!r})\n"
        "tokens = torch.arange(32).reshape(2, 16) * 7 % 31\n"
        f"torch.save(program.module()(tokens).detach(), {str(tmp_path / 'logits')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same_logits(model, (2, 16), torch.load(tmp_path / "logits", weights_only=True))


def test_onnx_runtime_has_the_models_logits(model: GPT, tmp_path: Path) -> None:
    export.save_onnx(model, tmp_path / "gpt.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["gpt.onnx"]
    session = onnxruntime.InferenceSession(tmp_path / "gpt.onnx")
    assert [each.name for each in session.get_inputs()] == ["tokens"]
    assert [each.name for each in session.get_outputs()] == ["logits"]
    for shape in SHAPES:
        found = session.run(["logits"], {"tokens": tokens(*shape).numpy()})[0]
        assert_same_logits(model, shape, torch.from_numpy(found))


def test_what_onnx_cannot_do_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large: Any = GPT(**SIZES)
    monkeypatch.setattr(export, "ONNX_LIMIT", 1000)
    with pytest.raises(UserError, match=r"holds up to 2 GiB, and the weights take [\d,]+ bytes"):
        export.save_onnx(large, tmp_path / "gpt.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"onnxscript: pip install 'gpt-ext\[onnx\]'"):
        export.save_onnx(large, tmp_path / "gpt.onnx")
    assert not [*tmp_path.iterdir()]
