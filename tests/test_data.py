"""Text files."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt_ext.data import read_text
from gpt_ext.errors import UserError


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
