"""Every snippet of the documents runs, in the order of its document, in a folder of the document's.

What becomes of a block is said by its language:

    python      runs, in one namespace a document; where it has >>>, its output is compared
    bash        runs, and must succeed
    console     runs what follows `$ `, and compares its output; ... stands for anything
    toml        is written to the file that its first line names
    cpp         likewise, and must compile
    text        is there to be read, and so is what is indented; no command begins it

The HTML comment `<!-- skip: next "why" -->` leaves the next block out, and one that begins
`<!-- invisible-code: bash` holds a block that readers need not see. What trains is told to take few
steps of a small model, whatever the document says (`PRELUDE`).
"""

from __future__ import annotations

import doctest
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import SkipTest

import pytest
from sybil import Example, Sybil
from sybil.evaluators.doctest import OutputChecker
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from gpt_ext.demo import standard_library_text

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/*.md", "benchmarks/*.md") for path in ROOT.glob(pattern)
)
# Fences of other languages than those that run: text, and what Sphinx alone understands.
NOT_RUN = re.compile(r"text|cmake|\{[a-z-]+\}.*")
COMMANDS = ("gpt-ext", "make", "pip", "python", "torchrun", "cmake", "zcat", "$", ">>>", "import")

# A run of four steps, whose last checkpoint is taken away: one that was stopped, and can go on.
PRELUDE = """
set -eo pipefail
small=(--steps 4 --eval-every 2 --eval-batches 1 --batch-size 4 --context-length 16)
small+=(--model-dim 96 --num-blocks 1)  # as wide as the texts have characters, for GPT-2
run() {
  case " $* " in
    *" train --resume "*) command "$@" ;;
    *" train "*) command "$@" "${small[@]}"; rm -r runs/*/checkpoints/*4 ;;
    *) command "$@" ;;
  esac
}
gpt-ext() { run gpt-ext "$@"; }
torchrun() { run torchrun "$@"; }
"""


def run_bash(script: str) -> subprocess.CompletedProcess[str]:
    """Runs in the current folder, with the commands of the environment that the tests run in."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        ["bash", "-c", PRELUDE + script], env=environment, encoding="utf-8",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def evaluate_bash(example: Example) -> str | None:
    done = run_bash(example.parsed)
    return f"exit code {done.returncode}:\n{done.stdout}" if done.returncode else None


# Of a console's block, each command and its output.
COMMAND_AND_OUTPUT = re.compile(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", re.MULTILINE)


def evaluate_console(example: Example) -> str | None:
    checker = OutputChecker()
    for command, expected in COMMAND_AND_OUTPUT.findall(example.parsed):
        output = run_bash(command).stdout
        if not checker.check_output(expected, output, doctest.ELLIPSIS):
            return f"$ {command}\nexpected:\n{expected}got:\n{output}"
    return None


def write_file(example: Example) -> Path:
    """Writes what begins with a comment that is a path."""
    path = Path(example.parsed.split(maxsplit=2)[1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(example.parsed)
    return path


def evaluate_toml(example: Example) -> None:
    write_file(example)


def evaluate_cpp(example: Example) -> str | None:
    compiler = shutil.which("c++")
    if compiler is None:
        raise SkipTest("no C++ compiler on this machine")
    folders = ["csrc", ROOT / "csrc", ROOT / "tests/native/cuda_on_host"]
    flags = ["-std=c++20", "-fopenmp", "-fsyntax-only", *(f"-I{folder}" for folder in folders)]
    done = subprocess.run(
        [compiler, *flags, "-x", "c++", write_file(example)], capture_output=True, text=True
    )
    return done.stderr if done.returncode else None


EVALUATORS = {
    "bash": evaluate_bash,
    "console": evaluate_console,
    "toml": evaluate_toml,
    "cpp": evaluate_cpp,
}
SYBIL = Sybil(
    [
        SkipParser(),
        PythonCodeBlockParser(doctest_optionflags=doctest.ELLIPSIS),
        *(CodeBlockParser(language, evaluate) for language, evaluate in EVALUATORS.items()),
    ]
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with the texts that documents speak of."""
    text = standard_library_text()[:20_000]
    for name in ("book.txt", "more.txt", "books/one.txt", "texts/one.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "posts.jsonl").write_text(json.dumps({"text": text}) + "\n")
    (tmp_path / "huge.txt.gz").write_bytes(gzip.compress(text.encode()))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_snippets_run(path: Path) -> None:
    for example in SYBIL.parse(path).examples():
        try:
            example.evaluate()
        except SkipTest as reason:
            print(f"{path}:{example.line}: left out: {reason}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_no_snippet_goes_unnoticed(path: Path) -> None:
    text = path.read_text()
    fences = re.findall(r"^ *```(.*)\n(?:.*\n)*?^ *```$", text, re.MULTILINE)
    known = {"python", *EVALUATORS}
    assert [f for f in fences if f not in known and not NOT_RUN.fullmatch(f)] == []
    outside = re.sub(r"^ *```.*\n(?:.*\n)*?^ *```$", "", text, flags=re.MULTILINE)
    indented = re.findall(r"^\n {4,}(\S+)", outside, re.MULTILINE)
    assert [word for word in indented if word in COMMANDS] == [], "a command that no test runs"
    skips = re.findall(r"<!-- *skip:.*", text)
    assert [skip for skip in skips if not re.search(r'next "[^"]{8,}" -->', skip)] == []


def test_notebooks_are_committed_without_outputs() -> None:
    """They are executed where the site is built."""
    notebooks = list(ROOT.glob("docs/*.ipynb"))
    assert notebooks
    for path in notebooks:
        for cell in json.loads(path.read_text())["cells"]:
            assert not cell.get("outputs"), f"{name_of(path)}: {cell['source'][:1]}"
            assert cell.get("execution_count") is None
