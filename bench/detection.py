"""How well wrong answers are found on real corpora; truth is used for scoring only.

    python bench/detection.py ../shared/data --out bench/results/detection.csv

Cells: `fpb` at 30 and 50 % noise (the same options everywhere: learners on the corpus), and
`gsm8k_solutions` (open answers; each model's solutions judged with the other three as experts).
With `--run fpb30=DIR` the opinions of a finished `robustft clean` join in, `arc30` likewise, and
the paper's rule is judged on the same opinions. `--copies` adds copies of the clean files at other
noise rates. Beside them stand every single expert, cleanlab (same features; its best score by
AUROC, its best filter by F1), what the label frequencies alone give and what flagging everything
gives. `--shapes` shows instead what the learners make of FPB where wrong answers are not uniform,
and what they and simulated models do, together and as a panel of models alone.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
from sklearn.metrics import f1_score, roc_auc_score

from robustft import answers, crowd
from robustft.benchmarks.measure import versions
from robustft.crowd import learners
from robustft.crowd.neighbours import label_frequencies
from robustft.crowd.pool import transition
from robustft.detection import Asked, option_probabilities, paper_rule
from robustft.embedding import Embedder
from robustft.opinions import Opinion
from robustft.prompts import LETTERS
from robustft.provenance import commit
from robustft.records import Record, open_records

RESAMPLES = 500
BINS = 15
PENALTIES = (1.0, 3.0, 10.0, 30.0)  # of the regression that cleanlab gets
MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
SIMULATED = (0.8, 0.86, 0.95)  # of answers that a model gets right
PACKAGES = ("robustft", "numpy", "scipy", "scikit-learn", "cleanlab")


@dataclass(frozen=True)
class Row:
    """One detector on one cell; empty where a figure does not exist for it."""

    cell: str
    detector: str
    records: int
    auroc: float
    auroc_low: float
    auroc_high: float
    f1: float
    f1_low: float
    f1_high: float
    ece: float | str = ""
    noise_rate: float | str = ""
    rate_low: float | str = ""
    rate_high: float | str = ""
    true_rate: float | str = ""
    expected_precision: float | str = ""
    precision: float | str = ""
    right_label: float | str = ""
    versions: str = ""
    commit: str = ""


def calibration_error(wrong: np.ndarray, score: np.ndarray) -> float:
    """Expected calibration error over equal-width bins (Naeini et al. 2015)."""
    place = np.clip((score * BINS).astype(int), 0, BINS - 1)
    gaps = [abs(score[place == b].sum() - wrong[place == b].sum()) for b in range(BINS)]
    return float(sum(gaps) / len(wrong))


def row(
    cell: str, name: str, wrong: np.ndarray, score: np.ndarray, flagged: np.ndarray, **more: float
) -> Row:
    """AUROC and F1 with 95 % bootstrap intervals."""
    rng = np.random.default_rng(0)
    count = len(wrong)
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(score[order]) > 0])  # of groups of equal scores
    areas, f1s = [], []
    for draw in range(RESAMPLES + 1):
        times = np.ones(count) if draw == 0 else np.bincount(rng.integers(count, size=count),
                                                              minlength=count)  # fmt: skip
        if 0 < (bad := times @ wrong) < count:
            areas.append(area_under(wrong[order], times[order], starts))
            f1s.append(2 * (times @ (wrong & flagged)) / (bad + times @ flagged))
    ends = [0.025, 0.975]
    figures = (areas[0], *np.quantile(areas[1:], ends), f1s[0], *np.quantile(f1s[1:], ends))
    numbers = [round(float(figure), 4) for figure in figures]
    extra = {key: round(float(value), 4) for key, value in more.items()}
    return Row(cell, name, count, *numbers, **extra)


def area_under(wrong: np.ndarray, times: np.ndarray, starts: np.ndarray) -> float:
    """AUROC of rows in ascending order of score, each counted `times`; ties count half."""
    bad = np.add.reduceat(times * wrong, starts)
    good = np.add.reduceat(times * ~wrong, starts)
    below = np.cumsum(good) - good
    return float(bad @ (below + good / 2) / (bad.sum() * good.sum()))


def judged(
    cell: str, found: crowd.Judgement, wrong: np.ndarray, truth: np.ndarray | None, more: str = ""
) -> Row:
    """Our row, with what it says about itself beside what is true."""
    flagged = found.wrong > 0.5
    extra = {"ece": calibration_error(wrong, found.wrong), "true_rate": wrong.mean()}
    if found.noise_rate is not None:
        rate = found.noise_rate
        extra |= {"noise_rate": rate.value, "rate_low": rate.low, "rate_high": rate.high}
    if flagged.any():
        extra |= {"expected_precision": found.expected_precision()}
        extra |= {"precision": wrong[flagged].mean()}
    if truth is not None and found.labels is not None:
        extra |= {"right_label": (found.labels.argmax(1) == truth).mean()}
    name = "robustft (at chance: nothing judged)" if found.powerless else "robustft"
    return row(cell, name + more, wrong, found.wrong, flagged, **extra)


# --- a set of options ------------------------------------------------------------------------


def label_rows(
    cell: str,
    records: list[Record],
    truth: np.ndarray,
    panel: dict[str, np.ndarray],
    taught: Callable[[np.ndarray, int], crowd.Learners] | None,
) -> Iterator[Row]:
    """All detectors on one noisy copy."""
    classes = max(len(record.options or ()) for record in records)
    given = np.array([LETTERS.index(record.answer) for record in records])
    wrong, at = given != truth, np.arange(len(given))
    frequencies = label_frequencies(given, classes)
    common = np.full(len(given), int(frequencies.argmax()))
    yield row(cell, "label frequencies", wrong, 1 - frequencies[given], given != common)
    yield row(cell, "flag everything", wrong, np.zeros(len(given)), np.ones(len(given), bool))
    team = taught(given, classes) if taught else None
    plain = team.predict(transition(0.0, np.zeros((classes, classes)))) if team else {}
    for name, values in (panel | plain).items():
        said = values.argmax(1)
        yield row(cell, name, wrong, 1 - values[at, given], said != given,
                  right_label=(said == truth).mean())  # fmt: skip
    if team:
        yield from cleanlab_rows(cell, wrong, given, regressions(team, given, classes))
    elif panel:
        yield from cleanlab_rows(cell, wrong, given, panel)
    yield judged(cell, crowd.judge_labels(panel, given, classes, team), wrong, truth)


def regressions(team: crowd.Learners, given: np.ndarray, classes: int) -> dict[str, np.ndarray]:
    """What cleanlab gets: the learners' features, under several penalties."""
    features, clean = team.features["regression with words"], np.eye(classes)
    return {
        f"{penalty:g}": learners.out_of_fold(features, given, clean, penalty=penalty)
        for penalty in PENALTIES
    }


def cleanlab_rows(
    cell: str, wrong: np.ndarray, given: np.ndarray, experts: dict[str, np.ndarray]
) -> Iterator[Row]:
    """Cleanlab with the settings that do best against the truth, which it does not know itself."""
    try:
        from cleanlab.filter import find_label_issues
        from cleanlab.rank import get_label_quality_scores
    except ImportError:
        print("not run (not installed): cleanlab", file=sys.stderr)
        return
    scores, filters = [], []
    for values in experts.values():
        values = np.clip(values, 1e-6, None)
        values /= values.sum(1, keepdims=True)
        for method in ("self_confidence", "normalized_margin"):
            for adjust in (False, True):
                quality = get_label_quality_scores(
                    given, values, method=method, adjust_pred_probs=adjust
                )
                scores.append(-quality)
        for method in ("prune_by_noise_rate", "confident_learning", "predicted_neq_given"):
            filters.append(find_label_issues(given, values, filter_by=method, n_jobs=1))
    best = max(scores, key=lambda score: roc_auc_score(wrong, score))
    flagged = max(filters, key=lambda found: f1_score(wrong, found, zero_division=0.0))
    yield row(cell, "cleanlab, best setting", wrong, best, flagged)


def read(path: Path) -> list[Record]:
    """The readable records of a file."""
    return [record for record in open_records(str(path)) if isinstance(record, Record)]


def opinions(folder: Path) -> list[dict[str, Opinion]]:
    """What the experts of a finished `robustft clean` said, in input order."""
    found = []
    with (folder / "verdicts.jsonl").open("rb") as lines:
        for line in lines:
            said = json.loads(line)["experts"]
            found.append(
                {
                    name: Opinion(one["answer"], probabilities=tuple(one["probabilities"]))
                    for name, one in said.items()
                    if one.get("probabilities") and name in ("base", "reasoned", "checker")
                }
            )
    return found


def paper_row(
    cell: str, records: list[Record], truth: np.ndarray, said: list[dict[str, Opinion]]
) -> Row:
    """The paper's rule on the same opinions."""
    asked = [
        Asked(record, one["base"], one.get("reasoned"), one.get("checker"))
        for record, one in zip(records, said, strict=True)
    ]
    found = [paper_rule(one) for one in asked]
    wrong = np.array([LETTERS.index(record.answer) for record in records]) != truth
    score = np.array([one.noise_score for one in found])
    return row(cell, "paper's rule", wrong, score, np.array([one.noisy for one in found]))


def choice_cells(
    root: Path, name: str, runs: dict[str, Path], rates: list[float], seed: int
) -> Iterator[Row]:
    """The official noisy files of a corpus, or copies at other rates."""
    clean = read(root / name / "labeled.csv")
    truth = np.array([LETTERS.index(record.answer) for record in clean])
    taught = None
    if len({record.options for record in clean}) == 1:
        texts = [record.question for record in clean]
        rows, words = Embedder().encode(texts), learners.word_features(texts)

        def taught(given: np.ndarray, classes: int) -> crowd.Learners:
            count = len(given)
            return crowd.Learners(rows[:count], given, classes, words[:count])

    files = {f"{name}{n}": root / name / f"noisy{n}.csv" for n in (30, 50)}
    copies = {f"{name} {rate:.0%} (seed {seed})": rate for rate in rates}
    for cell in [*files, *copies]:
        records = read(files[cell]) if cell in files else flipped(clean, copies[cell], seed)
        said = opinions(runs[cell]) if cell in runs else []
        if not said and taught is None:
            continue  # letters that mean something else in every question, and nobody to ask
        records = records[: len(said) or None]
        panel = {
            expert: padded([one[expert] for one in said], records)
            for expert in ("base", "reasoned")
            if said and expert in said[0]
        }
        yield from label_rows(cell, records, truth[: len(records)], panel, taught)
        if said:
            yield paper_row(cell, records, truth[: len(records)], said)


def padded(said: list[Opinion], records: list[Record]) -> np.ndarray:
    """[N, C] probabilities of the options, zero beyond those that a record has."""
    counts = [len(record.options or ()) for record in records]
    found = np.zeros((len(records), max(counts)))
    for row, one, count in zip(found, said, counts, strict=True):
        row[:count] = option_probabilities(one, count)
    return found


def flipped(clean: list[Record], rate: float, seed: int) -> list[Record]:
    """A copy with exactly that share of answers moved to another option."""
    rng = np.random.default_rng(seed)
    found = list(clean)
    for index in rng.permutation(len(clean))[: round(rate * len(clean))]:
        record = clean[index]
        others = [letter for letter in LETTERS[: len(record.options or ())]
                  if letter != record.answer]  # fmt: skip
        found[index] = replace(record, answer=str(rng.choice(others)))
    return found


def shaped_cells(folder: Path, seed: int) -> Iterator[Row]:
    """The learners alone on copies of FPB whose wrong answers follow a rule, are few, or rare."""
    clean = read(folder / "fpb" / "labeled.csv")
    truth = np.array([LETTERS.index(record.answer) for record in clean])
    texts = [record.question for record in clean]
    rows, words = Embedder().encode(texts), learners.word_features(texts)
    classes = int(truth.max()) + 1
    for cell, kept, given in shapes(truth, rows, seed):
        team, wrong = crowd.Learners(rows[kept], given, classes, words[kept]), given != truth[kept]
        yield from cleanlab_rows(cell, wrong, given, regressions(team, given, classes))
        yield judged(cell, crowd.judge_labels({}, given, classes, team), wrong, truth[kept])
        for share in SIMULATED:
            panel, who = (
                {"base": simulated(truth, share, seed)[kept]},
                f"a model right in {share:.0%}",
            )
            found = crowd.judge_labels(panel, given, classes, team)
            yield judged(cell, found, wrong, truth[kept], f", with {who}")
            found = crowd.judge_labels(panel, given, classes, alike=True)
            yield judged(cell, found, wrong, truth[kept], f", {who} alone")


def simulated(truth: np.ndarray, share: float, seed: int) -> np.ndarray:
    """[N, C] probabilities of a model that is right in that share, here and there.

    Its scores are those of the truth and logistic noise, which is scaled until the share is met.
    """
    rng = np.random.default_rng(seed)
    scores = 2.0 * np.eye(int(truth.max()) + 1)[truth]
    noise = rng.logistic(size=scores.shape)
    low, high = 0.01, 10.0
    for _ in range(40):
        middle = (low + high) / 2
        right = ((scores + middle * noise).argmax(1) == truth).mean()
        low, high = (middle, high) if right > share else (low, middle)
    return learners.softmax((scores + low * noise) / low)


def shapes(
    truth: np.ndarray, rows: np.ndarray, seed: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, positions of the records that count, and the labels they are given."""
    from sklearn.cluster import KMeans
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(seed)
    everything = np.arange(len(truth))

    def scattered(kept: np.ndarray, rate: float) -> np.ndarray:
        given = truth[kept].copy()
        some = rng.permutation(len(kept))[: round(rate * len(kept))]
        given[some] = (given[some] + rng.integers(1, 3, size=len(some))) % 3
        return given

    def one_way(given: np.ndarray, source: int, target: int, share: float) -> np.ndarray:
        some = rng.permutation(np.flatnonzero(truth == source))
        given = given.copy()
        given[some[: round(share * len(some))]] = target
        return given

    yield "5 %, uniform", everything, scattered(everything, 0.05)
    yield "30 %, uniform", everything, scattered(everything, 0.3)
    frequent = np.flatnonzero(truth != 0)
    rare = rng.permutation(np.flatnonzero(truth == 0))[: round(0.03 / 0.97 * len(frequent))]
    kept = np.sort(np.r_[rare, frequent])
    yield "30 %, A made rare (3 %)", kept, scattered(kept, 0.3)
    yield "40 % of C are given B", everything, one_way(truth, 2, 1, 0.4)
    yield "45 % of B are given C", everything, one_way(truth, 1, 2, 0.45)
    yield "20 %, and 30 % of C as B", everything, one_way(scattered(everything, 0.2), 2, 1, 0.3)
    few = rng.permutation(everything)[:60]
    weak = LogisticRegression(C=10.0, max_iter=500).fit(rows[few], truth[few])
    yield "a weak model's answers", everything, weak.predict(rows)
    topic = KMeans(10, n_init=4, random_state=seed).fit_predict(rows)
    largest = topic == np.bincount(topic).argmax()
    turned = one_way(one_way(truth, 2, 1, 0.4), 0, 2, 0.5)
    yield "40 % of C as B, 50 % of A as C", everything, turned
    each = rng.random(len(truth)) < 0.2
    yield "20 %, A as B, B as C, C as A", everything, np.where(each, (truth + 1) % 3, truth)
    yield "1 topic of 10, all wrong", everything, np.where(largest, (truth + 1) % 3, truth)


# --- open answers ----------------------------------------------------------------------------


def solution_cells(path: Path) -> Iterator[Row]:
    """Each model's solutions as the given answers, the other three models as experts.

    The last rows are robustft's with every one and every two of them.
    """
    with path.open(encoding="utf-8") as lines:
        questions = [json.loads(line) for line in lines]
    for given in MODELS:
        order = [given, *(model for model in MODELS if model != given)]
        wrong = np.array([not q[given]["is_correct"] for q in questions])
        same = np.array(
            [crowd.partition([q[m]["solution"] for m in order], "text") for q in questions]
        )
        cell = f"gsm8k {given}"
        yield row(cell, "flag everything", wrong, np.zeros(len(wrong)), np.ones(len(wrong), bool))
        agree = same[:, 1:] == 0
        for number, name in enumerate(order[1:]):
            yield row(cell, name, wrong, 1.0 - agree[:, number], ~agree[:, number])
        yield row(cell, "mean agreement", wrong, 1 - agree.mean(1), agree.mean(1) < 0.5)
        strict = np.array([
            not all(answers.matches(q[given]["solution"], q[m]["solution"], kind="text")
                    for m in order[1:]) for q in questions
        ])  # fmt: skip
        yield row(cell, "paper's rule (all agree)", wrong, strict.astype(float), strict)
        yield judged(cell, crowd.judge_partitions(same, order[1:]), wrong, None)
        for few in (1, 2):
            for heard in itertools.combinations(order[1:], few):
                fewer = np.array([
                    crowd.partition([q[m]["solution"] for m in (given, *heard)], "text")
                    for q in questions
                ])  # fmt: skip
                found = judged(cell, crowd.judge_partitions(fewer, heard), wrong, None)
                yield replace(found, detector=f"{found.detector}, with {' and '.join(heard)}")


# --- the table -------------------------------------------------------------------------------


def draw(rows: list[Row], path: Path) -> None:
    """AUROC of every detector with its interval, a panel a cell."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cells = list(dict.fromkeys(one.cell for one in rows))
    figure, axes = pyplot.subplots(
        len(cells), 1, figsize=(7, 1.9 * len(cells)), sharex=True, squeeze=False
    )
    for axis, cell in zip(axes[:, 0], cells, strict=True):
        left_out = ("flag everything", "robustft, with ")
        mine = [
            one
            for one in reversed(rows)
            if one.cell == cell and not one.detector.startswith(left_out)
        ]
        for place, one in enumerate(mine):
            ours = one.detector.startswith("robustft")
            axis.plot([one.auroc_low, one.auroc_high], [place] * 2, color="C0" if ours else "0.6")
            axis.plot(one.auroc, place, "o", color="C0" if ours else "0.4", markersize=4)
        axis.set_yticks(range(len(mine)), [one.detector for one in mine], fontsize=7)
        axis.set_title(cell, fontsize=8, loc="left")
        axis.axvline(0.5, color="0.85", linewidth=1, zorder=0)
    axes[-1, 0].set_xlabel("AUROC, 95 % bootstrap interval; 0.5 is chance")
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Print the table; with --out write it as CSV, with --figure draw it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run", action="append", default=[], metavar="CELL=DIR")
    parser.add_argument("--copies", nargs="*", type=float, default=[], metavar="RATE")
    parser.add_argument("--seed", type=int, default=0, help="of the copies")
    parser.add_argument("--shapes", action="store_true", help="FPB under noise that is not uniform")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path, help="SVG or PNG")
    options = parser.parse_args()
    runs = {cell: Path(path) for cell, _, path in (text.partition("=") for text in options.run)}
    common = {"versions": versions(PACKAGES), "commit": commit()}
    rows = []
    print(f"{'cell':<24} {'detector':<56} AUROC                 F1     ECE    noise rate (true)")

    def cells() -> Iterator[Row]:
        if options.shapes:
            yield from shaped_cells(options.folder, options.seed)
            return
        for name in ("fpb", "arc"):
            yield from choice_cells(options.folder, name, runs, options.copies, options.seed)
        yield from solution_cells(options.folder / "gsm8k_solutions/solutions.jsonl")

    for one in cells():
        rows.append(Row(**asdict(one) | common))
        estimate = f"{one.noise_rate} ({one.true_rate})" if one.true_rate != "" else ""
        if options.shapes and estimate:
            estimate += f", interval {one.rate_low} to {one.rate_high}"
            estimate += f"; precision {one.precision}, expected {one.expected_precision}"
        area = f"{one.auroc:.3f} [{one.auroc_low:.3f}, {one.auroc_high:.3f}]"
        line = f"{one.cell:<24} {one.detector:<56} {area}  {one.f1:.3f}  {one.ece!s:<6} {estimate}"
        print(line, flush=True)
    if options.out:
        with options.out.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(map(asdict, rows))
    if options.figure:
        draw(rows, options.figure)


if __name__ == "__main__":
    main()
