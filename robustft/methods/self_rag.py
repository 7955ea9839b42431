"""SelfRAG as the paper's baseline has it, which is not Asai et al.'s Self-RAG.

Nothing is trained. At test time the three nearest *noisy* training questions and their answers
stand before the question, as clean ones do in RobustFT's context-enhanced relabeling (eq. 4, 5).
"""

from __future__ import annotations

from robustft.methods.base import Method

METHOD = Method(
    "self-rag", "SelfRAG", "no training; nearest noisy examples in the prompt",
    trains=False, demonstrations=3,
)  # fmt: skip
