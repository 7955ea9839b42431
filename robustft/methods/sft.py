"""SFT: LoRA on the noisy set as it stands."""

from __future__ import annotations

from robustft.methods.base import Method

METHOD = Method("sft", "SFT", "LoRA on the noisy data")
