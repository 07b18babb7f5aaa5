"""The tables of docs/scaling.md are those that the formulas give."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_tables_are_up_to_date() -> None:
    program = ROOT / "benchmarks/scaling_on_paper.py"
    result = subprocess.run([sys.executable, program], capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    tables = result.stdout.strip().split("\n\n")
    assert len(tables) == 2
    document = (ROOT / "docs/scaling.md").read_text()
    assert [table for table in tables if table not in document] == []
