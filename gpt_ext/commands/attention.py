"""`gpt-ext attention`: what each head of a model looks at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpt_ext import pretrained
from gpt_ext.commands import Parser
from gpt_ext.errors import UserError
from gpt_ext.plots import attention_weights, draw_attention


def parser() -> Parser:
    parser = Parser(description=run.__doc__)
    parser.add_argument("run", type=str, help="the folder of a run, or of a model")
    parser.add_argument("text", type=str, help="what the model reads")
    parser.add_argument("--out", type=str, default="attention.png", help="the picture")
    return parser


def run(options: Any) -> int:
    """Draws the attention of each layer and head over a text, as a PNG."""
    model, tokenizer = pretrained.load_with_tokenizer(Path(options.run))
    try:
        tokens = tokenizer.encode(options.text)
        weights = attention_weights(model, tokens)
    except ValueError as error:
        raise UserError(f"can't read {options.text!r}: {error}") from None
    labels = [tokenizer.decode([token]) for token in tokens.tolist()]
    draw_attention(weights, labels, Path(options.out))
    print(f"drawn: {options.out}")
    return 0
