"""`gpt-ext demo`: a run from nothing to text, in about a minute."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from gpt_ext import demo, train
from gpt_ext.commands import Parser
from gpt_ext.commands.generate import write


def parser() -> Parser:
    return Parser(description=run.__doc__)


def run(options: Any) -> int:
    """Trains for about a minute on the standard library's documentation, then writes some."""
    with tempfile.TemporaryDirectory(prefix="gpt-ext-demo-") as folder:
        text = Path(folder) / "text.txt"
        text.write_bytes(demo.standard_library_text().encode())
        print(f"learning from {text.stat().st_size:,} bytes of Python's documentation", flush=True)
        trainer = train.start(text, Path(folder) / "run", demo.MODEL, demo.TRAIN)
        trainer.train()
    print("what the model writes:\n")
    write(trainer.model, trainer.data.tokenizer, "The ", 600, seed=0, temperature=0.8)
    print("\non your own text: gpt-ext train --data FILE --out RUN; gpt-ext generate RUN")
    return 0
