"""bench/on_gpu.sh with a stand-in for Python: every step runs, and failures tell in the status."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "bench" / "on_gpu.sh"


@pytest.mark.parametrize(
    ("failing", "status"), [("nothing", 0), ("bench/token_stats.py", 1), ("robustft demo", 1)]
)
def test_failed_steps_are_named_at_the_end_and_in_the_status(
    failing: str, status: int, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ncase "$*" in *"{failing}"*) echo broken; exit 3;; *is_available*) echo cpu;; '
        "esac\n"
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", SCRIPT, tmp_path / "out"], env=os.environ | {"PYTHON": str(python)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == status
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary.count("done in") == (6 if failing == "nothing" else 5)
    assert ("FAILED (3), broken" in summary) == bool(status)
    assert summary.splitlines()[-1].startswith("failed: ") == bool(status)


def test_a_relative_folder_is_the_callers_and_one_that_cannot_be_made_ends_it(
    tmp_path: Path,
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *is_available*) echo cpu;; esac\n')
    python.chmod(0o755)
    (tmp_path / "file").touch()
    for out, status in (("there", 0), ("file/out", 1)):
        done = subprocess.run(
            ["bash", SCRIPT, out], env=os.environ | {"PYTHON": str(python)},
            cwd=tmp_path, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == status
    assert (tmp_path / "there" / "summary.txt").is_file()
    assert "file/out cannot be written: name another folder" in done.stderr
    assert not done.stdout


def test_the_time_of_the_whole_ends_what_does_not_end_itself(tmp_path: Path) -> None:
    python, out = tmp_path / "python", tmp_path / "out"
    python.write_text(
        '#!/bin/sh\ncase "$*" in *is_available*) echo cpu;; '
        "*bench/token_stats.py*) trap '' TERM; exec sleep 60;; esac\n"
    )
    python.chmod(0o755)
    out.mkdir()
    (out / "consistency.log").write_text("lcs K=16 L=64: of another day\n")
    done = subprocess.run(
        ["bash", SCRIPT, out], env=os.environ | {"PYTHON": str(python), "SECONDS": "457"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    summary = (out / "summary.txt").read_text()
    assert "token-stats: stopped after" in summary
    assert summary.count(": not run, 460 s are over") == 5
    assert "of another day" not in summary


def test_the_summary_holds_each_benchmarks_results(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in *is_available*) echo cpu;; '
        "*bench/token_stats.py*) echo 'N=8 V=9 float32: 90% of reading alone';; "
        "*bench/consistency.py*) echo 'lcs K=16 L=64  robustft Triton  0.36 M pairs/s';; esac\n"
    )
    python.chmod(0o755)
    subprocess.run(
        ["bash", SCRIPT, tmp_path / "out"], env=os.environ | {"PYTHON": str(python)},
        capture_output=True, check=True, timeout=60,
    )  # fmt: skip
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert "N=8 V=9 float32: 90%" in summary
    assert "lcs K=16 L=64  robustft Triton" in summary
