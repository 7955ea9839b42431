"""MMLU's subjects by category: the subcategories in github.com/hendrycks/test, categories.py."""

from __future__ import annotations

from collections.abc import Mapping

from robustft.metrics import Tally

_SUBJECTS = {
    "math": "abstract_algebra college_mathematics elementary_mathematics high_school_mathematics "
    "high_school_statistics",
    "health": "anatomy clinical_knowledge college_medicine human_aging medical_genetics nutrition "
    "professional_medicine virology",
    "physics": "astronomy college_physics conceptual_physics high_school_physics",
    "business": "business_ethics management marketing",
    "biology": "college_biology high_school_biology",
    "chemistry": "college_chemistry high_school_chemistry",
    "computer science": "college_computer_science computer_security high_school_computer_science "
    "machine_learning",
    "economics": "econometrics high_school_macroeconomics high_school_microeconomics",
    "engineering": "electrical_engineering",
    "philosophy": "formal_logic logical_fallacies moral_disputes moral_scenarios philosophy "
    "world_religions",
    "history": "high_school_european_history high_school_us_history high_school_world_history "
    "prehistory",
    "geography": "high_school_geography",
    "politics": "high_school_government_and_politics public_relations security_studies "
    "us_foreign_policy",
    "psychology": "high_school_psychology professional_psychology",
    "culture": "human_sexuality sociology",
    "law": "international_law jurisprudence professional_law",
    "other": "global_facts miscellaneous professional_accounting",
}
CATEGORY = {subject: name for name, listed in _SUBJECTS.items() for subject in listed.split()}


def by_category(subjects: Mapping[str, Tally]) -> dict[str, Tally]:
    """Right answers by category, in the order of the map; unknown subjects stand for themselves."""
    found: dict[str, Tally] = {}
    for subject, tally in subjects.items():
        name = CATEGORY.get(subject.strip().lower().replace(" ", "_"), subject)
        total = found.setdefault(name, Tally())
        total.total += tally.total
        total.correct += tally.correct
    order = [*_SUBJECTS, *sorted(found.keys() - _SUBJECTS.keys())]
    return {name: found[name] for name in order if name in found}
