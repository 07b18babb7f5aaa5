"""Tokenizers: characters, bytes, and the BPE of two libraries."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiktoken
import torch

from gpt_ext.bpe import END, BPETokenizer, Tiktoken
from gpt_ext.errors import UserError
from gpt_ext.tokenizer import (
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    from_json,
    load_tokenizer,
)

TEXT = "Grüße aus Köln,\n\t東京 und 🌍!\r\n"


def test_the_vocabulary_is_the_sorted_distinct_characters() -> None:
    tokenizer = CharTokenizer.from_text(TEXT)
    assert list(tokenizer.vocabulary) == sorted(set(TEXT))
    assert len(tokenizer) == len(set(TEXT))
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == torch.int64
    assert ids.tolist() == [sorted(set(TEXT)).index(character) for character in TEXT]


def test_decoding_undoes_encoding_also_after_json() -> None:
    tokenizer = CharTokenizer.from_text(TEXT)
    again = CharTokenizer(json.loads(json.dumps(tokenizer.vocabulary)))
    assert again.decode(tokenizer.encode(TEXT)) == TEXT
    assert again.decode([0, 0]) == 2 * min(TEXT)
    assert again.encode("").tolist() == []
    assert again.decode([]) == ""


@pytest.mark.parametrize("unknown", ["z", "\0", "€", "\U0010ffff", "\udcff"])
def test_a_character_outside_the_vocabulary_is_named_with_its_place(unknown: str) -> None:
    tokenizer = CharTokenizer.from_text(TEXT)
    with pytest.raises(ValueError, match="at position 5 ") as error:
        tokenizer.encode("Grüße"[:5] + unknown + "us?")
    assert repr(unknown) in str(error.value)


@pytest.mark.parametrize("bad", [-1, 3])
def test_an_id_outside_the_vocabulary_is_named(bad: int) -> None:
    with pytest.raises(IndexError, match=f"token id {bad} is outside the vocabulary, 0 to 2"):
        CharTokenizer("abc").decode([0, bad])


def test_vocabularies_that_are_none() -> None:
    with pytest.raises(ValueError, match="empty"):
        CharTokenizer("")
    with pytest.raises(ValueError, match="twice"):
        CharTokenizer("abca")


def all_kinds() -> dict[str, Tokenizer]:
    tokens = [bytes([i]) for i in range(256)] + [b"un", b"und", b" und"]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return {
        "characters": CharTokenizer.from_text(TEXT + END),
        "bytes": ByteTokenizer(),
        "tokenizers": BPETokenizer.train(iter([TEXT] * 5), 265),
        "tiktoken": Tiktoken("tiny", r"\s?\w+|\W", ranks, {END: 300}),
    }


@pytest.fixture(params=["characters", "bytes", "tokenizers", "tiktoken"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return all_kinds()[request.param]


def test_every_kind_encodes_and_decodes_also_after_json(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == torch.int64
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.decode(ids.tolist()) == TEXT
    again = from_json(tokenizer.to_json())
    assert torch.equal(again.encode(TEXT), ids)
    assert len(again) == len(tokenizer) > int(ids.max())
    assert again.end == tokenizer.end
    assert again.to_json() == tokenizer.to_json()
    assert [t.tolist() for t in again.encode_batch(["", TEXT])] == [[], ids.tolist()]


def test_a_stream_of_tokens_gives_whole_characters_only(tokenizer: Tokenizer) -> None:
    stream = tokenizer.stream()
    parts = [stream(token) for token in tokenizer.encode(TEXT).tolist()]
    assert "".join(parts) == TEXT
    assert len(parts) > len(TEXT) / 2


def test_a_stream_that_ends_within_a_character_ends_as_decode_does(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT).tolist()
    for count in range(len(ids) + 1):
        stream = tokenizer.stream()
        parts = [stream(token) for token in (*ids[:count], None)]
        assert "".join(parts) == tokenizer.decode(ids[:count])


def test_text_that_looks_like_the_end_of_a_text_is_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(END)
    assert tokenizer.end not in ids.tolist()
    assert tokenizer.decode(ids) == END
    if tokenizer.end is not None:
        assert tokenizer.decode([tokenizer.end]) == END


def test_ids_outside_are_named_by_every_kind(tokenizer: Tokenizer) -> None:
    for bad in (-1, len(tokenizer)):
        with pytest.raises(IndexError, match=f"token id {bad} is outside the vocabulary, 0 to "):
            tokenizer.decode([0, bad])


def test_an_id_in_a_gap_of_the_vocabulary_is_named() -> None:
    with pytest.raises(IndexError, match="token id 290 is not in tiny"):
        all_kinds()["tiktoken"].decode([290])


def test_tiktokens_own_ids() -> None:
    ours = all_kinds()["tiktoken"]
    theirs = tiktoken.Encoding(
        "tiny",
        pat_str=r"\s?\w+|\W",
        mergeable_ranks={bytes([i]): i for i in range(256)}
        | {b"un": 256, b"und": 257, b" und": 258},
        special_tokens={END: 300},
    )
    assert ours.encode(TEXT).tolist() == theirs.encode_ordinary(TEXT)
    assert 258 in ours.encode(TEXT).tolist()


def test_bytes_that_are_no_text_are_kept_and_shown_as_such() -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(b"a\xffb".decode("utf-8", "surrogateescape"))
    assert ids.tolist() == [97, 255, 98]
    assert tokenizer.decode(ids) == "a\ufffdb"


@pytest.mark.parametrize("kind", ["characters", "bytes", "tokenizers"])
def test_a_lone_surrogate_has_no_tokens(kind: str) -> None:
    with pytest.raises(ValueError, match="d800"):
        all_kinds()[kind].encode("un\ud800")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no tokenizer: Expecting value"),
        ("[]", "no tokenizer that gpt_ext knows"),
        ('{"kind": "words"}', "no tokenizer that gpt_ext knows"),
        ('{"kind": "characters"}', "holds no tokenizer: 'vocabulary'"),
        ('{"kind": "characters", "vocabulary": "aa"}', "holds a character twice"),
        ('{"kind": "tiktoken", "ranks": {"!": 1}}', "holds no tokenizer: "),
        ('{"model": {}}', "holds no tokenizer: "),
        ("\xff", "holds no tokenizer: 'utf-8' codec"),
    ],
)
def test_files_that_hold_no_tokenizer(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["tokenizers", "tiktoken"])
def test_a_library_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    content = all_kinds()[kind].to_json()
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(UserError, match=rf"package {kind}: pip install 'gpt-ext\[bpe\]'"):
        from_json(content)
