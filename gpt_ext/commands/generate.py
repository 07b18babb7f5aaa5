"""`gpt-ext generate`: what a run's model writes after a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gpt_ext import pretrained
from gpt_ext.commands import Parser
from gpt_ext.errors import UserError
from gpt_ext.generation import Overflow, WeightFormat
from gpt_ext.model import GPT
from gpt_ext.options import check_seed
from gpt_ext.tokenizer import Tokenizer, piece_of


def parser() -> Parser:
    """Of the run, the prompt, and the options of `GPT.stream`."""
    parser = Parser(description="Writes what follows a prompt, character by character.")
    parser.add_argument("run", type=str, help="the folder of a run, or of a model")
    parser.add_argument("--prompt", type=str, default="\n", help="what to go on from")
    parser.add_argument("--length", type=int, default=500, help="characters to write")
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="below 1 surer, 0 the likeliest alone"
    )
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest characters")
    parser.add_argument(
        "--top-p", type=float, help="draw from the likeliest whose probability reaches p"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1, fewer repetitions"
    )
    parser.add_argument(
        "--dtype", type=WeightFormat, default="float32", help="of the weights while writing"
    )
    parser.add_argument(
        "--overflow",
        type=Overflow,
        default="exact",
        help="beyond the context: compute it anew for each character, or now and then (reprefill)",
    )
    parser.add_argument("--seed", type=int, help="the same seed writes the same text")
    return parser


def run(options: Any) -> int:
    model, tokenizer = pretrained.load_with_tokenizer(Path(options.run))
    write(
        model, tokenizer, options.prompt, options.length, options.seed,
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        repetition_penalty=options.repetition_penalty, dtype=options.dtype,
        overflow=options.overflow,
    )  # fmt: skip
    return 0


def write(
    model: GPT, tokenizer: Tokenizer, prompt: str, length: int, seed: int | None, **options: Any
) -> None:
    """Prints a prompt and what the model adds to it, each character as it comes.

    The options are those of `GPT.stream`.
    """
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        check_seed(seed)
        generator.manual_seed(seed)
    try:
        start = tokenizer.encode(prompt)[None]
        if not start.numel():
            raise ValueError("the prompt is empty")
    except ValueError as error:
        raise UserError(f"can't go on from {prompt!r}: {error}") from None
    try:
        tokens = model.stream(start, length, generator=generator, **options)
    except (ValueError, IndexError) as error:
        raise UserError(str(error).replace("max_new_tokens", "length")) from None
    text_of = tokenizer.stream()
    print(prompt, end="", flush=True)
    try:
        for token in tokens:
            print(piece_of(text_of, int(token)), end="", flush=True)
    except RuntimeError as error:  # logits that are not finite
        print(flush=True)
        raise UserError(str(error)) from None
    print(text_of(None))
