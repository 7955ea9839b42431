"""Formulas, units, several numbers: never two different answers for one."""

from __future__ import annotations

import itertools
import time
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from robustft.answers import (
    agreement,
    answer_kind,
    matches,
    normalise,
    parse,
    parse_final_number,
    parse_number,
    parse_span,
)
from robustft.answers.formulas import formula, is_formula
from robustft.answers.numerals import spell

# Spellings of one answer stand in one line; no answer of a line is one of another line.
LINES = [
    (r"\frac{3}{4}", r"\dfrac34", r"\tfrac{3}{4}", "$\\frac{3}{4}$", "0.75", "3/4", ".75"),
    (r"-\frac{3}{4}", r"\frac{-3}{4}", r"\frac{3}{-4}", "-0.75"),
    (r"3\frac{1}{2}", "3.5", "7/2", "3 1/2"),
    (r"\frac{1,000}{3}", "1000/3"),
    (r"2\sqrt{3}", r"2 \sqrt 3", "2√3", r"2\cdot\sqrt{3}"),
    (r"\sqrt{3}", "√3", r"\sqrt3", "sqrt(3)"),
    (r"\sqrt{x + 3}", "√(x+3)"),
    ("3", "3.0", r"\text{3}", "x = 3", r"\sqrt{9}"),
    ("2", "2.00"),
    (r"\sqrt[3]{2}",),
    (r"\frac{\sqrt{3}}{2}", "√3/2"),
    ("10^5", "10^{5}", "10**5", "10⁵", r"1 \times 10^5", "100,000", "100{,}000", "1e5"),
    ("2^{-3}", "0.125", "1/8", "2⁻³"),
    ("-2^2", "-4"),
    ("(-2)^2", "4"),
    (r"\frac{\pi}{2}", r"\pi/2", "π/2"),
    (r"3\pi", "3π", "3pi"),
    ("(1, 2)", "(1,2)", r"\left(1, 2\right)", r"(1, \frac{4}{2})"),
    ("[1, 2)",),
    ("(2, 1)",),
    (r"(-\infty, 3]", "(-∞,3]"),
    (r"\{1, 2, 3\}", r"\{3,2,1\}"),
    ("2x + 3y = 6",),
    ("12 + 6 = 18", "18", r"18^\circ", "18°", r"18\%", r"\$18", r"18\text{ cm}", "18 cm^2",
     r"18\ \text{meters per second}", "18 m/s", r"18 \mathrm{cm}^2"),
    ("x", r"\text{x}"),
    ("-x",),
    ("x - 1", "x-1"),
    ("x + 1", "x+1"),
    ("y = 2x + 1", "2x+1"),
    ("x^2 + 1",),
    ("x^{10}",),
    (r"x \le 5", "x ≤ 5"),
    ("x < 5",),
    (r"\pm 5", "±5"),
    ("5!",),
    ("101_2", "101_{2}"),
    ("2 + 3i",),
    ("9^{9^{9^9}}", "9^9^9^9"),
    (r"0.\overline{3}",),
    (r"\text{even}", "even", "Even"),
    ("2 1x",),
    ("21x",),
]  # fmt: skip


def test_one_spelling_a_formula() -> None:
    spelt = [{formula(text) for text in line} for line in LINES]
    assert [one for one in spelt if len(one) != 1] == []
    every = [next(iter(one)) for one in spelt]
    assert len(set(every)) == len(every)


def test_marked_formulas_of_worked_solutions_and_of_short_answers() -> None:
    boxed = [rf"We add them up, and find \boxed{{{line[0]}}}" for line in LINES]
    for one, other in itertools.combinations(boxed, 2):
        assert not matches(one, other, kind="text")
    for line, solution in zip(LINES, boxed, strict=True):
        read = parse(solution, kind="span")
        assert read.answer is not None
        assert solution[read.start : read.stop] == read.answer
        for text in line:
            assert matches(solution, rf"\boxed{{{text}}}", kind="text")
            assert matches(rf"\boxed{{{text}}}", rf"\boxed{{{line[0]}}}", kind="number")


@pytest.mark.parametrize(
    "text",
    [r"\frac{1", "{" * 200, "(" * 100, "^", "2^", r"\frac", "1/0", "0^-1", "2^99999", "²" * 90],
)
def test_what_is_no_formula_stays_and_takes_no_time(text: str) -> None:
    begin = time.process_time()
    assert formula(text)
    assert time.process_time() - begin < 0.1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (r"\frac{x}{2}", True), ("10^5", True), ("√2", True), ("10²", True), ("y = -x", True),
        ("a-b", True), ("x > 5", True), ("3:2", False), ("2020-01-02", False), ("C#", False),
        ("A-", False), ("B+", False), ("F-16", False), ("R&D", False), ("e-mail", False),
        ("x", False), ("5 m", False), ("A/B", False), ("12 + 6", False), ("New York", False),
    ],
)  # fmt: skip
def test_which_short_answers_are_formulas(text: str, said: bool) -> None:
    assert is_formula(text) is said


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (r"-\frac{3}{4}", r"\frac{3}{4}"), (r"\sqrt{3}", "3"), ("y = -x", "y = x"), ("a-b", "b-a"),
        ("x/y", "y/x"), (r"5\text{ cm}", r"5\text{ m}"), ("5 m²", "5 kg"), (r"-\infty", r"\infty"),
        ("[0, 5)", "(0, 5]"), ("10^5", "10^6"), ("2^10", "10^2"),
    ],
)  # fmt: skip
def test_short_formulas_that_differ(a: str, b: str) -> None:
    assert not matches(a, b, kind="span")
    assert not matches(b, a, kind="span")


def test_short_formulas_that_are_the_same() -> None:
    for a, b in [(r"\frac{x}{2}", "x/2"), (r"5\text{ cm}", "5 cm"), (r"5\text{ cm}", "5"),
                 ("10^5", "100,000"), (r"$2\sqrt{3}$", r"2 \sqrt 3")]:  # fmt: skip
        assert matches(a, b, kind="span")


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("1.234,50", "1234.5"),
        ("€1.234,50", "1234.5"),
        ("1.234.567", "1234567"),
        ("1 234,50", "1234.5"),
        ("1\u202f234,50 €", "1234.5"),
        ("0,5", "0.5"),
        ("-0,125", "-0.125"),
        ("12,34", "12.34"),
        ("1,23,456 rupees", "123456"),
        ("1,234", "1234"),
        ("100 000", "100000"),
        ("100 200 300", "100 200 300"),
        ("#### 100 200", "100 200"),
        ("12 + 6", "18"),
        ("Answer: 12 + 6", "18"),
        ("12 + 6 = 18", "18"),
        ("3 x 4", "12"),
        ("10^5", "100000"),
        ("#### 10^5", "100000"),
        ("The answer is $2^{10}$.", "1024"),
        ("10²", "100"),
        ("2\\sqrt{3}", "2\\sqrt{3}"),
        ("The answer is 2\\sqrt{3}.", "2\\sqrt{3}"),
        ("The answer is $3x + 2$, as told.", "3x + 2"),
        ("3:45", "3:45"),
        ("Answer: 3:45 PM", "3:45"),
        ("2020-01-02", "2020-01-02"),
        ("01/02/2020", "01/02/2020"),
        ("3.5.2", "3.5.2"),
        ("10-20", "10-20"),
        ("2,000-3,000", "2,000-3,000"),
        ("Answer: $20-$30", "$20-$30"),
        ("Answer: 20%-30%", "20%-30%"),
        ("Answer: -5 + 3", "-2"),
        ("#### $5 + $3", "8"),
        ("The answer is -\\sqrt{3}.", "-\\sqrt{3}"),
        ("#### 18^{th}", "18"),
        ("The answer is 18 (since 3 * 6 = 18)", "18"),
        ("Answer: x = 5, y = 3", "5, y = 3"),
        ("#### (-5)", "-5"),
        ("5 to 7", "5 to 7"),
        ("Answer: 5 or 7", "5 or 7"),
        ("x = 5 or x = 7", "5 or x = 7"),
        ("The answer is 5, 6 and 7.", "5, 6 and 7"),
        ("The answer is 5 apples and 3 oranges.", "5"),
        ("Answer: 1 hour and 30 minutes", "1 hour and 30 minutes"),
        ("It takes 1 hour and 30 minutes.", "1 hour and 30"),
        ("Answer: 5 feet 3 inches", "5 feet 3 inches"),
        ("Answer: $18.50 or 18.5", "18.5"),
        ("Thus $x=3$ or $x=-3$.", "3$ or $x=-3"),
        ("Answer: sqrt(2)", "sqrt(2)"),
        ("Answer: 2*sqrt(9)", "6"),
        ("Answer: 3pi.", "3pi"),
        ("Answer: 3x + 2, as told", "3x + 2"),
        ("Answer: 2 + x", "2 + x"),
        ("(1,2)", "(1,2)"),
        ("5 ± 2", "5 ± 2"),
        ("5 m^2", "5"),
        ("#### 5 km/h", "5"),
        ("twelve", "12"),
        ("The answer is **twenty-one**.", "21"),
        ("Twelve apples", "12"),
        ("one of them", None),
        ("one hundred", None),
        ("0x10", None),
        ("so it is prime, as 7 is. \\boxed{\\text{prime}}", "\\text{prime}"),
        ("\\boxed{5}, so x = 7", "5"),
        ("\\boxed{\\frac{1}{2", "\\frac{1}{2"),
        ("\\boxed{approximately 18}", "18"),
        ("\\boxed{\\approx 18}", "18"),
        ("\\boxed{\\text{Janet makes } \\$18}", "18"),
        ("\\boxed{Total: 18}", "18"),
        ("\\boxed{USD 18}", "18"),
        ("\\boxed{18 (dollars)}", "18"),
        ("\\boxed{$1.8 million}", "1800000"),
        ("\\boxed{18 thousand dollars}", "18000"),
        ("\\boxed{18\\text{ million}}", "18000000"),
        ("\\boxed{}", None),
        ("The answer is $\\boxed{", None),
        ("log_2(8)", "log_2(8)"),
        ("2. 9 x 2 = 18", "18"),
        ("5x3=15", "15"),
        ("In 2020, 18 people came.", "18"),
        ("So in 7 days, 28 eggs are laid", "28"),
        ("He has 3,990 5 dollar bills", "5"),
        ("She works from 9 to 17, 8 hours.", "8"),
        ("They cost 5, 6 and 7 dollars.", "5, 6 and 7"),
    ],
)
def test_what_is_read_where_a_number_is_part_of_more(reply: str, answer: str | None) -> None:
    for found in (parse_number(reply), parse(f" {reply}", kind="number", begun="Answer:")):
        assert found.answer == answer
    assert normalise(normalise(reply, "number"), "number") == normalise(reply, "number")


def test_lines_of_work_are_no_formula_and_equations_are() -> None:
    assert parse_number("9 x 2 = 18\n18 x 3 = 54").answer == "54"
    assert parse_number("2x + 1 = 5").answer == "2x + 1 = 5"
    assert parse_number("\\boxed{> 18}").answer == "> 18"
    assert parse_number("\\boxed{She sells 16 - 3 = 13 eggs}").answer == "13"


def test_scales_are_no_units() -> None:
    for text in ("18 million", "18 million dollars", r"18\text{ million}", "18 thousand"):
        assert not matches(rf"\boxed{{{text}}}", r"\boxed{18}", kind="number")
        assert formula(text) != "18"


@pytest.mark.parametrize(
    "text",
    ["100 ", "100,", "1,1", "1.111,", "111,", "\u202f100", "1,11,", "100 100\u202f", "100.1"],
)
def test_groups_of_digits_without_end_take_no_time(text: str) -> None:
    begin = time.process_time()
    parse_number(text * (100_000 // len(text)))
    assert time.process_time() - begin < 2


def test_kinds() -> None:
    assert answer_kind("1.234,50") == answer_kind("0,5") == "number"
    assert answer_kind("100 200 300") == answer_kind("5, 6") == answer_kind("3:45") == "span"


def test_only_the_last_box_counts_and_a_span_ends_where_it_closes() -> None:
    reply = r"First \boxed{x}. Then $\boxed{\frac{1}{2}}$, so y = 7"
    assert parse_span(reply).answer == r"\frac{1}{2}"
    assert parse_final_number(reply).answer == "0.5"
    assert parse_span(r"\boxed{- 5}").answer == "- 5"


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="0123456789.,+-*/^=(){}[]\\frac sqrtx√π²%$:_", max_size=40))
def test_law_any_formula_is_read_and_equals_itself(text: str) -> None:
    assert isinstance(formula(text), str)
    for kind in ("number", "span", "text"):
        assert agreement(text, text, kind=kind) == 1.0
        parsed = parse(text, kind=kind)
        assert 0 <= parsed.start <= parsed.stop <= len(text)


def _spellings(parts: st.SearchStrategy[tuple[str, Fraction]]) -> st.SearchStrategy[Any]:
    two = st.tuples(parts, parts)
    return st.one_of(
        two.map(lambda p: (f"({p[0][0]} + {p[1][0]})", p[0][1] + p[1][1])),
        two.map(lambda p: (f"({p[0][0]}-({p[1][0]}))", p[0][1] - p[1][1])),
        two.map(lambda p: (rf"({p[0][0]}) \cdot ({p[1][0]})", p[0][1] * p[1][1])),
        two.filter(lambda p: p[1][1] != 0).map(
            lambda p: (rf"\frac{{{p[0][0]}}}{{{p[1][0]}}}", p[0][1] / p[1][1])
        ),
        parts.map(lambda p: (f"({p[0]})^{{3}}", p[1] ** 3)),
        parts.map(lambda p: (rf"\sqrt{{({p[0]})^2}}", abs(p[1]))),
    )


@settings(max_examples=200, deadline=None)
@given(
    st.recursive(st.integers(0, 99).map(lambda n: (str(n), Fraction(n))), _spellings, max_leaves=5)
)
def test_law_what_is_rational_is_read_by_its_value(spelt: tuple[str, Fraction]) -> None:
    text, worth = spelt
    assert formula(text) == spell(worth)
    assert parse_number(rf"\boxed{{{text}}}").answer == spell(worth)
