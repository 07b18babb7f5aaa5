"""Fixtures of all tests: devices, SIMD levels, one starting state for every test, small runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

# Before torch loads OpenMP: waiting threads sleep, so that a busy machine does not slow the tests.
os.environ["OMP_WAIT_POLICY"] = "passive"
# So that what commands write is what they tell: torch's C++ warns of the machine's network.
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"

import pytest
import torch
from corpus import sentences
from devices import DEVICES
from runs import begin_run

from gpt_ext import _C, train

# A shell's background job ignores Ctrl-C, and so would the commands that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

BACKENDS = [*(f"cpu-{level}" for level in _C.supported_simd_levels()), *DEVICES[1:]]

# Warnings are errors in the tests; these torch gives itself, about its own code.
TORCH_WARNINGS = [
    "`torch.jit.script",  # forward-mode AD's decompositions, inductor
    "<class 'torch.autograd.function.Function'> should not be instantiated",  # dynamo
]


def pytest_configure(config: pytest.Config) -> None:
    for message in TORCH_WARNINGS:
        config.addinivalue_line("filterwarnings", f"ignore:{message}:DeprecationWarning")


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device there is: "cpu", and "cuda" where the build and the machine have it."""
    return request.param


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every device, the CPU once for each SIMD level it supports, which is forced meanwhile."""
    device, _, level = request.param.partition("-")
    chosen = _C.simd_level()
    if level:
        _C.set_simd_level(level)
    yield device
    _C.set_simd_level(chosen)


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    """Seeds torch's generators before each test and gives back the number of threads after it."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(same_start: None) -> None:
    """So small a model as that of `begin` gains nothing from more."""
    torch.set_num_threads(1)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(sentences(3000))
    return path


@pytest.fixture
def begin(text: Path) -> Callable[..., train.Trainer]:
    """begin("name", option=...) starts a small run in the folder of that name."""
    return partial(begin_run, text)
