"""The files of a run are whole or absent, and damage is told."""

from __future__ import annotations

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt_ext import GPT, checkpoint
from gpt_ext.errors import UserError
from gpt_ext.tokenizer import CharTokenizer

MODEL = dict(context_length=8, model_dim=8, num_blocks=1, num_heads=2)
CONFIG = {"model": MODEL, "vocab_size": 5, "train": {}, "data": "t", "data_sha256": ""}
TOKENIZER = CharTokenizer("\n abc")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with weights, best and last alike."""
    run = tmp_path / "run"
    checkpoint.create_run(run, CONFIG, TOKENIZER)
    model = GPT(5, **MODEL)
    checkpoint.save_weights(run / checkpoint.BEST, model.state_dict())
    checkpoint.save_weights(run / checkpoint.LAST, model.state_dict())
    return run


def test_a_saved_model_comes_back_with_its_vocabulary(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    checkpoint.create_run(run, CONFIG, TOKENIZER)
    model = GPT(5, **MODEL).eval()
    checkpoint.save_weights(run / checkpoint.BEST, model.state_dict())
    loaded, tokenizer = checkpoint.load_run(run)
    tokens = torch.arange(5)[None]
    assert torch.equal(loaded(tokens), model(tokens))
    assert tokenizer.to_json() == TOKENIZER.to_json()
    assert not loaded.training


def test_the_best_weights_are_preferred_to_the_last(run: Path) -> None:
    best, last = GPT(5, **MODEL), GPT(5, **MODEL)
    checkpoint.save_weights(run / checkpoint.BEST, best.state_dict())
    checkpoint.save_weights(run / checkpoint.LAST, last.state_dict())
    assert torch.equal(checkpoint.load_run(run)[0].final_norm.weight, best.final_norm.weight)
    assert torch.equal(
        checkpoint.load_run(run)[0].token_embedding.weight, best.token_embedding.weight
    )
    (run / checkpoint.BEST).unlink()
    assert torch.equal(
        checkpoint.load_run(run)[0].token_embedding.weight, last.token_embedding.weight
    )


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_on_a_full_disk_the_old_file_stays_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    checkpoint.write_whole(path, b"old")
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(UserError, match=r"cannot write .*file: No space left on device"):
        checkpoint.write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_line_that_was_cut_off_with_the_power_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    checkpoint.append_line(path, {"step": 1})
    with open(path, "a") as file:
        file.write('{"step": 2')
    assert checkpoint.read_lines(path) == [{"step": 1}]
    path.write_text('{"step"\n{"step": 2}\n')
    with pytest.raises(UserError, match="lines is damaged"):
        checkpoint.read_lines(path)


def test_a_file_left_half_written_by_a_killed_program_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "file"
    (tmp_path / ".file.tmp").write_bytes(b"half of a much longer fi")
    checkpoint.write_whole(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_for_a_run_that_could_not_begin_is_taken_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.create_run(tmp_path / "run", CONFIG, TOKENIZER)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_run_is_not_overwritten(run: Path) -> None:
    with pytest.raises(UserError, match=r"exists already; .* gpt-ext train --resume"):
        checkpoint.create_run(run, CONFIG, TOKENIZER)
    (run / "file").touch()
    with pytest.raises(UserError, match="exists already"):
        checkpoint.create_run(run / "file", CONFIG, TOKENIZER)


def test_an_empty_folder_may_become_a_run(tmp_path: Path) -> None:
    checkpoint.create_run(tmp_path, CONFIG, TOKENIZER)
    assert checkpoint.read_config(tmp_path)["vocab_size"] == 5


def test_lines_are_added_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    checkpoint.append_line(path, {"step": 1})
    checkpoint.append_line(path, {"step": 2})
    assert checkpoint.read_lines(path) == [{"step": 1}, {"step": 2}]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*metrics\.jsonl: File too large"):
            checkpoint.append_line(path, {"step": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.read_lines(path) == [{"step": 1}, {"step": 2}]


Damage = Callable[[Path], None]


def cut(name: str, size: int) -> Damage:
    return lambda run: os.truncate(run / name, size)


def put(name: str, content: str) -> Damage:
    return lambda run: (run / name).write_text(content) and None


def other_shape(run: Path) -> None:
    wide = GPT(5, **MODEL | {"model_dim": 16})
    checkpoint.save_weights(run / checkpoint.BEST, wide.state_dict())


def without_weights(run: Path) -> None:
    (run / checkpoint.BEST).unlink()
    (run / checkpoint.LAST).unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("best.safetensors", 1000), "best.safetensors is damaged"),
        (cut("best.safetensors", 3), "best.safetensors is damaged"),
        (cut("best.safetensors", 0), "best.safetensors is damaged"),
        (other_shape, r"best.safetensors does not fit .*wants GPT\(model_dim=16\)"),
        (cut("config.json", 40), "config.json is damaged"),
        (cut("config.json", 0), "config.json is damaged"),
        (put("config.json", "[]"), "config.json is damaged"),
        (put("config.json", "{}"), "config.json is damaged"),
        (
            put("config.json", "\udcff".encode("utf-8", "surrogatepass").decode("latin-1")),
            "damaged",
        ),
        (put("config.json", json.dumps(CONFIG | {"vocab_size": "5"})), "config.json is damaged"),
        (put("tokenizer.json", '{"kind": "characters", "vocabulary": "aa"}'), "twice"),
        (lambda run: (run / "tokenizer.json").unlink(), "tokenizer.json can't be read"),
        (put("config.json", json.dumps(CONFIG | {"model": MODEL | {"num_heads": 3}})), "divide"),
        (put("config.json", json.dumps(CONFIG | {"model": MODEL | {"wings": 2}})), "wings"),
        (without_weights, "holds no checkpoint"),
    ],
)
def test_damage_is_told_with_the_file(run: Path, damage: Damage, message: str) -> None:
    damage(run)
    with pytest.raises(UserError, match=message):
        checkpoint.load_run(run)


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="is no run"):
            checkpoint.load_run(path)
    GPT(5, **MODEL).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is no run: it holds a model alone"):
        checkpoint.load_run(tmp_path)
