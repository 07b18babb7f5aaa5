"""scripts/gpu_check on a machine without a GPU: what it runs, in what order, and what it leaves."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts/gpu_check"
H100 = json.dumps(["NVIDIA H100", [9, 0], "2.11.0+cu130", "13.0"])


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, its build's folder a new one."""
    loader = SourceFileLoader("gpu_check", str(SCRIPT))
    module = module_from_spec(spec_from_loader(loader.name, loader))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    monkeypatch.setattr(module, "BUILD", tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    return module


def steps_of(file: Path) -> dict[str, dict]:
    return {step["name"]: step for step in json.loads(file.read_text())["steps"]}


def is_running(process: str) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_device_it_stops_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "new/report.json"
    result = subprocess.run(
        [sys.executable, "-B", SCRIPT, file], capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 1
    assert result.stdout.endswith(f"no device: {file}\nfailed: device\n")
    assert list(steps_of(file)) == ["device"]
    assert json.loads(file.read_text())["passed"] is False


def test_a_step_goes_with_all_that_it_started_when_its_time_is_up(
    script: ModuleType, tmp_path: Path
) -> None:
    stubborn = "trap '' TERM; sleep 77 & echo $!; echo begun; wait; wait"
    file = tmp_path / "report.json"
    check = script.Check(file)
    assert check.step("stubborn", ["sh", "-c", stubborn], 1) is None
    step = steps_of(file)["stubborn"]
    assert (step["ok"], step["why"]) == (False, "stopped after 1 s")
    child, begun = step["tail"].split()
    assert begun == "begun"
    for _ in range(100):  # the killed go when the system gets to it
        if not is_running(child):
            break
        time.sleep(0.1)
    assert not is_running(child)


def test_each_step_is_in_the_file_at_once_and_what_finds_no_time_has_not_passed(
    script: ModuleType, tmp_path: Path
) -> None:
    file = tmp_path / "report.json"
    check = script.Check(file)
    assert check.step("good", ["echo", "well"], 5) == "well"
    assert steps_of(file)["good"]["ok"]
    assert check.step("bad", ["sh", "-c", "echo ill; exit 3"], 5) is None
    assert steps_of(file)["bad"]["why"] == "exit status 3"
    assert steps_of(file)["bad"]["tail"] == "ill"
    assert check.step("none", ["no-such-program"], 5) is None
    check.deadline = time.monotonic()
    assert check.step("late", ["echo"], 5) is None
    assert steps_of(file)["late"]["why"] == "no time was left"
    assert json.loads(file.read_text())["passed"] is False


def planned(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> dict[str, tuple[list[str], str | None]]:
    """The commands of a run on an H100 where everything passes, each with its architectures."""
    commands = {}

    def run(command: list[str], seconds: float) -> tuple[str, str]:
        commands[name[0]] = command, os.environ.get("TORCH_CUDA_ARCH_LIST")
        return "", H100

    name = [""]
    step = script.Check.step

    def named(self, step_name: str, *rest) -> str | None:
        name[0] = step_name
        return step(self, step_name, *rest)

    (tmp_path / "CMakeCache.txt").write_text("benchmark_DIR:PATH=/there\n")
    monkeypatch.setattr(script.Check, "step", named)
    monkeypatch.setattr(script, "run", run)
    monkeypatch.setattr(script.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(script.signal, "signal", lambda *_: None)
    file = tmp_path / "report.json"
    monkeypatch.setattr(sys, "argv", ["gpu_check", str(file), *arguments])
    assert script.main() == 0
    assert json.loads(file.read_text())["passed"] is True
    return commands


def test_the_devices_own_architecture_alone_is_compiled(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = planned(script, tmp_path, monkeypatch)
    assert commands["extension"][1] == "9.0a"
    assert "-DCMAKE_CUDA_ARCHITECTURES=90a-real" in commands["native: configure"][0]


def test_tests_come_first_and_the_sanitizer_takes_what_time_is_left(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = list(planned(script, tmp_path, monkeypatch))
    first = ["device", "extension", "pytest", "native: configure", "native: build", "native: tests"]
    assert names[:6] == first
    last = [
        f"{tool}: {test}"
        for tool in ("memcheck", "racecheck", "synccheck")
        for test in script.NATIVE_TESTS
    ]
    assert names[-len(last) :] == last
    sanitizer = planned(script, tmp_path, monkeypatch, "--only", "sanitizer")
    assert [*sanitizer][4:] == last
    assert sanitizer.keys().isdisjoint({"pytest", "native: tests", *script.BENCHMARKS})


def test_every_test_with_a_device_is_among_those_it_runs(script: ModuleType) -> None:
    fixtures = re.compile(r"\b(device|backend|graph_device): str\b")
    files = {f for f in (ROOT / "tests").rglob("test_*.py") if fixtures.search(f.read_text())}
    chosen = {ROOT / path for path in script.CUDA_TESTS}
    assert all(path.exists() for path in chosen)
    assert [file for file in files if not {file, *file.parents} & chosen] == []


def test_what_it_runs_is_there(script: ModuleType) -> None:
    for test in script.NATIVE_TESTS:
        assert (ROOT / "tests/native" / test.replace("_device", "_cuda.cpp")).exists()
    commands = [shlex.split(command) for command, _ in script.BENCHMARKS.values()]
    for program in {program for program, *_ in commands}:
        run = [sys.executable, ROOT / "benchmarks" / program, "--help"]
        help = subprocess.run(run, capture_output=True, text=True, check=True).stdout
        given = {"--device", "--rounds", "--json"}.union(*(c for c in commands if c[0] == program))
        assert [word for word in given if word.startswith("--") and word not in help] == []
