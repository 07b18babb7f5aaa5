"""Files of text, read in pieces that a tokenizer may be given one by one, in little memory."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from gpt_ext.errors import UserError
from gpt_ext.tokenizer import ByteTokenizer, Tokenizer

Form = Literal["auto", "text", "jsonl"]
BLOCK = 1 << 15  # bytes read at once: a piece is as long or, where it can't be cut, longer
MAX_PIECE = 1 << 20  # characters after which it is cut anywhere
BATCH = 1 << 19  # characters encoded at once

# Before a single white space between letters or digits, and between a line end after a character
# and a letter or digit: there tokens begin in the patterns of GPT-2 and its successors, and what
# stands on one side does not change those of the other.
CUT = re.compile(r"(?<=[^\W_])(?=\s[^\W_])|(?<=\S\n)(?=[^\W_])")
# What is no character of a text: the zero byte, and what bytes that are not UTF-8 are read as.
NOT_TEXT = {"\0", *map(chr, range(0xD800, 0xE000))}


@dataclass(frozen=True)
class Source:
    """A file of text, or of JSON lines, each an object whose `text_key` is a document.

    `line_end` is put after such a document, where no token marks its end.
    """

    path: Path
    jsonl: bool
    text_key: str
    line_end: str


class Piece(NamedTuple):
    """A text from a source, from `line` and `column`, counted from 1, up to byte `offset`.

    A document ends with it, if it `ends`; an empty file has no piece.
    """

    text: str
    offset: int
    ends: bool
    line: int
    column: int


def list_sources(
    inputs: Sequence[Path], form: Form, text_key: str, line_end: str, without: Path
) -> list[Source]:
    """The files, and those in folders by their names: hidden ones, and `without`, are left out.

    With the form "auto", a file is of JSON lines if its name ends in .jsonl. UserError where a path
    does not exist or is a pipe, and where a folder holds no file.
    """
    files: list[Path] = []
    for path in inputs:
        found = files_in(path, without) if path.is_dir() else [path]
        if not found:
            raise UserError(f"{path} holds no files")
        for file in found:
            if not file.exists():
                raise UserError(f"{file} does not exist")
            if file.is_fifo():
                raise UserError(f"{file} is a pipe: as - it is stdin that is read")
        files += found
    return [
        Source(
            file, file.suffix == ".jsonl" if form == "auto" else form == "jsonl", text_key, line_end
        )
        for file in files
    ]


def files_in(folder: Path, without: Path) -> list[Path]:
    """Those in a folder and in its folders, linked ones too, each once; none that are hidden."""
    found: list[Path] = []
    seen = {without.resolve()}
    for at, folders, names in os.walk(folder, followlinks=True):
        here = Path(at).resolve()
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(at, name) for name in names if not name.startswith(".")]
    return sorted(found)


def identity(path: Path) -> dict[str, Any]:
    """What tells that a file is still the same, without reading it."""
    found = path.stat()
    return {"path": str(path.resolve()), "bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


def sha256_of(path: Path) -> str:
    """The hash of a file, in little memory."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def pieces(
    source: Source, start: int = 0, seen: Callable[[bytes], object] = len
) -> Iterator[Piece]:
    """The pieces from byte `start` on, where a piece ended; `seen` is given all bytes as read.

    Bytes that are not UTF-8 come as lone surrogates ("surrogateescape"). UserError where a line is
    no JSON object with a text. Lines are counted from `start`.
    """
    read = _records if source.jsonl else _texts
    try:
        yield from read(source, start, seen)
    except OSError as error:
        raise UserError(f"{source.path} can't be read: {error.strerror}") from None


def _texts(source: Source, start: int, seen: Callable[[bytes], object]) -> Iterator[Piece]:
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    text, offset, line, column, searched = "", start, 1, 1, 0
    with open(source.path, "rb") as file:
        file.seek(start)
        while True:
            block = file.read(BLOCK)
            seen(block)
            text += decoder.decode(block, final=not block)
            cut = _last_cut(text, searched) if block else len(text)
            if not cut and len(text) > MAX_PIECE:
                cut = MAX_PIECE
            if cut:
                piece, text = text[:cut], text[cut:]
                offset += len(piece.encode("utf-8", "surrogateescape"))
                yield Piece(piece, offset, not block, line, column)
                line += piece.count("\n")
                column = cut - piece.rfind("\n") if "\n" in piece else column + cut
            searched = max(0, len(text) - 1)
            if not block:
                return


def _last_cut(text: str, start: int) -> int:
    """A place near the end where `text` can be cut; 0 if there is none from `start` on."""
    for near in (max(start, len(text) - 256), start):
        cuts = [match.start() for match in CUT.finditer(text, near)]
        if cuts:
            return cuts[-1]
    return 0


def _records(source: Source, start: int, seen: Callable[[bytes], object]) -> Iterator[Piece]:
    offset = start
    with open(source.path, "rb") as file:
        file.seek(start)
        for line, raw in enumerate(file, 1):
            seen(raw)
            offset += len(raw)
            if raw.isspace():
                continue
            try:
                record: Any = json.loads(raw.decode("utf-8", "surrogateescape"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{source.path}:{line}: not JSON: {error}") from None
            text = record.get(source.text_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise UserError(f"{source.path}:{line}: no text under {source.text_key!r}")
            yield Piece(text + source.line_end, offset, True, line, 1)


def without_token(source: Source, characters: set[str], tokenizer: Tokenizer | None) -> set[str]:
    """Those of a source's characters that are no text, or that `tokenizer` does not know."""
    if isinstance(tokenizer, ByteTokenizer) and not source.jsonl:
        return set()  # bytes are what they are
    no_text = characters & NOT_TEXT
    return no_text | (tokenizer.unknown(characters - no_text) if tokenizer else set())


def place_of(bad: set[str], piece: Piece, source: Source) -> str:
    """FILE:LINE:COLUMN of the first of the `bad` characters in a piece, and what it is."""
    at = min(piece.text.index(character) for character in bad)
    before, character = piece.text[:at], piece.text[at]
    line, column = piece.line, piece.column + at
    if not source.jsonl and "\n" in before:
        line, column = line + before.count("\n"), at - before.rfind("\n")
    if character == "\0":
        what = "a zero byte: this is binary, not text"
    elif 0xDC80 <= ord(character) <= 0xDCFF:
        what = f"byte 0x{ord(character) - 0xDC00:02x} is not UTF-8 text"
    elif character in NOT_TEXT:
        what = f"{character!r} is half a character"
    else:
        what = f"character {character!r} is not in the vocabulary"
    return f"{source.path}:{line}:{column}: {what}"


def batches(found: Iterable[Piece]) -> Iterator[list[Piece]]:
    """The pieces in lists of about BATCH characters."""
    batch: list[Piece] = []
    size = 0
    for piece in found:
        batch.append(piece)
        size += len(piece.text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def encoded(batch: Sequence[Piece], coder: Tokenizer, table: dict[int, str]) -> Tensor:
    """The ids (n,) int64 of pieces translated by `table`, and the end of each document, if any."""
    texts = [piece.text.translate(table) if table else piece.text for piece in batch]
    parts = []
    for piece, ids in zip(batch, coder.encode_batch(texts), strict=True):
        parts.append(ids)
        if piece.ends and coder.end is not None:
            parts.append(torch.tensor([coder.end]))
    return torch.cat(parts)
