"""RobustFT (arXiv 2412.14922): clean noisy supervised fine-tuning data, then train on it."""

from __future__ import annotations

__version__ = "0.1.0"
