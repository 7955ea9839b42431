"""Token statistics and answer consistency for any pipeline: torch and numpy are all they need."""

from __future__ import annotations
