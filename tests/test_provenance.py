from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import robustft
from robustft.provenance import commit

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def repository(folder: Path) -> str:
    """Make an empty repository; its commit."""
    git = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    head = [*git, "rev-parse", "--short", "HEAD"]
    return subprocess.run(head, check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize(("place", "clone"), [(".", True), (".venv/site-packages", False)])
def test_the_commit_is_of_this_source_not_of_the_repository_around_it(
    place: str, clone: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = repository(tmp_path)
    package = tmp_path / place / "robustft"
    package.mkdir(parents=True)
    monkeypatch.setattr(robustft, "__file__", str(package / "__init__.py"))
    assert commit() == (head if clone else "release")


def test_a_clone_that_git_cannot_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(robustft, "__file__", str(tmp_path / "robustft" / "__init__.py"))
    assert commit() == "unknown"
