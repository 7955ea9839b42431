"""Experts as a crowd: who can be trusted how far is learnt from the corpus, without truth.

Two crowds share one idea: the true answer is hidden, the given answer is one more witness of it,
and what makes the witnesses' agreement most likely tells how reliable each of them is (Dawid and
Skene 1979). `labels` judges corpora whose answers come from a set of options, `open_answers` those
whose answers are free text. Both return a `Judgement`.
"""

from robustft.crowd.judgement import Estimate, Judgement
from robustft.crowd.labels import judge_labels
from robustft.crowd.learners import Corpus, Learners
from robustft.crowd.neighbours import Progress
from robustft.crowd.open_answers import copies, judge_partitions, partition, renumbered

__all__ = [
    "Corpus",
    "Estimate",
    "Judgement",
    "Learners",
    "Progress",
    "copies",
    "judge_labels",
    "judge_partitions",
    "partition",
    "renumbered",
]
