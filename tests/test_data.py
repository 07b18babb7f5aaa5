"""Text files, prepared data sets, and batches."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from corpus import sentences

from gpt_ext.data import open_dataset, random_batch, read_text, split
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


def test_the_split_is_90_to_10_in_order() -> None:
    training, validation = split(torch.arange(1000), 16)
    assert torch.equal(training, torch.arange(900))
    assert torch.equal(validation, torch.arange(900, 1000))


@pytest.mark.parametrize("context_length", [1, 16, 64])
def test_data_of_the_least_length_makes_batches_and_one_less_is_told(context_length: int) -> None:
    least = 10 * context_length + 1
    for part in split(torch.arange(least), context_length):
        x, _ = random_batch(part, 4, context_length, torch.Generator())
        assert x.shape == (4, context_length)
    with pytest.raises(UserError, match=f"{least - 1} characters, .* needs at least {least}"):
        split(torch.arange(least - 1), context_length)


def test_targets_are_the_tokens_after_and_every_place_is_drawn() -> None:
    tokens = torch.arange(20)
    x, y = random_batch(tokens, 2000, 8, torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (2000, 8)
    assert torch.equal(x + 1, y)
    assert torch.equal(x, x[:, :1] + torch.arange(8))
    assert set(x[:, 0].tolist()) == set(range(12))


def test_a_seed_gives_the_same_batches_and_goes_on_to_others() -> None:
    tokens = torch.arange(1000)
    first, second = (torch.Generator().manual_seed(1) for _ in range(2))
    x, _ = random_batch(tokens, 4, 8, first)
    assert torch.equal(x, random_batch(tokens, 4, 8, second)[0])
    assert not torch.equal(x, random_batch(tokens, 4, 8, second)[0])


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
    batches = [
        random_batch(d.training, 4, 8, torch.Generator().manual_seed(1)) for d in (file, folder)
    ]
    assert all(torch.equal(a, b) and a.dtype == torch.int64 for a, b in zip(*batches, strict=True))


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
