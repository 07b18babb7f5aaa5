"""Going on with a data set after a kill, an error, a full disk, and where that is refused."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import child
import pytest
from corpus import mixed, sentences, written
from prepared import all_tokens, made

from gpt_ext import corpus
from gpt_ext import prepare as module
from gpt_ext.data import open_dataset
from gpt_ext.errors import UserError
from gpt_ext.prepare import PrepareOptions, prepare


def die_at(call: int, inputs: list[str], out: str, options: dict[str, Any]) -> None:
    """In a child: prepares, and is killed at the call-th time that something is made to last."""
    calls = iter(range(call))
    fsync: Callable[[int], None] = os.fsync

    def dying(descriptor: int) -> None:
        if next(calls, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = dying
    module.SAVE_EVERY, corpus.BATCH = 1 << 16, 1 << 15
    prepare(PrepareOptions(tuple(inputs), out, **options))


@pytest.mark.parametrize("tokenizer", ["characters", "bpe"])
def test_a_killed_one_goes_on_to_the_same_data_set(tmp_path: Path, tokenizer: str) -> None:
    files = [written(tmp_path / f"{n}.txt", mixed(300_000) + str(n)) for n in range(2)]
    options = {"tokenizer": tokenizer, "vocab_size": 300}
    whole = made(tmp_path, *files, **options)
    out, far = tmp_path / "killed", []
    for call in (*range(4), *[4] * 20):  # each goes on from what the one before left
        process = child.SERVER.Process(
            target=die_at, args=(call, [*map(str, files)], str(out), options)
        )
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        if (out / "unfinished.json").exists():
            work = json.loads((out / "unfinished.json").read_text())
            far.append((len(work["inputs"]), work["source"], work["tokens"]))
    assert far == sorted(far)
    assert len({tokens for _, _, tokens in far}) > 3
    killed = open_dataset(out)
    assert killed.sha256 == whole.sha256
    assert killed.tokenizer.to_json() == whole.tokenizer.to_json()


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """The input of a data set that stopped at its second file, which is no text."""
    written(tmp_path / "in/a.txt", sentences(1000))
    (tmp_path / "in/b.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="not UTF-8"):
        made(tmp_path, tmp_path / "in")
    return tmp_path / "in"


def test_going_on_after_an_error_was_put_right(tmp_path: Path, unfinished: Path) -> None:
    written(unfinished / "b.txt", "put right.")
    assert len(all_tokens(made(tmp_path, unfinished))) == 1010


def test_going_on_with_other_options_or_other_inputs_is_refused(
    tmp_path: Path, unfinished: Path
) -> None:
    with pytest.raises(UserError, match="was begun with tokenizer 'characters', not 'bytes'"):
        made(tmp_path, unfinished, tokenizer="bytes")
    written(unfinished / "a.txt", sentences(1001))
    with pytest.raises(UserError, match=r"the inputs have changed since .*out was begun"):
        made(tmp_path, unfinished)


def test_once_all_are_surveyed_no_other_file_joins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(tmp_path / "in/a.txt", sentences(1000))
    with monkeypatch.context() as patch:
        patch.setattr(module, "encoded", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            made(tmp_path, tmp_path / "in")
    added = written(tmp_path / "in/b.txt", sentences(1000))
    with pytest.raises(UserError, match=r"the inputs have changed since .*out was begun"):
        made(tmp_path, tmp_path / "in")
    added.unlink()
    assert len(all_tokens(made(tmp_path, tmp_path / "in"))) == 1000


def test_a_call_that_came_to_nothing_binds_no_later_one(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    made(tmp_path, written(tmp_path / "abc.txt", "abc" * 99))
    (tmp_path / "out").rename(tokenizer)
    file = written(tmp_path / "t.txt", "abcd" * 99)
    with pytest.raises(UserError, match="--replacement C writes C"):
        made(tmp_path, file, tokenizer=str(tokenizer))
    dataset = made(tmp_path, file, tokenizer=str(tokenizer), replacement="a")
    assert dataset.tokenizer.decode(all_tokens(dataset)) == "abca" * 99


def test_going_on_after_the_disk_was_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(tmp_path / "t.txt", sentences(200_000))
    monkeypatch.setattr(corpus, "BATCH", 1 << 15)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot make .*out: File too large"):
            made(tmp_path, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dataset = made(tmp_path, file)
    assert dataset.tokenizer.decode(all_tokens(dataset)) == sentences(200_000)
