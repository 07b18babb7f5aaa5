"""`gpt-ext prepare`: from text files of any size to a data set."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from gpt_ext.commands import Parser
from gpt_ext.data import MANIFEST
from gpt_ext.prepare import PrepareOptions, prepare


def parser() -> Parser:
    """Of the inputs, the folder, and the other fields of PrepareOptions."""
    parser = Parser(description="Makes a data set of text, or goes on with one after a stop.")
    parser.add_argument(
        "inputs", nargs="+", type=str, help="text files, JSON lines, folders of them; - is stdin"
    )
    parser.add_argument("--out", type=str, required=True, help="the folder of the data set")
    parser.add_fields(PrepareOptions)
    return parser


def run(options: Any) -> int:
    names = [field.name for field in dataclasses.fields(PrepareOptions)]
    asked = {name: options[name] for name in names} | {"inputs": tuple(options.inputs)}
    try:
        dataset = prepare(PrepareOptions(**asked))
    except KeyboardInterrupt:
        print("stopped; the same command goes on")
        return 130
    manifest = json.loads((dataset.path / MANIFEST).read_text(encoding="utf-8"))
    inputs = manifest["inputs"]
    print(
        f"{sum(entry['bytes'] for entry in inputs):,} bytes of {len(inputs)} files: "
        f"{manifest['tokens']:,} tokens of a vocabulary of {manifest['vocab_size']:,}\n"
        f"done; to train on it: gpt-ext train --data {dataset.path} --out RUN"
    )
    return 0
