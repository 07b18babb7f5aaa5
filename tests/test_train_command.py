"""`gpt-ext train` as a person uses it: config files, Ctrl-C, a full disk, a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from corpus import sentences
from shell import COMMAND, ENVIRONMENT, SMALL, assert_one_error, gpt_ext, open_gpt_ext

from gpt_ext import cli
from gpt_ext.options import TrainOptions


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(sentences(3000))
    return path


def test_a_config_file_gives_options_and_the_command_line_goes_before_it(
    text: Path, tmp_path: Path
) -> None:
    config = tmp_path / "run.toml"
    config.write_text(f"""
        data = "{text}"
        steps = 9
        context_length = 8
        model_dim = 16
        num_heads = 2
        activation = "gelu"
        learning_rate = 2e-3
        qkv_bias = true
    """)
    run = tmp_path / "run"
    result = gpt_ext("train", "--steps=3", "--config", config, "--out", run, "--num-blocks", "1")
    assert result.returncode == 0, result.stderr
    saved = json.loads((run / "config.json").read_text())
    assert saved["model"] == {
        "context_length": 8, "model_dim": 16, "num_blocks": 1, "num_heads": 2,
        "dropout": 0.0, "activation": "gelu", "qkv_bias": True,
    }  # fmt: skip
    assert saved["train"] == asdict(TrainOptions(steps=3, learning_rate=2e-3))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*run.toml: No such file or directory"),
        ("steps 9", "run.toml is not TOML: .*line 1"),
        ("step = 9", "run.toml has an option that train does not know: step"),
        ("steps = 'many'", 'steps": Expected a .*int.*many'),
        ("steps = [9]", 'steps": Expected a .*int'),
    ],
)
def test_config_files_that_cannot_be(tmp_path: Path, content: str | None, message: str) -> None:
    config = tmp_path / "run.toml"
    if content is not None:
        config.write_text(content)
    assert_one_error(gpt_ext("train", "--config", config, "--out", tmp_path / "run"), message)


def test_tensorboard_reads_what_is_logged_and_nothing_twice(text: Path, tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = tmp_path / "run"
    options = ["--steps", "1000000", "--log-every", "5", "--eval-every", "5"]
    command = ["train", "--data", text, "--out", run, "--tensorboard", "true", *SMALL, *options]
    interrupted(*command)
    interrupted("train", "--resume", run)
    read = events.EventAccumulator(str(run / "tensorboard"))
    read.Reload()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for key in ("loss", "learning_rate", "gradient_norm", "validation_loss"):
        shown = [(event.step, event.value) for event in read.Scalars(key)]
        expected = [(record["step"], record[key]) for record in records if key in record]
        assert shown == [(step, pytest.approx(value)) for step, value in expected]


def test_without_tensorboard_a_run_that_wants_it_does_not_begin(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    run = tmp_path / "run"
    assert cli.main(["train", "--data", str(text), "--out", str(run), "--tensorboard=true"]) == 2
    assert "no TensorBoard: pip install 'gpt-ext[tensorboard]'" in capsys.readouterr().err
    assert not run.exists()


def interrupted(*arguments: str | Path) -> tuple[int, list[str]]:
    """Exit code and lines of a training that gets Ctrl-C after its first line of progress."""
    with open_gpt_ext(*arguments) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        assert lines[1].startswith("step "), lines
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert stderr == ""
    return process.returncode, [*lines, *stdout.splitlines()]


def test_ctrl_c_saves_and_resume_goes_on(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    endless = ["--steps", "1000000", "--log-every", "5", "--eval-every", "1000000"]
    code, lines = interrupted("train", "--data", text, "--out", run, *SMALL, *endless)
    assert code == 130
    told = re.fullmatch(
        rf"stopped with step (\d+) saved; to go on: gpt-ext train --resume {run}", lines[-1]
    )
    assert told
    assert int(told[1]) >= 5
    assert gpt_ext("generate", run, "--length", "5").returncode == 0

    code, lines = interrupted("train", "--resume", run)
    assert code == 130
    step = re.match(r"step (\d+)/", lines[1])
    assert step
    assert int(told[1]) < int(step[1]) <= int(told[1]) + 5
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


def test_a_full_disk_is_one_error_and_leaves_nothing_half_written(
    text: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands in for the disk: the config fits, the weights don't."""
    run = tmp_path / "run"
    train = ["train", "--data", text, "--out", run, "--steps", "8", "--eval-every", "4", *SMALL]
    result = subprocess.run(
        ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh", *COMMAND, *map(str, train)],
        capture_output=True, encoding="utf-8", timeout=120, env=ENVIRONMENT,
    )  # fmt: skip
    assert result.returncode == 2
    assert result.stderr == f"gpt-ext: error: cannot write {run}/best.safetensors: File too large\n"
    names = sorted(path.name for path in run.iterdir())
    assert names == ["config.json", "metrics.jsonl", "tokenizer.json"]
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 1


def test_on_a_terminal_there_is_a_bar(text: Path, tmp_path: Path) -> None:
    master, slave = pty.openpty()
    command = ["train", "--data", text, "--out", tmp_path / "run", "--steps", "30", *SMALL]
    with open_gpt_ext(*command, stdout=slave, env=ENVIRONMENT | {"TERM": "xterm"}) as process:
        os.close(slave)
        shown = bytearray()
        while True:
            try:
                shown += os.read(master, 4096)
            except OSError:  # EIO: the other end is closed
                break
    os.close(master)
    assert process.returncode == 0
    screen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert re.search(r"30/30 ━+ loss \d\.\d+ [\d,]+ tokens/s 0:00:00 left", screen), screen
    assert "step 10/30" not in screen
