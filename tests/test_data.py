"""Text files, and prepared data sets."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import sentences

from gpt_ext.data import open_dataset, read_text
from gpt_ext.errors import UserError
from gpt_ext.prepare import PrepareOptions, prepare
from gpt_ext.tokenizer import CharTokenizer


def test_text_is_read_as_it_is(tmp_path: Path) -> None:
    text = "Zeile eins\r\nZeile zwei – 東京\n"
    (tmp_path / "t.txt").write_bytes(text.encode())
    assert read_text(tmp_path / "t.txt") == text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "t.txt is empty"),
        (b"text\0more", "t.txt is binary, not text: zero byte at offset 4"),
        (b"caf\xe9 au lait", "t.txt is not UTF-8 text: byte 0xe9 at offset 3"),
    ],
)
def test_what_is_no_text_is_told(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_text(tmp_path / "t.txt")


def test_missing_files_and_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(UserError, match="is a folder"):
        read_text(tmp_path)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(sentences(2000))
    prepare(PrepareOptions((str(tmp_path / "text.txt"),), str(tmp_path / "set")))
    return tmp_path / "set"


def test_a_prepared_file_is_the_file(prepared: Path) -> None:
    file, folder = open_dataset(prepared.parent / "text.txt"), open_dataset(prepared)
    text = sentences(2000)
    assert file.tokenizer.to_json() == folder.tokenizer.to_json()
    assert torch.equal(file.training, CharTokenizer.from_text(text).encode(text)[:1800])
    for part in ("training", "validation"):
        assert torch.equal(getattr(file, part), getattr(folder, part).long())
    assert file.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_data_too_short_for_a_context_is_told(prepared: Path) -> None:
    dataset = open_dataset(prepared)
    dataset.check_lengths(199)
    with pytest.raises(UserError, match=r"200 tokens for validation, .* 200 needs at least 201"):
        dataset.check_lengths(200)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 2001}, r"tokens\.bin is damaged: 4000 bytes, expected 4002"),
        ({"dtype": "uint8"}, r"manifest\.json is damaged: 'uint8'"),
        ({"sha256": {}}, r"manifest\.json is damaged: 'tokens\.bin'"),
    ],
)
def test_damage_of_a_data_set_is_told(prepared: Path, change: dict[str, Any], message: str) -> None:
    manifest = json.loads((prepared / "manifest.json").read_text())
    (prepared / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(UserError, match=message):
        open_dataset(prepared)


def test_folders_that_are_no_data_set(prepared: Path) -> None:
    with pytest.raises(UserError, match="folder without a data set; to make one: gpt-ext prepare"):
        open_dataset(prepared.parent)
    (prepared / "tokens.bin").unlink()
    with pytest.raises(UserError, match=r"manifest\.json is damaged: .*No such file"):
        open_dataset(prepared)
