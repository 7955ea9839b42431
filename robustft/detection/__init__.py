"""Split the corpus into clean and noisy (eq. 3).

`rule` judges one record as the paper does. A detector of `detectors` turns the opinions on all of
them into evidence and concludes: `PaperDetector` by that rule, `CrowdDetector` by how far the
corpus shows that each expert can be trusted; `warnings` says where that cannot be told. A
`Conclusion` is what the stages after it go by.
"""

from __future__ import annotations

from robustft.detection.conclusion import Conclusion
from robustft.detection.detectors import CrowdDetector, Detector, PaperDetector
from robustft.detection.evidence import (
    TUNED,
    Evidence,
    is_free_text,
    option_probabilities,
    stacked,
)
from robustft.detection.rule import Asked, Detection, agrees, paper_rule

__all__ = [
    "TUNED",
    "Asked",
    "Conclusion",
    "CrowdDetector",
    "Detection",
    "Detector",
    "Evidence",
    "PaperDetector",
    "agrees",
    "is_free_text",
    "option_probabilities",
    "paper_rule",
    "stacked",
]
