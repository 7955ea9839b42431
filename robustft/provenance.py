"""Which source code made a result."""

from __future__ import annotations

import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import robustft


def commit() -> str:
    """Short hash of the source tree, with + for uncommitted changes; "release" outside a clone.

    "unknown" where this is a clone and git cannot be asked.
    """
    root = Path(robustft.__file__).parent.parent
    # Asked from anywhere else git would tell of whatever repository the environment lies in.
    if not (root / ".git").exists():
        return "release"
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def made_by() -> str:
    """This package with its commit, and the libraries that numbers depend on, as a reader wants."""
    built = commit()
    source = built if built == "release" else f"commit {built}"
    libraries = ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers"))
    return f"robustft {robustft.__version__}, {source}, {libraries}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
