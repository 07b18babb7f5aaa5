"""Data sets that tests make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt_ext.data import DataSet
from gpt_ext.prepare import PrepareOptions, prepare


def made(tmp_path: Path, *inputs: Path | str, **options: Any) -> DataSet:
    return prepare(PrepareOptions(tuple(map(str, inputs)), str(tmp_path / "out"), **options))


def all_tokens(dataset: DataSet) -> Tensor:
    return torch.cat((dataset.training, dataset.validation)).long()
