"""Build robustft._core beside its package with nothing but a compiler and torch's own headers.

For machines without network, CMake or scikit-build-core, where the sources run from the checkout
(PYTHONPATH). The instruction sets' flags are read from CMakeLists.txt.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

ROOT = Path(__file__).resolve().parent.parent


def instruction_sets() -> dict[str, list[str]]:
    """Suffix of a file under csrc/isa -> compiler flags, as CMakeLists.txt sets them."""
    flags: dict[str, list[str]] = {}
    text = (ROOT / "CMakeLists.txt").read_text(encoding="utf-8")
    for name, words in re.findall(r"set\(ROBUSTFT_FLAGS_(\w+) ([^)]*)\)", text):
        flags[name] = []
        for word in words.split():
            other = re.fullmatch(r"\$\{ROBUSTFT_FLAGS_(\w+)\}", word)
            flags[name] += flags[other[1]] if other else [word]
    return flags


def main() -> None:
    """Compile every source file, several at a time, and link."""
    compiler = os.environ.get("CXX", "g++")
    arm = os.uname().machine == "aarch64"
    flags = instruction_sets()
    include = [str(Path(torch.__file__).parent / "include"), sysconfig.get_paths()["include"]]
    common = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
    common += [f"-I{path}" for path in (str(ROOT / "csrc"), *include)]
    sources = sorted((ROOT / "csrc").glob("*.cpp"))
    for source in sorted((ROOT / "csrc/isa").glob("*.cpp")):
        suffix = source.stem.rpartition("_")[2]
        other = suffix.startswith(("avx", "amx")) if arm else suffix.startswith("neon")
        if not other:
            sources.append(source)
    target = ROOT / "robustft" / f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
    with TemporaryDirectory() as folder:

        def compiled(source: Path) -> str:
            out = str(Path(folder, source.parent.name + source.stem + ".o"))
            own = flags.get(source.stem.rpartition("_")[2], []) if "isa" in source.parts else []
            subprocess.run([compiler, *common, *own, "-c", str(source), "-o", out], check=True)
            return out

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, sources))
        subprocess.run([compiler, "-shared", *objects, "-pthread", "-o", str(target)], check=True)
    print(target)


if __name__ == "__main__":
    try:
        main()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"not built: {error}")
