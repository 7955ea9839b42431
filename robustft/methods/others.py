"""Other models as they are: inference only, the same at every noise level."""

from __future__ import annotations

from robustft.methods.base import Method

HERMES = Method(
    "hermes-3", "Hermes-3", "another model as it is",
    trains=False, model="NousResearch/Hermes-3-Llama-3.1-8B",
)  # fmt: skip
TULU = Method(
    "tulu-3", "Tulu-3", "another model as it is",
    trains=False, model="allenai/Llama-3.1-Tulu-3-8B-SFT",
)  # fmt: skip
