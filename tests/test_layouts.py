"""Weights of other projects give, in GPT, the logits they give at home."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from architectures import Conv1D, Course, NanoGPT, NewerCourse
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_ext import GPT

SIZES = dict(vocab_size=31, context_length=16, model_dim=24, num_blocks=3, num_heads=4)
TOKENS = torch.arange(2 * 16).reshape(2, 16) % 31
GPT2 = partial(NanoGPT, linear=Conv1D, gelu=partial(F.gelu, approximate="tanh"))

State = dict[str, Tensor]


def shaken(model: nn.Module) -> nn.Module:
    """The model with no weight at its trivial start, such as norms of ones and zeros."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    return model.eval()


def assert_same_logits(theirs: nn.Module, ours: GPT) -> None:
    with torch.no_grad():
        expected = theirs.double()(TOKENS)
        torch.testing.assert_close(ours.double().eval()(TOKENS), expected, rtol=1e-9, atol=1e-9)


CASES = {
    "course": (Course, {}),
    "newer course": (NewerCourse, {}),
    "newer course, projected": (partial(NewerCourse, projected=True), {}),
    "nanoGPT": (NanoGPT, {"activation": "gelu", "qkv_bias": True}),
    "nanoGPT without biases": (partial(NanoGPT, bias=False), {"activation": "gelu"}),
    "GPT-2": (GPT2, {"activation": "gelu_tanh", "qkv_bias": True}),
}


@pytest.mark.parametrize(("theirs", "arguments"), CASES.values(), ids=CASES.keys())
def test_logits_are_those_of_the_home_architecture(
    theirs: Callable[..., nn.Module], arguments: dict[str, Any]
) -> None:
    source = shaken(theirs(**SIZES))
    model = GPT(**SIZES, **arguments)
    result = model.load_state_dict(source.state_dict(), strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert_same_logits(source, model)


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


WRAPPERS: dict[str, Callable[[State], dict[str, Any]]] = {
    "model": lambda s: {"model": s, "step": 3},
    "model_state_dict": lambda s: {"model_state_dict": s, "epoch": 1, "loss": 0.5},
    "state_dict": lambda s: {"state_dict": s},
    "compiled": lambda s: prefixed("_orig_mod.", s),
    "parallel": lambda s: prefixed("module.", s),
    "compiled, then parallel": lambda s: prefixed("module._orig_mod.", s),
    "all at once": lambda s: {"model": {"state_dict": prefixed("_orig_mod.module.", s)}},
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
@pytest.mark.parametrize("own", [True, False], ids=["own", "course"])
def test_wrappers_and_prefixes_are_looked_through(
    wrap: Callable[[State], dict[str, Any]], own: bool
) -> None:
    source = shaken(GPT(**SIZES) if own else Course(**SIZES))
    model = GPT(**SIZES)
    model.load_state_dict(wrap(source.state_dict()))
    assert_same_logits(source, model)


def test_gpt2_as_hugging_face_stores_it_bare_and_without_the_tied_head() -> None:
    source = shaken(GPT2(**SIZES))
    state = {
        key.removeprefix("transformer."): value
        for key, value in source.state_dict().items()
        if key != "lm_head.weight"
    }
    state["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    model = GPT(**SIZES, activation="gelu_tanh", qkv_bias=True)
    model.load_state_dict(state)
    assert_same_logits(source, model)


@pytest.mark.parametrize("assign", [False, True])
def test_a_tied_head_is_copied(assign: bool) -> None:
    state = GPT2(**SIZES).state_dict()
    del state["lm_head.weight"]
    model = GPT(**SIZES, activation="gelu_tanh", qkv_bias=True)
    model.load_state_dict(state, assign=assign)
    embedding, head = model.token_embedding.weight, model.vocab_projection.weight
    assert torch.equal(embedding, head)
    assert embedding.data_ptr() != head.data_ptr()
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_a_file_without_attention_biases_loads_into_a_model_with_them_as_zeros() -> None:
    source = shaken(Course(**SIZES))
    model = GPT(**SIZES, qkv_bias=True)
    model.load_state_dict(source.state_dict())
    assert not model.blocks[0].attention.qkv.bias.any()
    assert_same_logits(source, model)


def test_the_files_tensors_stay_as_they_are() -> None:
    state = Course(**SIZES).state_dict()
    before = {key: value.clone() for key, value in state.items()}
    GPT(**SIZES).load_state_dict(state)
    assert state.keys() == before.keys()
    assert all(torch.equal(state[key], before[key]) for key in before)


@pytest.mark.parametrize("name", ["vocab_size", "context_length", "model_dim", "num_blocks"])
def test_other_sizes_are_told_as_arguments_of_gpt(name: str) -> None:
    wanted = SIZES | {name: 2 * SIZES[name]}
    with pytest.raises(RuntimeError, match=rf"wants GPT\({name}={wanted[name]}\)") as error:
        GPT(**SIZES).load_state_dict(Course(**wanted).state_dict())
    assert f"the model has ({name}={SIZES[name]})" in str(error.value)


def test_another_number_of_heads_is_told_though_the_shapes_would_fit() -> None:
    state = Course(**SIZES | {"num_heads": 2}).state_dict()
    with pytest.raises(RuntimeError, match=r"course .* wants GPT\(num_heads=2\)"):
        GPT(**SIZES).load_state_dict(state)
    nanogpt = NanoGPT(**SIZES | {"num_heads": 2}).state_dict()
    file = {"model": nanogpt, "model_args": {"n_head": 2}}
    with pytest.raises(RuntimeError, match=r"nanoGPT state dict wants GPT\(num_heads=2\)"):
        GPT(**SIZES, activation="gelu", qkv_bias=True).load_state_dict(file)


@pytest.mark.parametrize(
    ("theirs", "wanted"),
    [
        (NanoGPT, r"nanoGPT state dict wants GPT\(activation='gelu', qkv_bias=True\)"),
        (GPT2, r"GPT-2 state dict wants GPT\(activation='gelu_tanh', qkv_bias=True\)"),
    ],
)
def test_activation_and_bias_of_the_file_are_asked_for(
    theirs: Callable[..., nn.Module], wanted: str
) -> None:
    with pytest.raises(RuntimeError, match=wanted):
        GPT(**SIZES).load_state_dict(theirs(**SIZES).state_dict())


@pytest.mark.parametrize(
    ("theirs", "lost", "layout"),
    [
        (Course, "transformer_blocks.1.mhsa.compute.bias", r"course \(mhsa"),
        (Course, "transformer_blocks.0.mhsa.attention_heads.2.key_layer.weight", r"course \(mhsa"),
        (NewerCourse, "word_embeddings.weight", r"newer course \(att_heads"),
        (
            partial(NewerCourse, projected=True),
            "transformer_blocks.2.attention.output_proj.weight",
            "newer course with output_proj",
        ),
        (NanoGPT, "transformer.h.1.mlp.c_fc.weight", "nanoGPT"),
        (GPT2, "transformer.h.1.mlp.c_fc.bias", "GPT-2"),
        (GPT, "final_norm.bias", "gpt_ext"),
    ],
)
def test_a_missing_key_is_named_with_the_closest_layout(
    theirs: Callable[..., nn.Module], lost: str, layout: str
) -> None:
    state = theirs(**SIZES).state_dict()
    del state[lost]
    lost = lost.removeprefix("transformer.").replace(".", r"\.")
    with pytest.raises(
        RuntimeError, match=rf"closest is {layout}.*1 missing \({lost}\) and none unexpected"
    ):
        GPT(**SIZES).load_state_dict(state)


def test_unexpected_keys_are_named_and_strict_false_lets_them_pass() -> None:
    model = GPT(**SIZES)
    state = model.state_dict() | {"blocks.0.attention.rotary": torch.zeros(1)}
    with pytest.raises(RuntimeError, match=r"1 unexpected \(blocks\.0\.attention\.rotary\)"):
        model.load_state_dict(state)
    result = model.load_state_dict(state, strict=False)
    assert result.unexpected_keys == ["blocks.0.attention.rotary"]


def test_long_lists_of_keys_are_cut() -> None:
    with pytest.raises(RuntimeError, match=r"closest is .*missing.*, \.\.\.\)") as error:
        GPT(**SIZES).load_state_dict({})
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("file", [[1, 2], {"model": 3}, {"weights": "none"}])
def test_what_is_no_state_dict_is_refused(file: Any) -> None:
    with pytest.raises(TypeError, match="expected a state dict"):
        GPT(**SIZES).load_state_dict(file)


def test_another_width_inside_the_feed_forward_network_is_told() -> None:
    state = GPT(**SIZES).state_dict()
    state["blocks.0.feed_forward.up.weight"] = torch.zeros(48, 24)
    with pytest.raises(RuntimeError, match=r"feed_forward\.up\.weight.*\[48, 24\]"):
        GPT(**SIZES).load_state_dict(state)
