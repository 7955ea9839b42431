"""The arrows of the design point one way; heavy and native imports stand where they may."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"robustft": ROOT / "robustft", "robustft_kernels": ROOT / "kernels/robustft_kernels"}
STAGES = {"detection", "relabeling", "selection"}
# module -> the only places it may be imported
CONFINED = {
    "triton": {"robustft_kernels", "robustft.benchmarks"},
    "peft": {"robustft.training"},
    "robustft._core": {"robustft.retrieval", "robustft_kernels", "robustft.benchmarks"},
    "sqlite3": {"robustft.store", "robustft.cache"},
    "accelerate": {"robustft.training"},
    "datatrove": {"robustft.integrations.datatrove_step"},
    "datasets": {"robustft.records.column_sources"},
    "faiss": {"robustft.retrieval.approximate", "robustft.benchmarks"},
    "ray": {"robustft.distributed.raycluster"},
    "trl": {"robustft.benchmarks"},
}
LAYERS = (
    {"records", "answers", "config"},
    {
        "prompts",
        "engines",
        "retrieval",
        "embedding",
        "exchange",
        "opinions",
        "questions",
        "store",
        "shards",
        "corpus",
    },
    {"experts"},
    {"detection"},
    {"relabeling"},
    {"selection"},
    {"decisions"},
    {"pipeline"},
    {"confusions", "verdicts"},
    {"finishing"},
    {"tuned"},
    {"cleaning"},
    {"distributed", "estimating"},
    {"integrations", "cli"},
)


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join((package, *parts)).removesuffix(".__init__")
            yield name, path


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


MODULES = dict(modules())


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 15


def test_kernels_has_no_init() -> None:
    # An importable top-level `kernels` shadows the Hugging Face package transformers imports.
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("name", MODULES)
def test_confined_imports(name: str) -> None:
    for target in imported(MODULES[name]):
        for confined, allowed in CONFINED.items():
            if within(target, confined):
                assert any(within(name, place) for place in allowed), f"{name} imports {target}"


@pytest.mark.parametrize("name", [n for n in MODULES if within(n, "robustft_kernels")])
def test_kernels_import_nothing_of_robustft_but_the_core(name: str) -> None:
    for target in imported(MODULES[name]):
        if within(target, "robustft") and target != "robustft":
            assert within(target, "robustft._core"), f"{name} imports {target}"


def layer(name: str) -> int | None:
    stem = name.split(".")[1] if "." in name else ""
    return next((depth for depth, names in enumerate(LAYERS) if stem in names), None)


@pytest.mark.parametrize("name", [n for n in MODULES if layer(n) is not None])
def test_arrows_point_one_way(name: str) -> None:
    own = layer(name)
    assert own is not None
    for target in imported(MODULES[name]):
        other = layer(target) if within(target, "robustft") else None
        assert other is None or other <= own, f"{name} imports {target}"


@pytest.mark.parametrize("name", [f"robustft.{stage}" for stage in sorted(STAGES)])
def test_stages_do_not_import_sibling_stages(name: str) -> None:
    for target in imported(MODULES[name]):
        for sibling in STAGES - {name.removeprefix("robustft.")}:
            assert not within(target, f"robustft.{sibling}"), f"{name} imports {target}"


def loaded_after(code: str) -> set[str]:
    script = f"{code}\nimport sys; print(' '.join(sys.modules))"
    env = os.environ | {"PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env,
        cwd=ROOT,
    )  # fmt: skip
    return set(done.stdout.splitlines()[-1].split())


def test_import_robustft_is_light() -> None:
    heavy = {"torch", "transformers", "peft", "triton", "pyarrow", "datasets"}
    assert not loaded_after("import robustft") & heavy


def test_help_is_light() -> None:
    code = "import robustft.cli as c\ntry: c.main(['clean', '--help'])\nexcept SystemExit: pass"
    assert not loaded_after(code) & {"torch", "transformers", "peft", "triton"}


def test_scorers_import_without_transformers_or_peft() -> None:
    code = "from robustft_kernels import token_stats"
    assert not loaded_after(code) & {"transformers", "peft"}
