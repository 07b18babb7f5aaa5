"""The command `gpt-ext`: train, generate, demo, doctor."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_type_hints

import jsonargparse
import torch

from gpt_ext import checkpoint, demo, train
from gpt_ext.build import build_info
from gpt_ext.errors import UserError
from gpt_ext.generation import Overflow, WeightFormat
from gpt_ext.model import GPT
from gpt_ext.options import ModelOptions, TrainOptions
from gpt_ext.progress import draw_curve
from gpt_ext.tokenizer import CharTokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 2 for a user's error, 130 for Ctrl-C."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    commands = {
        "train": run_train,
        "generate": run_generate,
        "demo": run_demo,
        "doctor": run_doctor,
    }
    options = build_parser().parse_args(arguments)
    try:
        return commands[options.subcommand](options[options.subcommand])
    except UserError as error:
        return fail(str(error))
    except OSError as error:
        # What print could not write would fail again when Python flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # The reader of our output may go when it has enough, as in `gpt-ext ... | head`.
        return 1 if isinstance(error, BrokenPipeError) else fail(str(error))
    except KeyboardInterrupt:
        return 130


def fail(message: str) -> int:
    """Tells a user's error, in one line; returns its exit code."""
    print(f"gpt-ext: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


class Parser(jsonargparse.ArgumentParser):
    """Tells a bad command line as any other error."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        sys.exit(fail(message))


def build_parser() -> Parser:
    """The parser of the four commands; its options for training are the dataclasses' fields."""
    training = Parser(description="Trains a model on the characters of a text file.")
    training.add_argument("--data", type=str, help="the text file, UTF-8")
    training.add_argument("--out", type=str, help="the folder of the new run")
    training.add_argument("--resume", type=str, help="go on with this run, as if never stopped")
    for options in (ModelOptions, TrainOptions):
        types = get_type_hints(options)
        for field in dataclasses.fields(options):
            training.add_argument(
                f"--{field.name.replace('_', '-')}",
                type=types[field.name],
                default=field.default,
                help=field.metadata["help"],
            )

    generating = Parser(description="Writes what follows a prompt, character by character.")
    generating.add_argument("run", type=str, help="the folder of a run")
    generating.add_argument("--prompt", type=str, default="\n", help="what to go on from")
    generating.add_argument("--length", type=int, default=500, help="characters to write")
    generating.add_argument(
        "--temperature", type=float, default=1.0, help="below 1 surer, 0 the likeliest alone"
    )
    generating.add_argument("--top-k", type=int, help="draw from the k likeliest characters")
    generating.add_argument(
        "--top-p", type=float, help="draw from the likeliest whose probability reaches p"
    )
    generating.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1, fewer repetitions"
    )
    generating.add_argument(
        "--dtype", type=WeightFormat, default="float32", help="of the weights while writing"
    )
    generating.add_argument(
        "--overflow",
        type=Overflow,
        default="exact",
        help="beyond the context: compute it anew for each character, or now and then (reprefill)",
    )
    generating.add_argument("--seed", type=int, help="the same seed writes the same text")

    parser = Parser(prog="gpt-ext", description="A GPT from text, and text from a GPT.")
    commands = parser.add_subcommands()
    commands.add_subcommand("train", training, help="text file -> run")
    commands.add_subcommand("generate", generating, help="run -> text")
    commands.add_subcommand(
        "demo", Parser(description=run_demo.__doc__), help="about a minute, from nothing to text"
    )
    commands.add_subcommand(
        "doctor", Parser(description=run_doctor.__doc__), help="what this installation can do"
    )
    return parser


def run_train(options: Any) -> int:
    model, training = _picked(ModelOptions, options), _picked(TrainOptions, options)
    if options.resume is None:
        if options.data is None or options.out is None:
            raise UserError("train needs --data FILE and --out RUN, or --resume RUN")
        run = Path(options.out)
        trainer = train.start(Path(options.data), run, model, training)
    else:
        if options.data or options.out or model != ModelOptions() or training != TrainOptions():
            raise UserError("--resume RUN takes its options from the run: give no other")
        run = Path(options.resume)
        trainer = train.resume(run)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{parameters:,} parameters, {len(trainer.tokenizer)} distinct characters", flush=True)
    finished = trainer.train()
    _draw(run)
    if not finished:
        print(f"stopped with step {trainer.saved} saved; to go on: gpt-ext train --resume {run}")
        return 130
    print(f"done; to write with it: gpt-ext generate {run}")
    return 0


def run_generate(options: Any) -> int:
    model, tokenizer = checkpoint.load_run(Path(options.run))
    write(
        model, tokenizer, options.prompt, options.length, options.seed,
        temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        repetition_penalty=options.repetition_penalty, dtype=options.dtype,
        overflow=options.overflow,
    )  # fmt: skip
    return 0


def write(
    model: GPT, tokenizer: CharTokenizer, prompt: str, length: int, seed: int | None, **options: Any
) -> None:
    """Prints a prompt and what the model adds to it, each character as it comes.

    The options are those of `GPT.stream`.
    """
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    try:
        tokens = model.stream(
            tokenizer.encode(prompt)[None], length, generator=generator, **options
        )
    except ValueError as error:
        raise UserError(f"can't go on from {prompt!r}: {error}") from None
    print(prompt, end="", flush=True)
    for token in tokens:
        print(tokenizer.decode(token), end="", flush=True)
    print()


def run_demo(options: Any) -> int:
    """Trains for about a minute on the standard library's documentation, then writes some."""
    with tempfile.TemporaryDirectory(prefix="gpt-ext-demo-") as folder:
        text = Path(folder) / "text.txt"
        text.write_bytes(demo.standard_library_text().encode())
        print(f"learning from {text.stat().st_size:,} bytes of Python's documentation", flush=True)
        trainer = train.start(text, Path(folder) / "run", demo.MODEL, demo.TRAIN)
        trainer.train()
    print("what the model writes:\n")
    write(trainer.model, trainer.tokenizer, "The ", 600, seed=0, temperature=0.8)
    print("\non your own text: gpt-ext train --data FILE --out RUN; gpt-ext generate RUN")
    return 0


def run_doctor(options: Any) -> int:
    """Tells what was built, with which torch and compiler, and what runs here."""
    _print_tree(build_info())
    return 0


def _print_tree(tree: Mapping[str, Any], indent: str = "") -> None:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            print(f"{indent}{key}:")
            _print_tree(value, indent + "  ")
        else:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            print(f"{indent}{key}: {shown}")


def _picked(kind: Callable[..., Any], options: Any) -> Any:
    """The dataclass `kind` from those options that are its fields."""
    return kind(**{field.name: options[field.name] for field in dataclasses.fields(kind)})  # type: ignore[arg-type]


def _draw(run: Path) -> None:
    """Draws the loss curve of a run; where that fails, says why and goes on."""
    try:
        draw_curve(checkpoint.read_lines(run / checkpoint.METRICS), run / checkpoint.CURVE)
    except UserError as error:
        print(error)
