"""`gpt-ext train`: from text or prepared data to a run, or on with a run."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from gpt_ext import checkpoint, train
from gpt_ext.commands import Parser, picked
from gpt_ext.distributed import LostProcessError, World
from gpt_ext.errors import UserError
from gpt_ext.options import ModelOptions, TrainOptions
from gpt_ext.plots import draw_curves


class _Parser(Parser):
    """Reads the options of the file of --config first, as if they stood before all others.

    UserError where others stand beside --resume.
    """

    def parse_args(self, words: Sequence[str]) -> Any:  # type: ignore[override]
        first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config", nargs="?")
        first.add_argument("--resume", nargs="?")
        found, others = first.parse_known_args(words)
        read = {} if found.config is None else read_config(Path(found.config))
        before = [f"--{name.replace('_', '-')}={_word(value)}" for name, value in read.items()]
        options = super().parse_args([*before, *words])
        if found.resume is not None and (others or found.config is not None):
            raise UserError("--resume RUN takes its options from the run: give no other")
        return options


def _word(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def parser() -> Parser:
    """Of the files, and of the fields of ModelOptions and TrainOptions."""
    parser = _Parser(description="Trains a model on a text file, or on prepared data.")
    parser.add_argument(
        "--config", type=str, help="a TOML file of these options; the command line goes before it"
    )
    parser.add_argument(
        "--data", type=str, help="a text file, UTF-8, or a folder of gpt-ext prepare"
    )
    parser.add_argument("--out", type=str, help="the folder of the new run")
    parser.add_argument("--resume", type=str, help="go on with this run, as if never stopped")
    parser.add_fields(ModelOptions)
    parser.add_fields(TrainOptions)
    return parser


def run(options: Any) -> int:
    if options.resume is None:
        if options.data is None or options.out is None:
            raise UserError("train needs --data PATH and --out RUN, or --resume RUN")
        model, training = picked(ModelOptions, options), picked(TrainOptions, options)
        run, world = Path(options.out), World(training.device)
    else:
        run = Path(options.resume)
        world = World(checkpoint.read_config(run)["train"]["device"])
    try:
        with world.joined(), ExitStack() as held:

            def claim() -> None:
                held.enter_context(checkpoint.claimed(run))

            if options.resume is None:
                trainer = train.start(Path(options.data), run, model, training, world)
                world.first(claim)
            else:
                world.first(claim)
                trainer = train.resume(run, world)
            return _train(trainer, run)
    except LostProcessError as error:
        raise UserError(f"{error}; to go on: gpt-ext train --resume {run}") from error


def _train(trainer: train.Trainer, run: Path) -> int:
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{parameters:,} parameters, {len(trainer.data.tokenizer)} distinct tokens", flush=True)
    finished = trainer.train()
    trainer.world.first(partial(_draw, run))
    if not finished:
        print(f"stopped with step {trainer.saved} saved; to go on: gpt-ext train --resume {run}")
        return 130
    print(f"done; to write with it: gpt-ext generate {run}")
    return 0


def read_config(path: Path) -> dict[str, Any]:
    """The options of a TOML file, by their names with underscores; UserError if it has others."""
    try:
        options = tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:  # of TOML, or of UTF-8
        raise UserError(f"{path} is not TOML: {error}") from None
    fields = (
        field.name for kind in (ModelOptions, TrainOptions) for field in dataclasses.fields(kind)
    )
    if unknown := options.keys() - {"data", "out", *fields}:
        raise UserError(f"{path} has an option that train does not know: {min(unknown)}")
    return options


def _draw(run: Path) -> None:
    """Draws the curves of a run; where that fails, says why and goes on."""
    try:
        draw_curves(checkpoint.read_lines(run / checkpoint.METRICS), run / checkpoint.CURVES)
    except UserError as error:
        print(error)
