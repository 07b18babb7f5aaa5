"""Models in files: those of other projects in, ours out and in again.

A folder of ours holds config.json (`model_type` "gpt_ext" and the arguments of GPT),
model.safetensors and, if there is one, tokenizer.json. Nothing is unpickled but tensors and plain
containers.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gpt_ext import layouts
from gpt_ext.errors import UserError

if TYPE_CHECKING:
    from gpt_ext.model import GPT
    from gpt_ext.tokenizer import Tokenizer

CONFIG, WEIGHTS, MODEL_TYPE = "config.json", "model.safetensors", "gpt_ext"


class Pretrained:
    """What a GPT does with files."""

    @classmethod
    def from_pretrained(cls, path: str | Path, **arguments: Any) -> GPT:
        """The model in a folder or file, float32, in evaluation mode.

        A folder is what `save_pretrained` writes, a run, or a Hugging Face GPT-2. A file is a state
        dict of any layout that `load_state_dict` knows, as safetensors or as torch.save writes it;
        `arguments` are those of GPT that such a file does not tell, such as num_heads, and dropout,
        whatever a folder says of it. Raises UserError where there is no model, where it is of
        another architecture, where a folder contradicts an argument, and for a file that holds
        pickled code, which is never run.
        """
        return load(Path(path), **arguments)[0]

    def save_pretrained(self: GPT, folder: str | Path, tokenizer: Tokenizer | None = None) -> None:  # type: ignore[misc]
        """Writes config.json, model.safetensors and the tokenizer's file; UserError if it can't."""
        save(self, Path(folder), tokenizer)

    def push_to_hub(self: GPT, repository: str, **options: Any) -> str:  # type: ignore[misc]
        """Puts what `save_pretrained` writes into "owner/name" of the Hugging Face Hub: its URL.

        The options are those of huggingface_hub's ModelHubMixin.push_to_hub. UserError where that
        package is missing.
        """
        try:
            from huggingface_hub import ModelHubMixin
        except ImportError:
            raise UserError(
                "push_to_hub takes the package huggingface_hub: pip install 'gpt-ext[hub]'"
            ) from None
        model = self

        class OnHub(ModelHubMixin, library_name="gpt_ext"):
            def _save_pretrained(self, save_directory: Path) -> None:
                save(model, save_directory)

        url: str = OnHub().push_to_hub(repository, **options)
        return url


def save(model: GPT, folder: Path, tokenizer: Tokenizer | None = None) -> None:
    """What `GPT.save_pretrained` does."""
    check_eps(model)
    config = {"model_type": MODEL_TYPE, **dataclasses.asdict(model.config)}
    write_folder(folder, config, model.state_dict(), tokenizer)


def check_eps(model: GPT) -> None:
    """Raises UserError for norms whose eps was changed: no file of a model has a place for it."""
    default = nn.LayerNorm(1).eps
    for name, module in model.named_modules():
        eps = getattr(module, "eps", default)
        if eps != default:
            raise UserError(f"{name}.eps is {eps}, which a saved model can't tell")


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer | None,
) -> None:
    """Writes config.json, model.safetensors and tokenizer.json, each whole or not at all."""
    from gpt_ext import tokenizer as tokenizers
    from gpt_ext.checkpoint import save_weights, write_whole

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {folder}: {error.strerror}") from None
    save_weights(folder / WEIGHTS, weights)
    write_whole(folder / CONFIG, json.dumps(config, indent=2).encode())
    if tokenizer is not None:
        write_whole(folder / tokenizers.FILE, tokenizer.to_json().encode())


def load(path: Path, **arguments: Any) -> tuple[GPT, Tokenizer | None]:
    """What `GPT.from_pretrained` does; with the tokenizer of a folder that has one."""
    from gpt_ext import tokenizer as tokenizers

    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not path.is_dir():
        return _build(path, read_weights(path), arguments), None
    config = read_folder_config(path)
    kind = config.pop("model_type", None)
    if kind is None and "model" in config:
        from gpt_ext.checkpoint import load_run

        return load_run(path, **arguments)
    if kind == MODEL_TYPE:
        told = with_arguments(config, arguments, path / CONFIG)
        model = _build(path / WEIGHTS, read_weights(path / WEIGHTS), told)
    elif kind == "gpt2":
        from gpt_ext import gpt2

        told = with_arguments(gpt2.arguments_of(config, path / CONFIG), arguments, path / CONFIG)
        model = _build(path, gpt2.read_folder(path), told)
    else:
        raise UserError(f"{path / CONFIG} is of model_type {kind!r}, expected gpt_ext or gpt2")
    has_tokenizer = (path / tokenizers.FILE).is_file()
    return model, tokenizers.load_tokenizer(path) if has_tokenizer else None


def with_arguments(
    told: Mapping[str, Any], arguments: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """GPT's arguments that the file at `path` tells, and others; UserError where they contradict.

    Dropout may be another one: weights are not made for it.
    """
    for name, value in arguments.items():
        if name != "dropout" and told.get(name, value) != value:
            raise UserError(f"{path} says that {name} is {told[name]!r}, got {value!r}")
    return {**told, **arguments}


def load_with_tokenizer(path: Path) -> tuple[GPT, Tokenizer]:
    """What `load` does, for those who need the text of tokens; UserError where there is none."""
    model, tokenizer = load(path)
    if tokenizer is None:
        raise UserError(
            f"{path} has no tokenizer; to give it one: gpt-ext convert {path} FOLDER "
            "--tokenizer PATH"
        )
    return model, tokenizer


def read_folder_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder; UserError where there is none or where it is damaged."""
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} holds no model: there is no {path}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return config


def read_weights(path: Path) -> Mapping[str, Any]:
    """The content of a file of weights, safetensors by its name or else torch.save's, on the CPU.

    UserError where there is none, where it is damaged, and where it is more than tensors in plain
    containers.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that it goes on to refuse
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, and is never unpickled, as that can run any code "
            f"({' '.join(str(error).split())[:100]}...); where it was made, save the weights "
            "alone: torch.save(model.state_dict(), FILE)"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    except (KeyError, IndexError):  # of what is no pickle at all
        raise UserError(f"{path} is damaged: it is not what torch.save writes") from None
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds {type(content).__name__}, expected a state dict")
    return content


def _build(path: Path, file: Mapping[str, Any], arguments: Mapping[str, Any]) -> GPT:
    """The model of the arguments, and those the file tells, with the file's weights."""
    from gpt_ext.model import GPT

    try:
        layout, weights, told = layouts.read(file)
        told = told | dict(arguments)
        if missing := [name for name in ("num_heads", "activation") if name not in told]:
            raise ValueError(f"this {layout} state dict does not tell {' and '.join(missing)}")
        model = GPT(**told)
        model.load_state_dict(weights)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    return model.eval()
