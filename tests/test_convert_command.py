"""`gpt-ext convert`, and what can be done with what it makes, as a person uses them."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
import transformers
from architectures import NanoGPT
from shell import gpt_ext

from gpt_ext import GPT, checkpoint, pretrained
from gpt_ext.tokenizer import CharTokenizer

MODEL = dict(context_length=16, model_dim=24, num_blocks=2, num_heads=4)
LETTERS = CharTokenizer("\n abcdefghijklmnopq")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with random weights."""
    run = tmp_path / "run"
    config = {
        "model": MODEL, "vocab_size": 19, "train": {}, "data": "t", "data_sha256": ""
    }  # fmt: skip
    checkpoint.create_run(run, config, LETTERS)
    checkpoint.save_weights(run / checkpoint.BEST, GPT(19, **MODEL).state_dict())
    return run


def test_nanogpts_checkpoint_becomes_a_model_that_writes(tmp_path: Path) -> None:
    theirs = NanoGPT(19, **MODEL)
    arguments = {"n_head": 4, "dropout": 0.0}
    torch.save({"model": theirs.state_dict(), "model_args": arguments}, tmp_path / "ckpt.pt")
    (tmp_path / "letters.json").write_text(LETTERS.to_json())
    done = gpt_ext(
        "convert", tmp_path / "ckpt.pt", tmp_path / "new", "--tokenizer", tmp_path / "letters.json"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'new'}: gpt_ext, ")
    assert "activation='gelu'" in done.stdout
    written = gpt_ext("generate", tmp_path / "new", "--prompt", "abc", "--length", "20")
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith("abc")
    assert len(written.stdout) == 3 + 20 + 1
    without = gpt_ext("convert", tmp_path / "ckpt.pt", tmp_path / "bare")
    assert without.returncode == 0, without.stderr
    refused = gpt_ext("generate", tmp_path / "bare")
    assert refused.returncode == 2
    assert "bare has no tokenizer; to give it one: gpt-ext convert" in refused.stderr


def test_tokens_without_a_text_are_shown_as_such(run: Path, tmp_path: Path) -> None:
    (tmp_path / "letters.json").write_text(CharTokenizer("ab").to_json())
    new = tmp_path / "new"
    assert gpt_ext("convert", run, new, "--tokenizer", tmp_path / "letters.json").returncode == 0
    written = gpt_ext("generate", new, "--prompt", "ab", "--length", "50", "--seed", "0")
    assert written.returncode == 0, written.stderr
    assert set(written.stdout) == {"a", "b", "\ufffd", "\n"}


def test_a_run_goes_to_the_three_other_programs(run: Path, tmp_path: Path) -> None:
    for kind in ("gpt2", "onnx", "program"):
        done = gpt_ext("convert", run, tmp_path / kind, "--to", kind)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
    tokens = LETTERS.encode("a bad cafe")[None]
    with torch.no_grad():
        expected = GPT.from_pretrained(run)(tokens)
        gpt2 = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2").eval()
        program = torch.export.load(tmp_path / "program").module()
        session = onnxruntime.InferenceSession(tmp_path / "onnx")
        found = (
            gpt2(tokens).logits,
            program(tokens),
            torch.from_numpy(session.run(None, {"tokens": tokens.numpy()})[0]),
        )
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_gpt2_of_hugging_face_writes_with_its_tokenizer(tmp_path: Path) -> None:
    from gpt_ext.bpe import BPETokenizer

    tokenizer = BPETokenizer.train(iter(["the old fox and the king"] * 9), 270)
    config = transformers.GPT2Config(
        vocab_size=270, n_positions=16, n_embd=24, n_layer=1, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    written = gpt_ext("generate", tmp_path, "--prompt", "the fox", "--length", "5", "--seed", "1")
    assert written.returncode == 0, written.stderr
    model, loaded = pretrained.load(tmp_path)
    assert loaded is not None
    drawn = model.generate(
        loaded.encode("the fox")[None], 5, generator=torch.Generator().manual_seed(1)
    )
    assert written.stdout.startswith("the fox")
    assert loaded.decode(drawn[0]).startswith(written.stdout.removesuffix("\n"))


def test_errors_are_one_line_and_leave_nothing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "letters.json").write_text(CharTokenizer(LETTERS.vocabulary + "xyz").to_json())
    weights = run / checkpoint.BEST
    for arguments, message in (
        ((tmp_path / "none", tmp_path / "new"), "none does not exist"),
        ((run, run), "run exists already"),
        ((weights, tmp_path / "new"), "does not tell num_heads and activation"),
        ((weights, tmp_path / "new", "--num-heads", "5", "--activation", "relu"), "divide"),
        ((run, tmp_path / "new", "--to", "gguf"), "gguf"),
        ((run, tmp_path / "new", "--tokenizer", tmp_path / "letters.json"), "has 22 tokens, and"),
    ):
        done = gpt_ext("convert", *arguments)
        assert done.returncode == 2
        assert done.stderr.startswith("gpt-ext: error: ")
        assert done.stderr.count("\n") == 1
        assert message in done.stderr
        assert not (tmp_path / "new").exists()
