"""The files of a run, each of them whole or absent, whenever the program or the machine stops.

config.json          model, vocabulary, training options, the data and its hash
best.safetensors     weights with the lowest validation loss
last.safetensors     weights of the last checkpoint
resume.pt            all that going on takes: weights, optimizer, step, generators
metrics.jsonl        a line a log or evaluation
loss.png             the curves of metrics.jsonl
"""

from __future__ import annotations

import io
import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gpt_ext.errors import UserError
from gpt_ext.model import GPT, GPTConfig
from gpt_ext.options import TrainOptions
from gpt_ext.tokenizer import CharTokenizer

CONFIG, BEST, LAST = "config.json", "best.safetensors", "last.safetensors"
STATE, METRICS, CURVE = "resume.pt", "metrics.jsonl", "loss.png"


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a file in one step: after an error or a crash it holds the old or the new content.

    The temporary file of a killed program is overwritten by the next one.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # makes the new name last
    finally:
        os.close(folder)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a JSON line to a file, or nothing where that fails."""
    line = json_line(record).encode()
    size = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "ab") as file:
            file.write(line)
    except OSError as error:
        if path.exists():
            os.truncate(path, size)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def json_line(record: Mapping[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(record) + "\n"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def create_run(run: Path, config: Mapping[str, Any]) -> None:
    """Makes the folder of a new run with its config; UserError where there is something already."""
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        raise UserError(f"{run} exists already; to go on with it: gpt-ext train --resume {run}")
    existed = run.exists()
    run.mkdir(parents=True, exist_ok=True)
    try:
        write_whole(run / CONFIG, json.dumps(config, indent=2).encode())
    except UserError:
        if not existed:
            run.rmdir()
        raise


def read_config(run: Path) -> dict[str, Any]:
    """config.json of a run, checked; UserError where it is missing or damaged."""
    path = run / CONFIG
    if not path.is_file():
        raise UserError(f"{run} is no run: there is no {path}")
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        GPTConfig(len(CharTokenizer(config["vocabulary"])), **config["model"])
        TrainOptions(**config["train"])
        Path(config["data"]), config["data_sha256"]
    except (ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return config


def build_model(config: Mapping[str, Any]) -> tuple[GPT, CharTokenizer]:
    """The model, with random weights, and the tokenizer of a run's config."""
    tokenizer = CharTokenizer(config["vocabulary"])
    return GPT(len(tokenizer), **config["model"]), tokenizer


def save_weights(path: Path, model: GPT) -> None:
    """The weights of `model`, on the CPU, as safetensors."""
    from safetensors.torch import save

    write_whole(path, save({k: v.cpu().contiguous() for k, v in model.state_dict().items()}))


def load_run(run: Path) -> tuple[GPT, CharTokenizer]:
    """The best model of a run, in evaluation mode, and its tokenizer; UserError if damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_config(run)
    model, tokenizer = build_model(config)
    path = next((run / name for name in (BEST, LAST) if (run / name).is_file()), None)
    if path is None:
        raise UserError(f"{run} holds no checkpoint yet")
    try:
        model.load_state_dict(load_file(path))
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    except RuntimeError as error:
        raise UserError(f"{path} does not fit {run / CONFIG}: {_one_line(error)}") from None
    return model.eval(), tokenizer


def save_state(run: Path, state: Mapping[str, Any]) -> None:
    """Writes what `load_state` reads."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    write_whole(run / STATE, buffer.getvalue())


def load_state(run: Path) -> dict[str, Any]:
    """What the run needs to go on, read without unpickling code; UserError if there is none."""
    path = run / STATE
    if not path.is_file():
        raise UserError(f"{run} can't be resumed: it stopped before its first checkpoint")
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return state
    except (RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise UserError(f"{path} is damaged: {_one_line(error)}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
