"""Text for a demonstration without a download: the standard library's own documentation."""

from __future__ import annotations

import ast
import sysconfig
from pathlib import Path

from gpt_ext.options import ModelOptions, TrainOptions

MODEL = ModelOptions()
TRAIN = TrainOptions(
    steps=900,
    batch_size=16,
    learning_rate=3e-3,
    final_learning_rate=3e-4,
    warmup_steps=50,
    eval_every=300,
)


def standard_library_text() -> str:
    """Python's language reference as pydoc has it, or else docstrings of the standard library."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return docstrings(Path(sysconfig.get_paths()["stdlib"]))
    return "\n".join(topics.values())


def docstrings(folder: Path) -> str:
    """The docstrings of the modules in `folder`, joined, with what is not ASCII left out."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (
        ast.get_docstring(node)
        for path in sorted(folder.glob("*.py"))
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, documented)
    )
    text = "\n\n".join(docstring for docstring in found if docstring)
    return text.encode("ascii", "ignore").decode().replace("\0", "")
