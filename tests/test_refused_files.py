"""Files without a model, damaged ones, and those that hold code."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import Course
from foreign import SIZES, hugging_face
from safetensors.torch import save_file

from gpt_ext import GPT
from gpt_ext.errors import UserError


class Trap:
    """Pickled, it makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def saved_with_a_trap(path: Path, trap: Trap) -> None:
    torch.save({"model": {"wte.weight": torch.zeros(1)}, "config": trap}, path)


def in_the_old_format(path: Path, trap: Trap) -> None:
    torch.save(trap, path, _use_new_zipfile_serialization=False)


def bare_pickle(path: Path, trap: Trap) -> None:
    path.write_bytes(pickle.dumps({"model": trap}))


@pytest.mark.parametrize("save", [saved_with_a_trap, in_the_old_format, bare_pickle])
@pytest.mark.parametrize("name", ["ckpt.pt", "pytorch_model.bin"])
def test_code_in_a_file_is_told_and_never_run(
    tmp_path: Path, save: Callable[[Path, Trap], None], name: str
) -> None:
    hugging_face().config.save_pretrained(tmp_path)
    save(tmp_path / name, Trap(tmp_path / "sprung"))
    path = tmp_path if name.endswith("bin") else tmp_path / name
    with pytest.raises(UserError, match=r"never unpickled.*torch\.save\(model\.state_dict\(\)"):
        GPT.from_pretrained(path)
    assert not (tmp_path / "sprung").exists()


def test_a_whole_pickled_model_is_refused(tmp_path: Path) -> None:
    torch.save(GPT(**SIZES), tmp_path / "model.pt")
    with pytest.raises(UserError, match="never unpickled"):
        GPT.from_pretrained(tmp_path / "model.pt")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_damage_is_told(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights.{suffix}"
    state = Course(**SIZES).state_dict()
    save_file(state, path) if suffix == "safetensors" else torch.save(state, path)
    cut(path)
    with pytest.raises(UserError, match=rf"weights\.{suffix} is damaged"):
        GPT.from_pretrained(path)
    for content in (b"", b"abc", b"hello world", b"\x80\x02."):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"weights\.{suffix} is damaged"):
            GPT.from_pretrained(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "weights.pt holds list, expected a state dict"),
        ({"a": torch.zeros(1)}, "weights.pt: the state dict is of no known layout; closest is"),
        (
            GPT(**SIZES).state_dict() | {"token_embedding.weight": torch.tensor(1.0)},
            r"weights.pt: token_embedding.weight has shape \(\), expected 2-D",
        ),
        ({"model": {"a": 3}}, "weights.pt: expected a state dict, names -> tensors"),
    ],
)
def test_files_without_a_model(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=message):
        GPT.from_pretrained(tmp_path / "weights.pt")


def test_paths_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none does not exist"):
        GPT.from_pretrained(tmp_path / "none")
    with pytest.raises(UserError, match=r"holds no model: there is no .*config\.json"):
        GPT.from_pretrained(tmp_path)
    for content, message in (("{", "is damaged: Expecting"), ("[]", "damaged: it holds no object")):
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=message):
            GPT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="is damaged: it has no 'n_embd'"):
        GPT.from_pretrained(tmp_path)
    hugging_face().config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"holds none of model\.safetensors, pytorch_model\.bin"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    with pytest.raises(UserError, match=r"index\.json is damaged"):
        GPT.from_pretrained(tmp_path)


def test_an_index_reaches_nothing_outside_its_folder(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    hugging_face().save_pretrained(inside)
    (inside / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = {"weight_map": {"transformer.wte.weight": "../outside.safetensors"}}
    (inside / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"inside/outside\.safetensors does not exist"):
        GPT.from_pretrained(inside)
