"""The files of a run, each of them whole or absent, whenever the program or the machine stops.

config.json          model, training options, the data and its hash
tokenizer.json       text <-> the model's tokens
best.safetensors     weights with the lowest validation loss
last.safetensors     weights of the last checkpoint
checkpoints/         all that going on takes, by step: gpt_ext.state
metrics.jsonl        a line a log or evaluation
curves.png           the curves of metrics.jsonl
tensorboard/         the same for TensorBoard, if asked for
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from gpt_ext.errors import UserError
from gpt_ext.model import GPT, GPTConfig
from gpt_ext.options import TrainOptions
from gpt_ext.pretrained import read_folder_config, with_arguments
from gpt_ext.tokenizer import FILE as TOKENIZER
from gpt_ext.tokenizer import Tokenizer, load_tokenizer

CONFIG, BEST, LAST = "config.json", "best.safetensors", "last.safetensors"
METRICS, CURVES = "metrics.jsonl", "curves.png"


def write_whole(path: Path, content: bytes) -> None:
    """Replaces a file in one step: after an error or a crash it holds the old or the new content.

    The temporary file of a killed program is overwritten by the next one.
    """
    if not path.name:
        raise UserError(f"cannot write {str(path)!r}: it names no file")
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
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder last."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


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
    """The records of a file of JSON lines, but for a last one that was cut off with the power."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None


def create_run(run: Path, config: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Makes the folder of a new run; UserError where there is something already."""
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        if not (run / CONFIG).is_file():
            raise UserError(f"{run} exists already, and is no run")
        raise UserError(f"{run} exists already; to go on with it: gpt-ext train --resume {run}")
    existed = run.exists()
    run.mkdir(parents=True, exist_ok=True)
    try:
        write_whole(run / TOKENIZER, tokenizer.to_json().encode())
        write_whole(run / CONFIG, json.dumps(config, indent=2).encode())
    except UserError:
        (run / TOKENIZER).unlink(missing_ok=True)
        if not existed:
            run.rmdir()
        raise


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """A run that no other process trains meanwhile; UserError where one does.

    Where the file system has no locks, nobody is kept out.
    """
    folder = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process trains in {run}") from None
        except OSError:
            pass
        yield
    finally:
        os.close(folder)


def read_config(run: Path) -> dict[str, Any]:
    """config.json of a run, checked; UserError where it is missing or damaged."""
    path = run / CONFIG
    if not path.is_file():
        raise UserError(f"{run} is no run: there is no {path}")
    config = read_folder_config(run)
    if "model_type" in config:
        raise UserError(f"{run} is no run: it holds a model alone")
    try:
        GPTConfig(config["vocab_size"], **config["model"])
        TrainOptions(**config["train"])
        Path(config["data"]), config["data_sha256"]
    except (ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    return config


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Weights, a model's state dict, as safetensors, which knows no shared memory: it is copied."""
    from safetensors.torch import save

    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in weights.items():
        value = value.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        tensors[key] = value.clone() if storage in storages else value
        storages.add(storage)
    write_whole(path, save(tensors, metadata={"format": "pt"}))


def load_run(run: Path, **arguments: Any) -> tuple[GPT, Tokenizer]:
    """The best model of a run, in evaluation mode, and its tokenizer; UserError if damaged.

    `arguments` are GPT's, for a run that does not contradict them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_config(run)
    told = {"vocab_size": config["vocab_size"], **config["model"]}
    model, tokenizer = GPT(**with_arguments(told, arguments, run / CONFIG)), load_tokenizer(run)
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


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
