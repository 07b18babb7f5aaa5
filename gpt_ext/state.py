"""Checkpoints of a run: all that going on takes, in RUN/checkpoints/STEP, whole or absent.

torch.distributed.checkpoint writes them, each process its part, and reads them into any number of
processes. They hold tensors and nothing else, and reading one runs no code of it.
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import EnumMeta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from gpt_ext.checkpoint import sync_folder
from gpt_ext.distributed import World
from gpt_ext.errors import UserError

FOLDER = "checkpoints"


def save(run: Path, step: int, tensors: Mapping[str, Tensor], world: World, keep: int) -> None:
    """Writes the checkpoint of `step`, and drops all but the newest `keep`; all processes call it.

    A program killed meanwhile leaves the ones before it, and a folder `.STEP.tmp`, which `clean`
    removes. UserError where it can't be written.
    """
    final = run / FOLDER / f"{step:08}"
    temporary = final.with_name(f".{final.name}.tmp")

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def finish() -> None:
        os.replace(temporary, final)
        sync_folder(final.parent)
        for old in steps(run)[:-keep]:
            _remove(run / FOLDER / f"{old:08}")

    try:
        world.first(begin)
        with _no_warning_of_one_process():
            writer = dcp.FileSystemWriter(temporary, sync_files=True)
            dcp.save(dict(tensors), storage_writer=writer, no_dist=world.size == 1)
        world.first(finish)
    except (CheckpointException, OSError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"cannot write {final}: {_cause(error)}") from None


def load(run: Path, tensors: Mapping[str, Tensor], world: World) -> None:
    """Fills `tensors` from the newest checkpoint; UserError if there is none or it is damaged."""
    if not (found := steps(run)):
        raise UserError(
            f"{run} can't be resumed: it stopped before its first checkpoint; "
            "remove it to begin anew"
        )
    path = run / FOLDER / f"{found[-1]:08}"
    try:
        with _no_warning_of_one_process():
            reader = _Reader(path)
            reader.read_metadata()  # its errors, which dcp.load would wrap and log
            dcp.load(dict(tensors), storage_reader=reader, no_dist=world.size == 1)
    except (CheckpointException, OSError, EOFError, pickle.UnpicklingError) as error:
        before = f"; without it, {run} goes on from step {found[-2]}" if found[1:] else ""
        raise UserError(f"{path} is damaged: {_cause(error)}{before}") from None


def steps(run: Path) -> list[int]:
    """The steps of the checkpoints that a run has, the newest last."""
    return sorted(int(path.name) for path in (run / FOLDER).glob("[0-9]*"))


def clean(run: Path) -> None:
    """Removes what a killed program left half-written."""
    for path in [*run.glob(".*.tmp"), *(run / FOLDER).glob(".*.tmp")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove(path: Path) -> None:
    """Of a folder that is half removed only the hidden name may be seen."""
    hidden = path.with_name(f".{path.name}.tmp")
    os.replace(path, hidden)
    shutil.rmtree(hidden)


def _cause(error: BaseException) -> str:
    """What went wrong, in a few words; in the first process of several that told it."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    told = error.strerror if isinstance(error, OSError) else None
    if "inline_container" in str(error):  # what torch makes of a file that is cut short
        told = "it could not be written whole; the disk may be full"
    return told or " ".join(str(error).split()) or type(error).__name__


@contextmanager
def _no_warning_of_one_process() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


class _Reader(dcp.FileSystemReader):
    """Reads .metadata, which is a pickle, without running what it may hold."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
        entries = metadata.state_dict_metadata
        if not all(isinstance(entry, TensorStorageMetadata) for entry in entries.values()):
            raise pickle.UnpicklingError("it holds more than tensors")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def _member(owner: object, name: str) -> Any:
    if isinstance(owner, EnumMeta) and name in list(owner.__members__):
        return owner[name]
    raise pickle.UnpicklingError("it would run builtins.getattr")


class _Unpickler(pickle.Unpickler):
    ALLOWED = frozenset({
        "pathlib.PosixPath",
        "torch.Size",
        "torch.serialization._get_layout",
        "torch.distributed.checkpoint.filesystem._StorageInfo",
        *(f"torch.distributed.checkpoint.metadata.{name}" for name in (
            "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )),
        *(str(dtype) for dtype in (torch.float32, torch.float64, torch.int64)),
    })  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member  # Python 3.11.0 to 3.11.3 name the members of an enum by it
        if f"{module}.{name}" not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it would run {module}.{name}")
        return super().find_class(module, name)
