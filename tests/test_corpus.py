"""Files of text, read in pieces."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from corpus import mixed, written

from gpt_ext.corpus import Source, pieces


@pytest.mark.parametrize(
    ("text", "most"),
    [
        (mixed(400_000), 40_000),
        ("漢字かな、交じり。\n" * 30_000, 40_000),  # cut at line ends alone
        ("…" * 3_000_000, 1_200_000),  # cut anywhere
        ("x", 1),
        ("", 0),
    ],
    ids=["mixed", "lines", "nowhere to cut", "short", "empty"],
)
def test_pieces_join_to_the_text_from_wherever_one_ended(
    tmp_path: Path, text: str, most: int
) -> None:
    source = Source(written(tmp_path / "t.txt", text), jsonl=False, text_key="", line_end="")
    found = [*pieces(source)]
    assert "".join(piece.text for piece in found) == text
    assert max((len(piece.text) for piece in found), default=0) <= most
    assert [piece.ends for piece in found] == [False] * (len(found) - 1) + [True] * bool(text)
    raw = text.encode()
    for before, piece in list(pairwise(found))[::7]:
        assert raw[before.offset :].startswith(piece.text.encode())
        head = raw[: before.offset].decode()
        assert piece.line == head.count("\n") + 1
        assert piece.column == len(head) - head.rfind("\n")
        assert next(pieces(source, before.offset)).text[:1000] == piece.text[:1000]
