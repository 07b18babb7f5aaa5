"""The character vocabulary."""

from __future__ import annotations

import json

import pytest
import torch

from gpt_ext.tokenizer import CharTokenizer

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
