"""Models in files of other projects and of ours: in and out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import Course, NanoGPT
from foreign import SIZES, assert_same_logits, hugging_face, logits, shaken
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from gpt_ext import GPT, GPTConfig, gpt2
from gpt_ext.bpe import BPETokenizer
from gpt_ext.errors import UserError
from gpt_ext.tokenizer import CharTokenizer, load_tokenizer

# In


@pytest.mark.parametrize(
    ("options", "activation"),
    [
        ({}, "gelu_tanh"),
        ({"activation_function": "gelu_pytorch_tanh"}, "gelu_tanh"),
        ({"activation_function": "gelu"}, "gelu"),
        ({"activation_function": "relu"}, "relu"),
        ({"tie_word_embeddings": False}, "gelu_tanh"),
    ],
)
def test_a_gpt2_of_hugging_face_has_its_logits(
    tmp_path: Path, options: dict[str, Any], activation: str
) -> None:
    theirs = hugging_face(**options)
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    assert ours.config == GPTConfig(
        **SIZES,
        dropout=0.25,
        activation=activation,
        qkv_bias=True,  # type: ignore[arg-type]
    )
    assert not ours.training
    assert_same_logits(ours, theirs)


def as_shards(model: GPT2LMHeadModel, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size="20KB")
    assert len([*folder.glob("model-*.safetensors")]) > 2


def without_prefix(model: GPT2LMHeadModel, folder: Path) -> None:
    model.transformer.save_pretrained(folder)
    assert "wte.weight" in load_file(folder / "model.safetensors")


def as_bin(model: GPT2LMHeadModel, folder: Path) -> None:
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


@pytest.mark.parametrize("save", [as_shards, without_prefix, as_bin])
def test_in_each_of_its_files(
    tmp_path: Path, save: Callable[[GPT2LMHeadModel, Path], None]
) -> None:
    theirs = hugging_face()
    save(theirs, tmp_path)
    assert_same_logits(GPT.from_pretrained(tmp_path), theirs)


def test_it_writes_what_it_writes_at_home(tmp_path: Path) -> None:
    theirs = hugging_face(bos_token_id=0, eos_token_id=None)
    theirs.save_pretrained(tmp_path)
    prompt = torch.tensor([[3, 1, 4]])
    text = theirs.generate(prompt, max_new_tokens=13, do_sample=False, pad_token_id=0)
    ours = GPT.from_pretrained(tmp_path).generate(prompt, 13, temperature=0)
    assert torch.equal(ours, text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "silu"}, "activation_function is 'silu', expected one of relu, "),
        ({"n_inner": 50}, "n_inner is 50, and GPT has 4 n_embd"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06, and GPT computes 1e-05"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False, and GPT computes True"),
        ({"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx is True, and GPT computes"),
        ({"add_cross_attention": True}, "add_cross_attention is True, and GPT computes False"),
        ({"model_type": "llama"}, "is of model_type 'llama', expected gpt_ext or gpt2"),
        ({"n_head": 5}, "num_heads must divide model_dim"),
        ({"n_layer": 2}, "wants GPT\\(num_blocks=3\\), the model has \\(num_blocks=2\\)"),
    ],
)
def test_another_architecture_is_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    hugging_face().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=message):
        GPT.from_pretrained(tmp_path)


def test_nanogpts_checkpoint_tells_all_of_its_model(tmp_path: Path) -> None:
    theirs = shaken(NanoGPT(**SIZES, bias=False))
    arguments = dict(n_layer=3, n_head=4, n_embd=24, block_size=16, bias=False, vocab_size=20)
    optimizer = torch.optim.AdamW(theirs.parameters())
    checkpoint = {
        "model": {f"_orig_mod.{key}": value for key, value in theirs.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": arguments | {"dropout": 0.1},
        "iter_num": 2000,
        "best_val_loss": torch.tensor(1.5),
        "config": {"out_dir": "out", "learning_rate": 1e-3, "compile": True},
    }
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    ours = GPT.from_pretrained(tmp_path / "ckpt.pt")
    assert ours.config == GPTConfig(**SIZES, dropout=0.1, activation="gelu", qkv_bias=False)
    assert_same_logits(ours, theirs)


def test_the_courses_weights_tell_all_of_their_model(tmp_path: Path) -> None:
    theirs = shaken(Course(**SIZES))
    torch.save(theirs.state_dict(), tmp_path / "weights.pt")
    assert_same_logits(GPT.from_pretrained(tmp_path / "weights.pt"), theirs)


def test_what_a_file_does_not_tell_is_asked_for(tmp_path: Path) -> None:
    theirs = shaken(GPT(**SIZES, activation="gelu"))
    save_file(theirs.state_dict(), tmp_path / "ours.safetensors")
    with pytest.raises(
        UserError, match="gpt_ext state dict does not tell num_heads and activation"
    ):
        GPT.from_pretrained(tmp_path / "ours.safetensors")
    ours = GPT.from_pretrained(tmp_path / "ours.safetensors", num_heads=4, activation="gelu")
    assert torch.equal(logits(ours), logits(theirs))


# Out


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_a_saved_model_comes_back(tmp_path: Path, activation: Any, qkv_bias: bool) -> None:
    model = shaken(GPT(**SIZES, activation=activation, qkv_bias=qkv_bias, dropout=0.5))
    tokenizer = CharTokenizer("abcdefghijklmnopqrst")
    model.save_pretrained(tmp_path / "new/folder", tokenizer)
    again = GPT.from_pretrained(tmp_path / "new/folder")
    assert again.config == model.config
    assert torch.equal(logits(again), logits(model))
    assert load_tokenizer(tmp_path / "new/folder").to_json() == tokenizer.to_json()
    stored = load_file(tmp_path / "new/folder/model.safetensors")
    assert stored.keys() == model.state_dict().keys()


def test_a_folder_is_not_contradicted_but_in_dropout(tmp_path: Path) -> None:
    GPT(**SIZES, dropout=0.5).save_pretrained(tmp_path / "ours")
    hugging_face().save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        assert GPT.from_pretrained(folder, dropout=0.75, num_blocks=3).config.dropout == 0.75
        with pytest.raises(UserError, match=r"config\.json says that num_blocks is 3, got 7"):
            GPT.from_pretrained(folder, num_blocks=7)


def test_a_model_with_shared_weights_comes_back(tmp_path: Path) -> None:
    model = shaken(GPT(**SIZES))
    model.vocab_projection.weight, model.blocks[1] = model.token_embedding.weight, model.blocks[0]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(GPT.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize("save", [GPT.save_pretrained, gpt2.save])
def test_an_eps_that_no_file_tells_is_refused(tmp_path: Path, save: Any) -> None:
    model = GPT(**SIZES)
    model.blocks[1].feed_forward_norm.eps = 0.1
    with pytest.raises(UserError, match=r"blocks\.1\.feed_forward_norm\.eps is 0\.1"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_transformers_loads_what_goes_out_as_a_gpt2(
    tmp_path: Path, activation: Any, qkv_bias: bool
) -> None:
    model = shaken(GPT(**SIZES, activation=activation, qkv_bias=qkv_bias))
    gpt2.save(model, tmp_path)
    theirs, told = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(told.values())
    assert_same_logits(theirs.eval(), model)
    assert_same_logits(GPT.from_pretrained(tmp_path), theirs, exact=model)


def test_what_came_in_as_a_gpt2_goes_out_as_one(tmp_path: Path) -> None:
    source = hugging_face()
    source.save_pretrained(tmp_path / "in")
    gpt2.save(GPT.from_pretrained(tmp_path / "in"), tmp_path / "out")
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(theirs.eval()), logits(source))


def test_a_bias_of_the_vocabulary_that_a_gpt2_cannot_have_is_refused(tmp_path: Path) -> None:
    model = shaken(GPT(**SIZES | {"vocab_size": 25}))  # one more than the width
    with pytest.raises(UserError, match=r"final norm's 24: .* hold vocab_projection\.bias at zero"):
        gpt2.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with torch.no_grad():
        model.vocab_projection.bias.zero_()
    gpt2.save(model, tmp_path / "out")
    assert_same_logits(GPT2LMHeadModel.from_pretrained(tmp_path / "out").eval(), model)


def test_transformers_loads_the_tokenizer_too(tmp_path: Path) -> None:
    tokenizer = BPETokenizer.train(iter(["the old fox and the king"] * 9), 270)
    gpt2.save(shaken(GPT(**SIZES | {"vocab_size": 270, "model_dim": 272})), tmp_path, tokenizer)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs("the king sees")["input_ids"] == tokenizer.encode("the king sees").tolist()


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot make .*file/in: Not a directory"):
        GPT(**SIZES).save_pretrained(tmp_path / "file/in")


def test_the_hub_is_given_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    pushed: dict[str, Any] = {}

    def create_repo(self: HfApi, repo_id: str, **options: Any) -> Any:
        pushed["private"] = options["private"]
        return type("Repository", (), {"repo_id": repo_id})

    def upload_folder(self: HfApi, *, repo_id: str, folder_path: Any, **options: Any) -> str:
        folder = Path(folder_path)
        pushed["names"] = sorted(path.name for path in folder.iterdir())
        pushed["model"] = GPT.from_pretrained(folder)
        return f"hub/{repo_id}"

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    model = shaken(GPT(**SIZES))
    assert model.push_to_hub("somebody/small", private=True) == "hub/somebody/small"
    assert pushed["private"] is True
    assert pushed["names"] == ["README.md", "config.json", "model.safetensors"]
    assert torch.equal(logits(pushed["model"]), logits(model))


def test_the_hubs_package_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"huggingface_hub: pip install 'gpt-ext\[hub\]'"):
        GPT(**SIZES).push_to_hub("somebody/small")
