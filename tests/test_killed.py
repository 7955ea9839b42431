"""Killed at a file operation, whichever it is, a command run again ends as if nothing had been."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("points", [6, pytest.param(10_000, marks=pytest.mark.slow)])
def test_killed_at_any_file_operation(tmp_path: Path, points: int) -> None:
    """No byte differs, no question is repeated but those in flight, no temporary file is left."""
    script = Path(__file__).with_name("killing.py")
    command = [sys.executable, str(script), str(points)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == ""
    assert done.returncode == 0, done.stderr
