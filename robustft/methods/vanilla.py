"""Vanilla: the model as it is."""

from __future__ import annotations

from robustft.methods.base import Method

METHOD = Method("vanilla", "Vanilla", "the model as it is", trains=False)
