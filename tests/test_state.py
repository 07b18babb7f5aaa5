"""Checkpoints: whole or absent, the last few kept, and damage told."""

from __future__ import annotations

import os
import pickle
import shutil
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt_ext import state
from gpt_ext.distributed import World
from gpt_ext.errors import UserError


def tensors(value: float) -> dict[str, Tensor]:
    return {"weight": torch.full((3, 4), value), "progress": torch.tensor([int(value), 0])}


def save(run: Path, *steps: int, keep: int = 2) -> None:
    for step in steps:
        state.save(run, step, tensors(float(step)), World(), keep)


def loaded(run: Path) -> dict[str, Tensor]:
    filled = tensors(0.0)
    state.load(run, filled, World())
    return filled


def test_the_newest_checkpoint_is_read_and_the_last_few_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 5, 10, 15, 100_000_000, keep=3)
    assert state.steps(tmp_path) == [10, 15, 100_000_000]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "00000010", "00000015", "100000000",
    ]  # fmt: skip
    filled = loaded(tmp_path)
    assert torch.equal(filled["weight"], torch.full((3, 4), 1e8))
    assert filled["progress"].tolist() == [100_000_000, 0]


def test_without_a_checkpoint_there_is_no_going_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it stopped before its first checkpoint"):
        loaded(tmp_path)


def test_what_a_killed_program_left_is_not_taken_for_a_checkpoint_and_removed(
    tmp_path: Path,
) -> None:
    save(tmp_path, 5)
    shutil.copytree(tmp_path / "checkpoints/00000005", tmp_path / "checkpoints/.00000010.tmp")
    (tmp_path / ".last.safetensors.tmp").touch()
    assert state.steps(tmp_path) == [5]
    state.clean(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["00000005"]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_on_a_full_disk_the_checkpoints_before_stay_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    save(tmp_path, 5, 10)

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full_disk)
        with pytest.raises(UserError, match=r"cannot write .*00000015: No space left on device"):
            save(tmp_path, 15)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00000005", "00000010"]
    assert loaded(tmp_path)["progress"].tolist() == [10, 0]


@pytest.mark.parametrize(
    ("name", "size"), [(".metadata", 0), (".metadata", 50), ("__0_0.distcp", 99)]
)
def test_a_truncated_checkpoint_is_told_with_the_one_before(
    tmp_path: Path, name: str, size: int
) -> None:
    save(tmp_path, 5, 10)
    os.truncate(tmp_path / "checkpoints/00000010" / name, size)
    with pytest.raises(
        UserError, match=r"checkpoints/00000010 is damaged: .*; without it, .* goes on from step 5"
    ):
        loaded(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints/00000010")
    assert loaded(tmp_path)["progress"].tolist() == [5, 0]


def test_a_file_that_is_gone_is_told(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (tmp_path / "checkpoints/00000005/__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"00000005 is damaged: No such file or directory$"):
        loaded(tmp_path)


def test_tensors_of_another_shape_or_name_are_told(tmp_path: Path) -> None:
    save(tmp_path, 5)
    for other in ({"weight": torch.zeros(3, 5)}, {"bias": torch.zeros(3)}):
        with pytest.raises(UserError, match=r"00000005 is damaged: .*(weight|bias)"):
            state.load(tmp_path, other, World())


class ByName(pickle.Pickler):
    """Names an enum's members as Python 3.11.0 to 3.11.3 do."""

    def reducer_override(self, thing: object) -> Any:
        return (getattr, (type(thing), thing.name)) if isinstance(thing, Enum) else NotImplemented


def test_what_the_first_pythons_3_11_wrote_is_read(tmp_path: Path) -> None:
    save(tmp_path, 5)
    metadata = tmp_path / "checkpoints/00000005/.metadata"
    content = pickle.loads(metadata.read_bytes())
    with open(metadata, "wb") as file:
        ByName(file).dump(content)
    assert b"getattr" in metadata.read_bytes()
    loaded(tmp_path)


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_no_code_of_a_checkpoint_is_run(tmp_path: Path) -> None:
    save(tmp_path, 5)
    metadata = tmp_path / "checkpoints/00000005/.metadata"
    metadata.write_bytes(pickle.dumps(Evil(tmp_path / "harm")))
    with pytest.raises(UserError, match="00000005 is damaged: it would run "):
        loaded(tmp_path)
    assert not (tmp_path / "harm").exists()


def test_objects_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    """torch.distributed.checkpoint would unpickle them."""
    evil: Any = {"weight": Evil(tmp_path / "harm")}
    state.save(tmp_path, 5, evil, World(), keep=1)
    with pytest.raises(UserError, match="00000005 is damaged: "):
        loaded(tmp_path)
    assert not (tmp_path / "harm").exists()
