"""`robustft_kernels` in a process where transformers, peft and the like do not exist."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

SCRIPT = """
import sys

HIDDEN = {
    "transformers", "peft", "accelerate", "datasets", "sklearn", "pyarrow", "orjson", "safetensors",
    "tokenizers", "huggingface_hub", "tqdm", "scipy", "pandas",
}

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in HIDDEN
        return None if hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path if hasattr(finder, "find_spec")]
assert not HIDDEN & set(sys.modules)
for name in ("transformers", "peft"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} was not hidden")

import torch
from robustft_kernels import answer_consistency, linear_token_stats, token_stats

torch.manual_seed(0)
hidden, weight = torch.randn(3, 7, 16), torch.randn(50, 16)
targets = torch.randint(50, (3, 7))
logits = hidden @ weight.T
log_p = logits.double().log_softmax(-1)
entropy = -(log_p.exp() * log_p).sum(-1)
stats = token_stats(logits, targets)
torch.testing.assert_close(stats.entropy.double(), entropy, atol=2e-6, rtol=0)
torch.testing.assert_close(
    stats.logprob.double(), log_p.gather(-1, targets[..., None])[..., 0], atol=2e-5, rtol=0
)
linear = linear_token_stats(hidden, weight, targets)
torch.testing.assert_close(linear.logprob, stats.logprob, atol=1e-4, rtol=0)
agreed = answer_consistency([["Paris", " paris.", "Lyon"]])
assert agreed.majority_fraction[0] == torch.tensor(2 / 3)
import robustft as rft
assert rft.token_stats is token_stats
print("alone")
"""


def test_scorers_work_where_transformers_and_peft_do_not_exist() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT],
        capture_output=True, text=True, cwd=ROOT / "tests", env=os.environ | {"PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "alone"
