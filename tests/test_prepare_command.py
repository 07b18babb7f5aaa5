"""`gpt-ext prepare` as a person uses it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from corpus import sentences
from shell import assert_one_error, gpt_ext

from gpt_ext.data import open_dataset


def test_prepare_tells_what_it_made(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.txt").write_text(sentences(20_000))
    (tmp_path / "in/b.jsonl").write_text(json.dumps({"text": "a red fox"}))
    out = tmp_path / "out"
    result = gpt_ext(
        "prepare", tmp_path / "in", "--out", out, "--tokenizer", "bpe", "--vocab-size", "300"
    )
    assert result.returncode == 0, result.stderr
    tokens = sum(len(part) for part in (open_dataset(out).training, open_dataset(out).validation))
    assert result.stdout == (
        f"20,021 bytes of 2 files: {tokens:,} tokens of a vocabulary of 300\n"
        f"done; to train on it: gpt-ext train --data {out} --out RUN\n"
    )
    assert result.stderr == ""


def test_stdin_is_an_input_and_after_ctrl_c_the_same_command_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "gpt_ext", "prepare", "-", "--out", str(out)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes) as process:
        while not (out / "stdin.tmp").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate()
    assert (process.returncode, stderr) == (130, b"")
    assert stdout == b"stopped; the same command goes on\n"
    text = sentences(3000) + "東京"
    done = subprocess.run(command, input=text.encode(), capture_output=True)
    assert done.returncode == 0, done.stderr
    dataset = open_dataset(out)
    ids = [*dataset.training.tolist(), *dataset.validation.tolist()]
    assert dataset.tokenizer.decode(ids) == text
    assert not [*out.glob("stdin*")]


@pytest.mark.parametrize("replacement", ["?", "1", "~"])
def test_replacement_may_be_any_character(tmp_path: Path, replacement: str) -> None:
    (tmp_path / "t.txt").write_bytes(b"caf\xe9 au lait")
    out = tmp_path / "out"
    result = gpt_ext("prepare", tmp_path / "t.txt", "--out", out, "--replacement", replacement)
    assert result.returncode == 0, result.stderr
    tokenizer = open_dataset(out).tokenizer
    assert replacement in tokenizer.decode(range(len(tokenizer)))


def test_json_beyond_the_parsers_depth_is_told(tmp_path: Path) -> None:
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    result = gpt_ext("prepare", tmp_path / "deep.jsonl", "--out", tmp_path / "x")
    assert_one_error(result, "deep.jsonl:1: not JSON: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("t.txt",), "out"),
        (("--out", "x"), "inputs"),
        (("t.txt", "--out", "x"), "t.txt:2:3: byte 0xe9 is not UTF-8 text"),
        (("t.txt", "--out", "x", "--vocab-size", "many"), "vocab_size"),
    ],
)
def test_errors_are_one_line(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    (tmp_path / "t.txt").write_bytes(b"text\nca\xe9")
    result = gpt_ext(
        "prepare", *(str(tmp_path / a) if "." in a or a == "x" else a for a in arguments)
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("gpt-ext: error: ")
    assert message in result.stderr


def test_a_model_learns_from_what_was_prepared_and_writes(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(sentences(20_000) + "東京")
    steps = (
        ("prepare", tmp_path / "t.txt", "--out", tmp_path / "set", "--tokenizer", "bpe",
         "--vocab-size", "280"),
        ("train", "--data", tmp_path / "set", "--out", tmp_path / "run", "--steps", "4",
         "--context-length", "16", "--model-dim", "16", "--num-blocks", "1", "--num-heads", "2",
         "--batch-size", "4", "--eval-batches", "2", "--warmup-steps", "2"),
        ("generate", tmp_path / "run", "--prompt", "the 東", "--length", "8"),
    )  # fmt: skip
    for arguments in steps:
        result = gpt_ext(*arguments)
        assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("the 東")
