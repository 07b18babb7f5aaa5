"""The command line as a person uses it: in processes of its own, on real files."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from corpus import sentences
from shell import SMALL, assert_one_error, gpt_ext, open_gpt_ext

from gpt_ext import build_info, checkpoint, cli, demo
from gpt_ext.options import ModelOptions, TrainOptions
from gpt_ext.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(sentences(3000))
    return path


@pytest.fixture(scope="module")
def trained(text: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run made by the command line, and what that printed."""
    run = text.parent / "run"
    command = ["train", "--data", text, "--out", run, "--steps", "40", "--eval-every", "20"]
    return run, gpt_ext(*command, "--log-every", "10", *SMALL)


def test_train_tells_its_progress_and_leaves_a_run(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run, result = trained
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert re.fullmatch(r"[\d,]+ parameters, \d+ distinct tokens", lines[0])
    assert re.fullmatch(r"step 10/40  loss \d\.\d+  [\d,]+ tokens/s  \d+ s left", lines[1])
    assert re.fullmatch(r"step 20/40  validation loss \d\.\d+", lines[3])
    assert lines[-1] == f"done; to write with it: gpt-ext generate {run}"
    names = {path.name for path in run.iterdir()}
    files = {"config.json", "tokenizer.json", "metrics.jsonl", "checkpoints"}
    assert names - {"curves.png"} == files | {"best.safetensors", "last.safetensors"}
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "pip install 'gpt-ext[plot]'" in result.stdout
    else:
        assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    config = json.loads((run / "config.json").read_text())
    assert config["model"] == {
        "context_length": 16, "model_dim": 16, "num_blocks": 1, "num_heads": 2,
        "dropout": 0.0, "activation": "relu", "qkv_bias": False,
    }  # fmt: skip
    assert config["train"]["steps"] == 40


def test_generate_goes_on_from_the_prompt_by_its_seed(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    run, _ = trained
    options = ["--prompt", "The king", "--length", "60", "--temperature", "0.9", "--top-k", "5"]
    first, again, other = (
        gpt_ext("generate", run, *options, "--seed", seed) for seed in ("1", "1", "2")
    )
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert first.stdout.startswith("The king")
    assert len(first.stdout) == len("The king") + 60 + 1
    assert first.stdout == again.stdout != other.stdout


def test_generate_streams_and_ctrl_c_ends_it_without_a_traceback(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    with open_gpt_ext("generate", trained[0], "--length", "1000000") as process:
        assert process.stdout is not None
        assert len(process.stdout.read(50)) == 50
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == ""


def test_a_reader_that_has_enough_ends_it_quietly(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    with open_gpt_ext("generate", trained[0], "--length", "1000000") as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(5)
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 1


def test_training_that_nobody_listens_to_any_more_is_saved(text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with open_gpt_ext(
        *("train", "--data", text, "--out", run, *SMALL, "--steps", "1000000", "--log-every", "1")
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 130
    (step,) = (run / "checkpoints").iterdir()
    assert int(step.name) > 0


def test_a_closed_stdout_is_no_error() -> None:
    command = f"{sys.executable} -m gpt_ext doctor >&-"
    result = subprocess.run(command, shell=True, stderr=subprocess.PIPE, timeout=60, check=True)
    assert result.stderr == b""


def test_generate_into_a_full_disk(trained: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    with (
        open("/dev/full", "w") as full,
        open_gpt_ext("generate", trained[0], stdout=full) as process,
    ):
        _, stderr = process.communicate(timeout=60)
    assert stderr == "gpt-ext: error: [Errno 28] No space left on device\n"
    assert process.returncode == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "The kïng"], r"can't go on from 'The kïng': character 'ï' at position 5 "),
        (["--prompt", ""], "can't go on from '': the prompt is empty"),
        (["--temperature", "-1"], "temperature must be finite and not negative, got -1"),
        (["--top-k", "0"], "top_k must be at least 1, got 0"),
        (["--length", "-5"], "length must not be negative, got -5"),
        (
            ["--seed", str(2**64)],
            r"seed must be from -2\^63 to 2\^64 - 1, got 18446744073709551616",
        ),
        (["--length", "many"], "length.*Expected a.*int.*many"),
        (["--lenght", "5"], "unrecognized arguments: --lenght"),
    ],
)
def test_generate_with_options_that_cannot_be(
    trained: tuple[Path, subprocess.CompletedProcess[str]], options: list[str], message: str
) -> None:
    assert_one_error(gpt_ext("generate", trained[0], *options), message)


def test_generate_from_what_is_no_run_or_a_damaged_one(
    trained: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    assert_one_error(gpt_ext("generate", tmp_path / "none"), "none does not exist")
    assert_one_error(gpt_ext("generate", tmp_path), "holds no model: there is no .*config.json")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("config.json", "tokenizer.json", "best.safetensors"):
        (damaged / name).write_bytes((trained[0] / name).read_bytes())
    os.truncate(damaged / "best.safetensors", 5000)
    assert_one_error(gpt_ext("generate", damaged), "best.safetensors is damaged")
    config = json.loads((damaged / "config.json").read_text())
    config["model"]["model_dim"] = 32
    (damaged / "config.json").write_text(json.dumps(config))
    (damaged / "best.safetensors").write_bytes((trained[0] / "best.safetensors").read_bytes())
    assert_one_error(gpt_ext("generate", damaged), r"does not fit .*wants GPT\(model_dim=16\)")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (None, [], "data does not exist"),
        (b"", [], "data is empty"),
        (b"\x89PNG\r\n\x1a\n\0\0", [], "data is binary, not text: zero byte at offset 8"),
        (b"caf\xe9", [], "data is not UTF-8 text: byte 0xe9 at offset 3"),
        (b"too short", [], "the data is too short: 8 tokens for training, .* needs at least 17"),
        (b"long enough " * 99, ["--num-heads", "3"], "num_heads must divide model_dim"),
        (b"long enough " * 99, ["--steps", "0"], "steps must be above 0, got 0"),
        (b"long enough " * 99, ["--activation", "tanh"], "activation.*Expected.*tanh"),
    ],
)
def test_train_with_what_cannot_be_trained_on_leaves_nothing(
    tmp_path: Path, content: bytes | None, options: list[str], message: str
) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    if content is not None:
        data.write_bytes(content)
    assert_one_error(gpt_ext("train", "--data", data, "--out", run, *SMALL, *options), message)
    assert not run.exists()


def test_train_says_what_it_needs(
    text: Path, trained: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    run, _ = trained
    assert_one_error(gpt_ext("train"), "needs --data PATH and --out RUN, or --resume RUN")
    assert_one_error(gpt_ext("train", "--data", tmp_path, "--out", tmp_path), "is a folder without")
    assert_one_error(
        gpt_ext("train", "--data", text, "--out", run, *SMALL),
        f"{run} exists already; to go on with it: gpt-ext train --resume {run}",
    )
    assert_one_error(gpt_ext("train", "--resume", run), "has done all its 40 steps")
    with checkpoint.claimed(run):
        assert_one_error(gpt_ext("train", "--resume", run), f"another process trains in {run}")
    for steps in ("80", str(TrainOptions().steps)):
        assert_one_error(
            gpt_ext("train", "--resume", run, "--steps", steps), "takes its options from the run"
        )
    assert_one_error(gpt_ext("train", "--resume", tmp_path), "is no run")
    assert_one_error(gpt_ext("train", "--data", text, "--out", text), "exists already, and is no")
    device = gpt_ext("train", "--data", text, "--out", tmp_path / "new", "--device", "meta")
    assert_one_error(device, "device 'meta' can't be used: it is neither cpu nor cuda")
    assert_one_error(gpt_ext("attention", run, "the king", "--out", ""), "it names no file")


def test_inspect_tells_what_a_run_is_and_takes(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    result = gpt_ext("inspect", trained[0])
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    told = dict(re.split(r": +", line.strip(), maxsplit=1) for line in result.stdout.splitlines())
    assert told["model"] == "1 blocks of width 16, 2 heads"
    assert told["trained"] == "40 of 40 steps"
    parameters = re.match(r"([\d,]+) parameters", trained[1].stdout)
    assert parameters
    assert told["parameters"] == parameters[1]
    validation = re.findall(r"validation loss (.*)", trained[1].stdout)
    assert told["best validation loss"] == min(validation)
    vocabulary = len(load_tokenizer(trained[0]))
    assert told["context"] == f"16 tokens out of {vocabulary}"
    flops = 2 * (12 * 16 * 16 + 16 * vocabulary) + 2 * 17 * 16
    assert told["FLOPs a token"] == f"{flops:,} forward, {3 * flops:,} to train on it"
    assert re.fullmatch(r"[1-9][\d,]* tokens/s", told["training here"])
    assert re.fullmatch(r"[1-9][\d,]* tokens/s within the context", told["generation here"])


def test_attention_is_drawn(
    trained: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    picture = tmp_path / "a.png"
    result = gpt_ext("attention", trained[0], "The king", "--out", picture)
    assert result.returncode == 0, result.stderr
    assert (result.stdout, result.stderr) == (f"drawn: {picture}\n", "")
    drawn = picture.read_bytes()
    assert drawn.startswith(b"\x89PNG")
    model = tmp_path / "model"
    assert gpt_ext("convert", trained[0], model).returncode == 0
    assert gpt_ext("attention", model, "The king", "--out", picture).returncode == 0
    assert picture.read_bytes() == drawn


@pytest.mark.parametrize(
    ("read", "message"),
    [
        ("", "can't read '': there is nothing to look at"),
        ("The kïng", "can't read 'The kïng': character 'ï' at position 5 "),
        ("The king " * 9, "tokens reach position 81, beyond context_length=16"),
    ],
)
def test_attention_over_what_cannot_be_read(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
    tmp_path: Path,
    read: str,
    message: str,
) -> None:
    picture = tmp_path / "a.png"
    assert_one_error(gpt_ext("attention", trained[0], read, "--out", picture), message)
    assert not picture.exists()


def test_doctor_tells_a_simd_level_that_is_none() -> None:
    command = [sys.executable, "-m", "gpt_ext", "doctor"]
    environment = os.environ | {"GPT_EXT_SIMD": "sse9"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert_one_error(result, "SIMD level 'sse9' is not supported here; expected one of: scalar")


def test_doctor_tells_the_build() -> None:
    result = gpt_ext("doctor")
    assert result.returncode == 0, result.stderr
    told = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    facts = build_info()
    assert told.keys() == facts.keys()
    assert told["version"] == facts["version"]
    assert told["simd_level"] == facts["simd_level"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a command, one of prepare, train, generate, .*, doctor; got none"),
        (["fly"], "expected a command, one of prepare, .*, doctor; got 'fly'"),
        (["--fly"], "unrecognized arguments: --fly"),
    ],
)
def test_commands_that_are_none(arguments: Sequence[str], message: str) -> None:
    assert_one_error(gpt_ext(*arguments), message)


def test_help_lists_commands_and_options() -> None:
    for arguments, words in (
        ([], ["train", "generate", "inspect", "attention", "demo", "doctor"]),
        (["train"], ["--data", "--out", "--resume", "--model-dim", "--learning-rate", "AdamW"]),
        (["generate"], ["run", "--prompt", "--length", "--temperature", "--top-k", "--seed"]),
    ):
        result = gpt_ext(*arguments, "--help")
        assert result.returncode == 0
        assert all(word in result.stdout for word in words)


def test_the_demo_learns_and_writes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "MODEL", ModelOptions(16, 16, 1, 2))
    monkeypatch.setattr(demo, "TRAIN", TrainOptions(steps=20, batch_size=4, eval_every=10))
    assert cli.main(["demo"]) == 0
    told = capsys.readouterr().out
    assert re.match(r"learning from [\d,]+ bytes of Python's documentation\n", told)
    written = told.split("what the model writes:\n\n")[1]
    assert written.startswith("The ")
    assert len(written) > 600


def test_without_pydocs_topics_the_demo_reads_docstrings(monkeypatch: pytest.MonkeyPatch) -> None:
    topics = demo.standard_library_text()
    assert len(topics) > 300_000
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    docstrings = demo.standard_library_text()
    assert docstrings != topics
    assert len(docstrings) > 300_000
    assert len(set(docstrings)) < 128


def test_importing_gpt_ext_needs_torch_only() -> None:
    extras = ("safetensors", "rich", "jsonargparse", "matplotlib", "yaml")
    code = f"import sys, gpt_ext; print([name for name in {extras} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert result.stdout == "[]\n", result.stderr
