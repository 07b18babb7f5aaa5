"""Text files of any size become a folder of tokens that training maps into memory.

tokens.bin       the ids of all documents, one after the other, uint16 or uint32, little-endian
tokenizer.json   what they are ids of
manifest.json    sizes, hashes, where they came from; written last
unfinished.json  until then, what going on after a stop takes

Texts are read twice, in pieces. First each file is hashed and its characters are looked at, so that
what has no token is told before anything is written; then it is encoded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

from gpt_ext import bpe, tokenizer
from gpt_ext.checkpoint import write_whole
from gpt_ext.corpus import (
    NOT_TEXT,
    batches,
    encoded,
    identity,
    list_sources,
    pieces,
    place_of,
    sha256_of,
    without_token,
)
from gpt_ext.data import DTYPES, MANIFEST, TOKENS, DataSet, open_dataset
from gpt_ext.errors import UserError
from gpt_ext.options import option
from gpt_ext.progress import ByteProgress
from gpt_ext.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer

UNFINISHED, STDIN = "unfinished.json", "stdin.txt"
SAVE_EVERY = 1 << 26  # bytes of text from one save to the next
BPE_SAMPLE = 1 << 28  # bytes of text that a vocabulary is learned from, spread over all of it


@dataclass(frozen=True)
class PrepareOptions:
    """What `gpt-ext prepare` can be told; UserError for values that make no data set."""

    inputs: tuple[str, ...]  # files and folders; - is stdin
    out: str  # the folder of the new data set, or of one that was interrupted
    tokenizer: str = option(
        "characters",
        "characters, or bpe, learned from the data; bytes; tiktoken:NAME; or that of a "
        "tokenizer.json, or of a folder that holds one",
    )
    vocab_size: int = option(8192, "tokens of a bpe vocabulary")
    replacement: str = option(
        "", "a character written in place of those without a token, else they are an error"
    )
    validation: float = option(0.1, "share of the tokens, the last ones, kept for validation")
    form: Literal["auto", "text", "jsonl"] = option(
        "auto", "of the inputs: auto takes files .jsonl for JSON lines, all others for text"
    )
    text_key: str = option("text", "where an object of JSON lines has its text")

    def __post_init__(self) -> None:
        if not 0 < self.validation < 1:
            raise UserError(f"validation must be between 0 and 1, got {self.validation}")
        if len(self.replacement) > 1:
            raise UserError(f"replacement must be one character, got {self.replacement!r}")


@dataclass
class Work:
    """unfinished.json: what was asked for, what is known of the inputs, how far encoding is."""

    options: dict[str, Any]
    inputs: list[dict[str, Any]] = field(default_factory=list)  # those surveyed
    characters: str = ""  # all that are in them
    surveyed: bool = False  # all of them
    source: int = 0  # the one being encoded
    offset: int = 0  # in bytes, into it
    tokens: int = 0  # written so far

    def save(self, out: Path) -> None:
        write_whole(out / UNFINISHED, json.dumps(asdict(self)).encode())


def prepare(options: PrepareOptions) -> DataSet:
    """Makes the data set, or goes on where an interrupted call with these options was.

    Raises UserError, and names the place, for what is no text or has no token; the folder then
    keeps what was done. Ctrl-C and kill lose the work since the last save, at most.
    """
    try:
        work = Preparation(options)
        work.survey()
        work.encode()
        work.finish()
    except OSError as error:
        raise UserError(f"cannot make {options.out}: {error.strerror}") from error
    return open_dataset(Path(options.out))


class Preparation:
    """The work on one data set, its three steps in their order."""

    def __init__(self, options: PrepareOptions) -> None:
        self.options, self.out = options, Path(options.out)
        self.done = begin(self.out, asdict(options) | {"inputs": list(options.inputs)})
        self.stdin = self.out / STDIN
        if "-" in options.inputs:
            keep_stdin(self.stdin)
        paths = [self.stdin if name == "-" else Path(name) for name in options.inputs]
        self.tokenizer = self.given_tokenizer()
        has_end = options.tokenizer == "bpe" if self.tokenizer is None else self.tokenizer.end
        line_end = "\n" if has_end in (None, False) else ""
        self.sources = list_sources(paths, options.form, options.text_key, line_end, self.out)
        self.check_unchanged()
        self.sizes = [source.path.stat().st_size for source in self.sources]

    def check_unchanged(self) -> None:
        """UserError if the inputs that were surveyed have changed."""
        before, count = self.done.inputs, len(self.sources)
        same = len(before) == count if self.done.surveyed else len(before) <= count
        same = same and all(
            entry["sha256"] == sha256_of(source.path)
            if source.path == self.stdin
            else entry == identity(source.path) | {"sha256": entry["sha256"]}
            for entry, source in zip(before, self.sources, strict=False)
        )
        if not same:
            raise UserError(f"the inputs have changed since {self.out} was begun: remove it")

    def given_tokenizer(self) -> Tokenizer | None:
        """The one in the folder, or else the one asked for; None if it is still to be learned."""
        name = self.options.tokenizer
        if (self.out / tokenizer.FILE).exists():
            return tokenizer.load_tokenizer(self.out)
        if name in ("characters", "bpe"):
            return None
        if name == "bytes":
            return ByteTokenizer()
        if name.startswith("tiktoken:"):
            return bpe.Tiktoken.named(name.removeprefix("tiktoken:"))
        return tokenizer.load_tokenizer(Path(name))

    def survey(self) -> None:
        """Reads all inputs: their hashes, and characters, of which none may be without a token."""
        done, characters = self.done, set(self.done.characters)
        before = sum(self.sizes[: len(done.inputs)])
        with ByteProgress("reading", before, sum(self.sizes)) as progress:
            for source in self.sources[len(done.inputs) :]:
                digest = hashlib.sha256()
                for piece in pieces(source, seen=digest.update):
                    new = set(piece.text) - characters
                    bad = without_token(source, new, self.tokenizer)
                    if bad and not self.options.replacement:
                        raise UserError(
                            f"{place_of(bad, piece, source)}; "
                            "--replacement C writes C in the place of such"
                        )
                    characters |= new
                    progress.at(before + piece.offset)
                before += source.path.stat().st_size
                entry = identity(source.path) | {"sha256": digest.hexdigest()}
                done.inputs.append(entry | {"path": "-"} if source.path == self.stdin else entry)
                done.characters = "".join(sorted(characters))
                done.save(self.out)
        if not characters:
            raise UserError(f"there is no text in {', '.join(self.options.inputs)}")
        if not done.surveyed:
            done.surveyed = True
            done.save(self.out)

    def learned_tokenizer(self) -> Tokenizer:
        """The tokenizer of the characters, or the byte pairs, in the inputs."""
        replacement = self.options.replacement
        if self.options.tokenizer == "characters":
            characters = (set(self.done.characters) - NOT_TEXT) | set(replacement)
            return CharTokenizer("".join(sorted(characters)))
        try:
            return bpe.BPETokenizer.train(self.sample(), self.options.vocab_size)
        except ValueError as error:
            raise UserError(str(error)) from None

    def sample(self) -> Iterator[str]:
        """Every n-th piece of the inputs, BPE_SAMPLE of text at most."""
        before, total, numbers = 0, sum(self.sizes), count()
        every, table = -(-total // BPE_SAMPLE), self.table(NOT_TEXT)
        with ByteProgress("learning", 0, total) as progress:
            for source, size in zip(self.sources, self.sizes, strict=True):
                for piece in pieces(source):
                    progress.at(before + piece.offset)
                    if next(numbers) % every == 0:
                        yield piece.text.translate(table) if table else piece.text
                before += size

    def table(self, characters: Iterable[str]) -> dict[int, str]:
        """For str.translate: each of the characters becomes the replacement, if there is one."""
        replacement = self.options.replacement
        return {ord(c): replacement for c in characters} if replacement else {}

    def encode(self) -> None:
        """Appends the tokens of all that is left, and saves now and then how far that is."""
        coder = self.tokenizer or self.learned_tokenizer()
        replacement = self.options.replacement
        if replacement and coder.unknown({replacement}):
            raise UserError(f"replacement {replacement!r} is not in the vocabulary itself")
        if not (self.out / tokenizer.FILE).exists():
            write_whole(self.out / tokenizer.FILE, coder.to_json().encode())
        self.tokenizer, done, dtype = coder, self.done, DTYPES[dtype_of(coder)]
        saved = sum(self.sizes[: done.source]) + done.offset
        with (
            open(self.out / TOKENS, "ab") as file,
            ByteProgress("encoding", saved, sum(self.sizes)) as progress,
        ):
            file.truncate(done.tokens * dtype.itemsize)
            for index in range(done.source, len(self.sources)):
                source, before = self.sources[index], sum(self.sizes[:index])
                start, done.source, done.offset = done.offset, index, 0
                table = self.table(without_token(source, set(done.characters), coder))
                for batch in batches(pieces(source, start)):
                    try:
                        ids = encoded(batch, coder, table)
                    except ValueError:  # a character that was not there before
                        self.check_unchanged()
                        raise
                    file.write(ids.to(dtype).numpy().tobytes())
                    done.tokens, done.offset = done.tokens + len(ids), batch[-1].offset
                    progress.at(before + done.offset)
                    if before + done.offset - saved >= SAVE_EVERY:
                        file.flush()
                        os.fsync(file.fileno())
                        done.save(self.out)
                        saved = before + done.offset
                done.offset = 0
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Writes the manifest, which makes the folder a data set, and removes what it took."""
        assert self.tokenizer is not None
        self.check_unchanged()
        done, out = self.done, self.out
        manifest = {
            "tokens": done.tokens,
            "training_tokens": done.tokens - round(done.tokens * self.options.validation),
            "dtype": dtype_of(self.tokenizer),
            "vocab_size": len(self.tokenizer),
            "sha256": {name: sha256_of(out / name) for name in (TOKENS, tokenizer.FILE)},
            "inputs": done.inputs,
            "options": done.options,
        }
        write_whole(out / MANIFEST, json.dumps(manifest, indent=2).encode())
        for path in (out / UNFINISHED, self.stdin):
            path.unlink(missing_ok=True)


def begin(out: Path, options: dict[str, Any]) -> Work:
    """What is done of the data set so far; makes its folder, if there is none.

    UserError where there is something else, or what was done with other options.
    """
    unfinished = out / UNFINISHED
    if (out / MANIFEST).exists():
        raise UserError(f"{out} holds a data set already")
    if unfinished.exists():
        try:
            work = Work(**json.loads(unfinished.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{unfinished} is damaged: {error}") from None
        if not work.inputs:  # nothing is done yet that other options could not begin with
            return Work(options)
        for name, asked in options.items():
            if work.options.get(name) != asked:
                raise UserError(
                    f"{out} was begun with {name} {work.options.get(name)!r}, not {asked!r}: "
                    "remove it, or go on with the same options"
                )
        return work
    of_a_killed_one = out / f".{UNFINISHED}.tmp"
    if out.exists() and not (out.is_dir() and {*out.iterdir()} <= {of_a_killed_one}):
        raise UserError(f"{out} exists already, and is no data set to go on with")
    out.mkdir(parents=True, exist_ok=True)
    work = Work(options)
    work.save(out)
    return work


def keep_stdin(path: Path) -> None:
    """Copies stdin to a file, whole or not at all: it is read twice, like any other."""
    if sys.stdin is None:
        raise UserError("- is stdin, which is closed")
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    os.replace(temporary, path)


def dtype_of(coder: Tokenizer) -> str:
    """The narrowest of DTYPES that holds all ids."""
    return "uint16" if len(coder) <= 1 << 16 else "uint32"
