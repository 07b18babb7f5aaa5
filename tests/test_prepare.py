"""Files of text become a data set: its tokens, errors, and memory."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import child
import pytest
import tiktoken
import tokenizers
import torch
from corpus import SCRIPTS, mixed, sentences, written
from memory import peak_growth
from prepared import all_tokens, made
from tiktoken_ext import openai_public

from gpt_ext import prepare as module
from gpt_ext import progress
from gpt_ext.bpe import END
from gpt_ext.data import open_dataset
from gpt_ext.errors import UserError
from gpt_ext.prepare import PrepareOptions, prepare
from gpt_ext.tokenizer import CharTokenizer, load_tokenizer


def test_a_file_becomes_its_characters_mapped_from_a_file_and_split(tmp_path: Path) -> None:
    text = mixed(200_000)
    dataset = made(tmp_path, written(tmp_path / "a.txt", text))
    expected = CharTokenizer.from_text(text)
    assert dataset.tokenizer.to_json() == expected.to_json()
    assert dataset.training.dtype == torch.uint16
    assert (len(dataset.training), len(dataset.validation)) == (180_000, 20_000)
    assert torch.equal(all_tokens(dataset), expected.encode(text))
    again = open_dataset(tmp_path / "out")
    assert again.sha256 == dataset.sha256
    assert torch.equal(again.validation, dataset.validation)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "tokens.bin", "tokenizer.json", "manifest.json",
    }  # fmt: skip


def test_the_manifest_has_the_hashes_of_what_went_in_and_what_came_out(tmp_path: Path) -> None:
    files = [written(tmp_path / name, sentences(5000) + name) for name in ("a.txt", "b.txt")]
    dataset = made(tmp_path, *files, validation=0.25)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())

    def sha256(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    assert [(i["path"], i["bytes"], i["sha256"]) for i in manifest["inputs"]] == [
        (str(file), file.stat().st_size, sha256(file)) for file in files
    ]
    assert manifest["sha256"] == {
        name: sha256(tmp_path / "out" / name) for name in ("tokens.bin", "tokenizer.json")
    }
    assert manifest["tokens"] == 10_010
    assert len(dataset.validation) == round(10_010 / 4)
    assert dataset.sha256 == manifest["sha256"]["tokens.bin"]


def test_folders_json_lines_and_stdin_follow_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("in/b.txt", "in/a/z.txt", "in/.hidden"):
        written(tmp_path / name, f"<{name}>") if "z" not in name else None
    (tmp_path / "in/a").mkdir()
    written(tmp_path / "in/a/z.txt", "<z>")
    records = [{"text": "one\nü"}, {"text": "two", "id": 3}]
    written(tmp_path / "in/c.jsonl", "\n".join(map(json.dumps, records)) + "\n\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from stdin")))
    dataset = made(tmp_path, tmp_path / "in", "-", tokenizer="bytes")
    text = "<z><in/b.txt>one\nü\ntwo\nfrom stdin"
    assert bytes(all_tokens(dataset).tolist()).decode() == text
    assert not (tmp_path / "out/stdin.txt").exists()


def test_json_lines_under_another_key_and_name(tmp_path: Path) -> None:
    file = written(tmp_path / "records", '{"body": "ab"}\n{"body": "ba"}')
    dataset = made(tmp_path, file, form="jsonl", text_key="body", validation=0.5)
    assert dataset.tokenizer.decode(all_tokens(dataset)) == "ab\nba\n"


def test_a_learned_vocabulary_gives_the_tokens_of_the_whole_text(tmp_path: Path) -> None:
    text = mixed(300_000)
    files = [written(tmp_path / "a.txt", text), written(tmp_path / "b.jsonl", '{"text": "the"}')]
    dataset = made(tmp_path, *files, tokenizer="bpe", vocab_size=500)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    end = library.token_to_id(END)
    expected = [*library.encode(text).ids, end, *library.encode("the").ids, end]
    assert all_tokens(dataset).tolist() == expected
    assert len(dataset.tokenizer) == library.get_vocab_size() == 500
    assert len(expected) < len(text) / 2
    assert dataset.tokenizer.decode(expected) == f"{text}{END}the{END}"


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_a_vocabulary_of_tiktoken_gives_the_tokens_of_the_whole_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    # The pattern and the special tokens are tiktoken's, the tokens bytes and a few of their pairs.
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" t", b" the", b"ed", b"\n\n"]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    for loader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):
        monkeypatch.setattr(openai_public, loader, lambda *_, **__: ranks)
    parts = getattr(openai_public, name)() | {"explicit_n_vocab": None}
    small = tiktoken.Encoding(**parts)
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, name, small)
    text = mixed(200_000) + END
    dataset = made(tmp_path, written(tmp_path / "a.txt", text), tokenizer=f"tiktoken:{name}")
    assert dataset.training.dtype == (torch.uint16 if name == "gpt2" else torch.uint32)
    end = parts["special_tokens"][END]
    assert all_tokens(dataset).tolist() == [*small.encode_ordinary(text), end]
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, name)
    assert load_tokenizer(tmp_path / "out").decode(all_tokens(dataset)) == text + END


def test_the_vocabulary_of_another_data_set_serves_again(tmp_path: Path) -> None:
    first = made(tmp_path, written(tmp_path / "a.txt", SCRIPTS * 50))
    (tmp_path / "out").rename(tmp_path / "first")
    file = written(tmp_path / "b.txt", "12 🌍 " * 20)
    second = made(tmp_path, file, tokenizer=str(tmp_path / "first"))
    assert second.tokenizer.to_json() == first.tokenizer.to_json()
    assert second.tokenizer.decode(all_tokens(second)) == "12 🌍 " * 20


@pytest.fixture
def letters(tmp_path: Path) -> str:
    """A vocabulary of a, b, space, line end and question mark."""
    path = tmp_path / "letters.json"
    path.write_text(CharTokenizer("\n ?ab").to_json())
    return str(path)


def test_a_character_without_a_token_is_named_with_its_place(tmp_path: Path, letters: str) -> None:
    lines = "ab ab\n" * 50_000
    file = written(tmp_path / "t.txt", f"{lines}ab é\n{lines}é")
    with pytest.raises(UserError, match=r"t\.txt:50001:4: character 'é' is not in the vocab"):
        made(tmp_path, file, tokenizer=letters)
    record = written(tmp_path / "t.jsonl", '{"text": "ab"}\n\n{"text": "a\\nb\\u00e9"}')
    written(tmp_path / "out/unfinished.json", "").unlink()
    with pytest.raises(UserError, match=r"t\.jsonl:3:4: character 'é'.*--replacement C"):
        prepare(PrepareOptions((str(record),), str(tmp_path / "other"), tokenizer=letters))


def test_or_replaced_where_that_is_asked_for(tmp_path: Path, letters: str) -> None:
    file = written(tmp_path / "t.txt", "")
    file.write_bytes("abé ".encode() + b"\xff\0 b\n")
    dataset = made(tmp_path, file, tokenizer=letters, replacement="?", validation=0.5)
    assert dataset.tokenizer.decode(all_tokens(dataset)) == "ab? ?? b\n"


def test_a_replacement_joins_the_characters_of_the_data(tmp_path: Path) -> None:
    file = written(tmp_path / "t.txt", "")
    file.write_bytes(b"caf\xe9 au lait")
    dataset = made(tmp_path, file, replacement="�")
    assert dataset.tokenizer.decode(all_tokens(dataset)) == "caf� au lait"


def test_a_vocabulary_that_would_drop_a_character_is_told(tmp_path: Path) -> None:
    library = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    library.save(str(tmp_path / "tokenizer.json"))
    file = written(tmp_path / "t.txt", "abcab")
    with pytest.raises(UserError, match=r"t\.txt:1:3: character 'c' is not in the vocabulary"):
        made(tmp_path, file, tokenizer=str(tmp_path / "tokenizer.json"))


def test_bytes_are_taken_as_they_are(tmp_path: Path) -> None:
    content = bytes(range(256)) * 300
    (tmp_path / "any").write_bytes(content)
    dataset = made(tmp_path, tmp_path / "any", tokenizer="bytes")
    assert bytes(all_tokens(dataset).tolist()) == content


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", b"", "there is no text in .*t.txt"),
        ("t.txt", b"text\n\0more", "t.txt:2:1: a zero byte: this is binary, not text"),
        ("t.txt", b"caf\xe9 au lait", "t.txt:1:4: byte 0xe9 is not UTF-8 text"),
        ("t.jsonl", b'{"text": "a"}\n{"text"', "t.jsonl:2: not JSON: "),
        ("t.jsonl", b'{"txt": "a"}', "t.jsonl:1: no text under 'text'"),
        ("t.jsonl", b'["a"]', "t.jsonl:1: no text under 'text'"),
        ("t.jsonl", b'{"text": "a\\ud83d"}', r"t.jsonl:1:2: '\\ud83d' is half a character"),
    ],
)
@pytest.mark.parametrize("tokenizer", ["characters", "bpe"])
def test_what_is_no_text_is_told(
    tmp_path: Path, name: str, content: bytes, message: str, tokenizer: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        made(tmp_path, tmp_path / name, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": 0.0}, "validation must be between 0 and 1, got 0"),
        ({"replacement": "??"}, r"replacement must be one character, got '\?\?'"),
        ({"tokenizer": "bytes!"}, "bytes! can't be read: No such file"),
        ({"tokenizer": "tiktoken:none"}, "tiktoken can't load 'none': Unknown encoding none"),
        ({"tokenizer": "bpe", "vocab_size": 256}, "vocab_size must be at least 257"),
    ],
)
def test_options_that_make_no_data_set(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        made(tmp_path, written(tmp_path / "t.txt", "some text"), **options)


def test_inputs_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.txt does not exist"):
        made(tmp_path, tmp_path / "none.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no files"):
        prepare(PrepareOptions((str(tmp_path / "empty"),), str(tmp_path / "other")))


def test_linked_folders_are_followed_and_the_data_set_is_no_input(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    written(folder / "a.txt", "abc")
    written(tmp_path / "other/b.txt", "def")
    (folder / "linked").symlink_to(tmp_path / "other")
    (folder / "again").symlink_to(folder)
    dataset = prepare(PrepareOptions((str(folder),), str(folder / "out"), validation=0.5))
    assert dataset.tokenizer.decode(all_tokens(dataset)) == "abcdef"
    (folder / "broken.txt").symlink_to(tmp_path / "none")
    with pytest.raises(UserError, match=r"in/broken\.txt does not exist"):
        made(tmp_path, folder)


def test_what_cannot_be_read_twice_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is a pipe: as - it is stdin that is read"):
        made(tmp_path, tmp_path / "pipe")
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(UserError, match="- is stdin, which is closed"):
        made(tmp_path, "-")


@pytest.mark.parametrize("new", ["a text of other letters", "xyz"])
def test_a_file_that_changes_between_its_two_readings_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: str
) -> None:
    file = written(tmp_path / "t.txt", "xyz")
    table = module.Preparation.encode

    def encode(self: module.Preparation) -> None:
        written(file, new)
        table(self)

    monkeypatch.setattr(module.Preparation, "encode", encode)
    with pytest.raises(UserError, match=r"the inputs have changed since .*out was begun"):
        made(tmp_path, file)
    assert not (tmp_path / "out/manifest.json").exists()


def test_a_replacement_must_have_a_token_itself(tmp_path: Path, letters: str) -> None:
    file = written(tmp_path / "t.txt", "abc")
    with pytest.raises(UserError, match="replacement 'x' is not in the vocabulary itself"):
        made(tmp_path, file, tokenizer=letters, replacement="x")


def test_a_data_set_and_other_folders_are_not_overwritten(tmp_path: Path) -> None:
    file = written(tmp_path / "t.txt", "abc" * 10)
    made(tmp_path, file)
    with pytest.raises(UserError, match="out holds a data set already"):
        made(tmp_path, file)
    with pytest.raises(UserError, match="exists already, and is no data set to go on with"):
        prepare(PrepareOptions((str(file),), str(tmp_path)))


def test_without_a_terminal_progress_is_a_line_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "t.txt", mixed(2_000_000))
    seconds = itertools.count(step=4)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    made(tmp_path, file, tokenizer="bpe", vocab_size=300)
    lines = capsys.readouterr().out.splitlines()
    shown = re.compile(r"(reading|learning|encoding) \d of 2 MB  \d+ MB/s  \d+ s left")
    assert {shown.fullmatch(line)[1] for line in lines} == {"reading", "learning", "encoding"}  # type: ignore[index]


def prepare_and_answer(inputs: list[str], out: str, answer: Any) -> None:
    """In a child: by how many bytes preparing raised the peak of the memory it has."""
    answer.send(peak_growth(lambda: prepare(PrepareOptions(tuple(inputs), out))))


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    size = 150_000_000
    with open(tmp_path / "large.txt", "w") as file:
        text = sentences(100_000)
        for _ in range(size // len(text)):
            file.write(text)
    receiver, sender = child.SERVER.Pipe(duplex=False)
    arguments = ([str(tmp_path / "large.txt")], str(tmp_path / "out"), sender)
    process = child.SERVER.Process(target=prepare_and_answer, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == 0
    assert receiver.recv() < size / 2
    assert len(all_tokens(open_dataset(tmp_path / "out"))) == size
