"""Answers read as a person would read them, and never guessed."""

from __future__ import annotations

import time
import tracemalloc
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from robustft.answers import (
    Kind,
    Parsed,
    agreement,
    answer_kind,
    matches,
    normalise,
    parse,
    parse_choice,
    parse_final_number,
    parse_number,
    parse_span,
    parse_text,
    token_f1,
)

SENTIMENT = ["negative", "neutral", "positive"]
CELLS = [
    "Both have cells with specialized functions for each life process.",
    "Both perform all life processes within one cell.",
    "Both have a way to get rid of waste materials.",
    "Both are able to make food from sunlight.",
]
CITIES = ["New York", "New York City", "York", "Boston"]


@pytest.mark.parametrize(
    ("reply", "answer", "characters"),
    [
        ("B", "B", "B"),
        ("b", "B", "b"),
        ("(B)", "B", "B"),
        ("B.", "B", "B"),
        ("b)", "B", "b"),
        ("  B\n", "B", "B"),
        ("**Answer:** B", "B", "B"),
        ("**Answer: B**", "B", "B"),
        ("**B**", "B", "B"),
        ("The answer is B", "B", "B"),
        ("The answer is (b).", "B", "b"),
        ("the correct answer is: B because profits fell", "B", "B"),
        ("Answer: (B) neutral", "B", "B"),
        ("Answer: B neutral", "B", "B"),
        ("Answer:\nB", "B", "B"),
        ("### Answer\n\nB", "B", "B"),
        ("B. neutral", "B", "B"),
        ("B) neutral\n\nOption A is wrong because profits did not fall.", "B", "B"),
        ("(B) The company reports, (B) fits.", "B", "B"),
        ("B. Because nothing changed.", "B", "B"),
        ("neutral", "B", "neutral"),
        ("Neutral.", "B", "Neutral"),
        ("The sentiment of this sentence is positive.", "C", "positive"),
        ("The answer is neutral, since nothing changed.", "B", "neutral"),
        ("Answer: **Neutral**", "B", "Neutral"),
        ("\\boxed{B}", "B", "B"),
        ("so we get $\\boxed{\\text{B}}$.", "B", "B"),
        ('{"answer": "B"}', "B", "B"),
        ("A: B", "B", "B"),
        ("A: (b).", "B", "b"),
        ("<answer>B</answer>", "B", "B"),
        ("<answer>B</answer> A is wrong.", "B", "B"),
        ("<answer>B</answer>\nA. negative was too strong", "B", "B"),
        ("The answer is A. No, wait: the answer is C.", "C", "C"),
        ("A is tempting and so is C. Final answer: B", "B", "B"),
        ("The correct option is B", "B", "B"),
        ("I would go with B.", "B", "B"),
        ("Option B is correct.", "B", "B"),
        ("The answer to the question is B.", "B", "B"),
        ("The answer is B. The answer is not A because it says so.", "B", "B"),
        ("The answer is not A but B.", "B", "B"),
        ("The answer is not **A**, but rather **B**.", "B", "B"),
        ("The answer is not (A), it is (B).", "B", "B"),
        ("The answer is not negative but neutral.", "B", "neutral"),
        ("The answer is most likely B.", "B", "B"),
        ("The answer is probably neutral.", "B", "neutral"),
        ("The answer is B but nothing is certain.", "B", "B"),
        ("<think>A? The answer is A.</think>\nB", "B", "B"),
        ("<thinking>The answer is A.</thinking>\nB", "B", "B"),
        ("<reasoning>Answer: A</reasoning>\n\nB", "B", "B"),
        ("[THINK]Answer: A[/THINK]B", "B", "B"),
        ("Answer: A, or is it?</thought> B", "B", "B"),
        ("（Ｂ）", "B", "Ｂ"),
        ("Answer: B. I hope this answer is clear.", "B", "B"),
        ("Hmm, it must be (B).", "B", "B"),
        ("(B) neutral, as a gain is not reported", "B", "B"),
        ("B) neutral is supported by the text", "B", "B"),
        ("Answer: (B) neutral. Not negative.", "B", "B"),
        ("Answer: (B) neutral, not negative.", "B", "B"),
        ("B) neutral – not a negative one", "B", "B"),
        ("Answer: B. neutral\nIncorrect options: A and C", "B", "B"),
        ("(B) neutral is not positive", "B", "B"),
        ("B) neutral, not C", "B", "B"),
        ("B) neutral, not clearly positive", "B", "B"),
        ("<answer> B </answer>", "B", "B"),
        ("[[B]]", "B", "B"),
        ("Selected option: B", "B", "B"),
        ("Nothing changed. Therefore B", "B", "B"),
        ("Nothing changed, so (B).", "B", "B"),
        ("I think it's A. Wait, actually it's B.", "B", "B"),
        ("The answer is A. Wait, actually B.", "B", "B"),
        ("I'd say A... no wait, B.", "B", "B"),
        ("The answer is positive. Wait, no, neutral.", "B", "neutral"),
        ("Not A but B.", "B", "B"),
        ("It is not positive, but neutral.", "B", "neutral"),
        ("It is neutral, not positive.", "B", "neutral"),
        ("The tone is neutral rather than positive.", "B", "neutral"),
        ("Positive is unlikely. It reads neutral.", "B", "neutral"),
        ("It is neutral because nothing positive or negative is said.", "B", "neutral"),
        ("A. negative: incorrect\nB. neutral: correct\nC. positive: incorrect", "B", "neutral"),
        ("The answer is B rather than C.", "B", "B"),
        ("A seems right, but B is the answer.", "B", "B"),
        ("A and C are wrong, leaving B.", "B", "B"),
        ("The answer is B. Some might think the answer is A.", "B", "B"),
        ("The answer is B. If profits fell, the answer would be A.", "B", "B"),
        ("If profits did not change, the answer would be B.", "B", "B"),
        ("The right answer is B. The wrong answers are A and C.", "B", "B"),
        ('{"correct_answer": "B", "incorrect_answers": ["A", "C"]}', "B", "B"),
        ('{"label": "B", "text": "A or C"}', "B", "B"),
        ("{'answer': 'B'}", "B", "B"),
        ("The answer, therefore, is B.", "B", "B"),
        ("The answer will be B.", "B", "B"),
        ("B because nothing changed", "B", "B"),
        ("Choice: B", "B", "B"),
        ("• B", "B", "B"),
        ("La opción correcta es la B.", "B", "B"),
        ("La opción B es la correcta.", "B", "B"),
        ("Đáp án đúng là B.", "B", "B"),
        ("الإجابة الصحيحة هي B", "B", "B"),
        ("我选B", "B", "B"),
        ("选择B", "B", "B"),
        ("I don't think it's A.\nIt must be B.", "B", "B"),
        ("I am torn between A and C, but I'll go with B.", "B", "B"),
        ("Profits are flat.\n**Final: B**", "B", "B"),
        ("A gain is not reported.\nSentiment: Neutral", "B", "Neutral"),
        ("This is neither positive nor negative, so neutral.", "B", "neutral"),
        ("Neutral, as it does not say whether that is positive or negative. " * 4, "B", "Neutral"),
        ("I'd say B.", "B", "B"),
        ("I’d go with (B), as nothing changed.", "B", "B"),
        ("B) No change was reported.", "B", "B"),
        ("It must be (B), as this is a non-profit company.", "B", "B"),
        ("\\fbox{B}", "B", "B"),
        ("答案是B", "B", "B"),
        ("答案：B", "B", "B"),
        ("因此，正确答案是：B。", "B", "B"),
        ("答案为B选项。", "B", "B"),
        ("答案是Ｂ", "B", "Ｂ"),
        ("故选B。", "B", "B"),
        ("正解はBです。", "B", "B"),
        ("정답은 B입니다", "B", "B"),
        ("La respuesta correcta es la B.", "B", "B"),
        ("Respuesta: **B**", "B", "B"),
        ("A resposta é a letra B.", "B", "B"),
        ("La bonne réponse est B", "B", "B"),
        ("Réponse : B", "B", "B"),
        ("La risposta corretta è B", "B", "B"),
        ("Die Antwort lautet (B)", "B", "B"),
        ("Die richtige Antwort ist B.", "B", "B"),
        ("Правильный ответ: B", "B", "B"),
        ("Đáp án: B", "B", "B"),
        ("الإجابة: B", "B", "B"),
    ],
)
def test_choice_found(reply: str, answer: str, characters: str) -> None:
    parsed = parse_choice(reply, SENTIMENT)
    assert parsed.answer == answer
    assert reply[parsed.start : parsed.stop] == characters


def test_words_of_other_languages_deny_nothing_in_english() -> None:
    options = ["P > MC", "P < MC.", "Recognition of self and non self", "a faux pas"]
    for reply, letter in [
        ("The correct answer is P < MC.", "B"),
        ("I think it is recognition of self and non self", "C"),
        ("A) is wrong. (C) Recognition of self and non self is correct.", "C"),
        ("It is a faux pas.", "D"),
        ("La (B) non è corretta", None),
        ("(B) n'est pas correcte", None),
        ("(B) est faux", None),
        ("It must be (B), with all errata.", "B"),
        ("La (B) è errata.", None),
    ]:
        assert parse_choice(reply, options).answer == letter


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "   \n",
        "Based on the text, profits fell.",
        "A company said it would grow.",
        "I think a company said so",
        "The answer is A company that grew.",
        "A. Smith said so.",
        "A or B",
        "(A) or (B)",
        "The answer is A or B.",
        "Answer: A, B",
        "Answer: A and C",
        "D",
        "(E)",
        "The answer is Z.",
        "I cannot answer this question.",
        "I'm sorry, but as an AI I do not judge.",
        "It is not negative.",
        "(A) is wrong.",
        "Option A is incorrect.",
        "The answer is unclear.",
        "The answer is not A.",
        "The answer is not A, but B and C are.",
        "The answer is not A but B is tempting, too.",
        "The answer is not B but B.",
        "The answer is probably A or B.",
        "The answer is likely a gain.",
        "A. negative\nB. neutral\nC. positive",
        "It could be negative or positive.",
        "<think>The answer is B. But wait",
        "[THINK]The answer is B. But wait",
        "Vitamin C is good for you.",
        "Can't say.",
        "!!!",
        "Answer: B. positive",
        "A) Incorrect, since profits fell.",
        "A) No, profits fell.\nB) Yes, nothing changed.\nC) No.",
        "**A) negative** – too strong\n**B) neutral** – that is it",
        "(B) neutral is not supported",
        "(B) neutral: not supported",
        "B) neutral isn't it",
        "**B. neutral** is wrong",
        "B. neutral cannot be right.",
        "Answer: (B) neutral is not supported",
        "Answer: (B) is wrong.",
        "Answer: B isn't it.",
        "答案不是B",
        "如果选B",
        "选B的人",
        "The wrong answer is B.",
        '{"answer": "A person said so"}',
        "It is not positive or negative.",
        "The answer is not only A but also B.",
        "Option: A. negative\nOption: B. neutral",
        "答案是A还是B",
        "答案是A或B",
        "答案是A公司",
        "(B)不正确",
        "Die Antwort ist nicht B.",
        "Die Antwort ist (A) oder (B).",
        "Die Option (B) ist falsch.",
        "(B) ist nicht richtig",
        "La respuesta es A o B",
        "La opción (B) es incorrecta.",
        "(B) est fausse",
        "Вариант (B) неверный",
        "Ответ: В",
    ],
)
def test_choice_never_guessed(reply: str) -> None:
    assert parse_choice(reply, SENTIMENT).answer is None


def test_choice_by_option_text_is_exact_longest_and_unambiguous() -> None:
    assert parse_choice("New York", CITIES).answer == "A"
    assert parse_choice("The answer is New York City.", CITIES).answer == "B"
    assert parse_choice("I would say New York City", CITIES).answer == "B"
    assert parse_choice("york", CITIES).answer == "C"
    assert parse_choice("New York or Boston", CITIES).answer is None
    assert parse_choice("Both perform all life processes within one cell", CELLS).answer == "B"
    assert parse_choice("Both", CELLS).answer is None
    assert parse_choice("yes", ["yes", "Yes", "no"]).answer is None
    assert parse_choice("no", ["yes", "Yes", "no"]).answer == "C"
    assert parse_choice("It is 12\u00a0345.", ["12\u00a0345 km", "12\u00a0345"]).answer == "B"
    assert parse_choice("12\u00a0345", ["12 345", "5"]).answer == "A"
    assert parse_choice("x > 5", ["x < 5", "x > 5"]).answer == "B"
    assert parse_choice("Answer: -5", ["5", "−5"]).answer == "B"
    assert parse_choice("Answer: $1,200.00", ["120", "1200"]).answer == "B"
    assert parse_choice("101", ["0101", "101"]).answer == "B"
    assert parse_choice("The answer is 10.5 m", ["10", "10.5 m", "5"]).answer == "B"
    assert parse_choice("None of the above", ["one", "none of the above"]).answer == "B"
    assert (
        parse_choice("The answer is none of the above", ["one", "none of the above"]).answer == "B"
    )


def test_choice_more_than_26_options_and_one_option() -> None:
    many = [f"option number {i}" for i in range(30)]
    assert parse_choice("Z", many).answer == "Z"
    assert parse_choice("A", ["only"]).answer == "A"
    assert parse_choice("B", ["only"]).answer is None


@pytest.mark.parametrize(
    ("reply", "answer", "characters"),
    [
        ("#### 18", "18", "18"),
        ("A: 18", "18", "18"),
        ("She has 16 - 3 = <<16-3=13>>13 left.\nA: 26", "26", "26"),
        ("$1,234.50", "1234.5", "$1,234.50"),
        ("18 dollars", "18", "18"),
        ("The answer is $18.", "18", "$18"),
        ("The answer is 9 * 2 = 18 dollars", "18", "18"),
        ("The answer is 18 because 9*2=18", "18", "18"),
        ("The answer is 18 dollars, since x = 3.", "18", "18"),
        ("Answer: 18, as 4 x 5 = 20 and 20 - 2 = 18", "18", "18"),
        ("The answer is 18 (x = 3).", "18", "18"),
        ("The answer is 9 * 2 = 18 because x = 3", "18", "18"),
        ("The answer is 18. Here n = 3.", "18", "18"),
        ("The answer is 18 = 9 * 2", "18", "18"),
        ("The answer is 18 (since 100 = 82 + 18)", "18", "18"),
        ("Answer: 3 (boxes) * 6 = 18", "18", "18"),
        ("A: 16 eggs at first. 16 - 3 - 4 = 9, 9 * 2 = 18", "18", "18"),
        ("Answer: 7 times as many as 70 is 490, less 40 = 450", "450", "450"),
        ("-5", "-5", "-5"),
        ("−5", "-5", "−5"),
        ("it falls to -$5", "-5", "-$5"),
        ("10-5", "5", "5"),
        ("3/4", "0.75", "3/4"),
        ("2/6", "1/3", "2/6"),
        ("1 1/2", "1.5", "1 1/2"),
        ("It takes 1½ hours.", "1.5", "1½"),
        ("The answer is 2 ¾ cups", "2.75", "2 ¾"),
        ("-⅓", "-1/3", "-⅓"),
        ("\\boxed{\\frac{1}{2}}", "0.5", "\\frac{1}{2}"),
        ("\\boxed{-\\frac{3}{4}}", "-0.75", "-\\frac{3}{4}"),
        ("\\boxed{2\\frac{1}{2}}", "2.5", "2\\frac{1}{2}"),
        ("x = 1-\\frac{1}{2}", "0.5", "\\frac{1}{2}"),
        ("Answer: 1,\\!234", "1234", "1,\\!234"),
        ("the last of (3,\\,100)", "100", "100"),
        ("\\boxed{1{,}234}", "1234", "1{,}234"),
        ("\\boxed{12\\,345.5}", "12345.5", "12\\,345.5"),
        ("50%", "50", "50%"),
        ("1.5e3", "1500", "1.5e3"),
        ("3x10^8 m/s", "300000000", "3x10^8"),
        ("1.5 × 10^3", "1500", "1.5 × 10^3"),
        ("\\boxed{2 \\times 10^{-3}}", "0.002", "2 \\times 10^{-3}"),
        ("5 * 10^2 = 500", "500", "500"),
        ("12 * 10 = 120", "120", "120"),
        ("1\u00a0000\u202f000 euros", "1000000", "1\u00a0000\u202f000"),
        ("1 000 000 people", "1000000", "1 000 000"),
        ("The answer is 12 345.5", "12345.5", "12 345.5"),
        ("#### 12 345\nThat is all.", "12345", "12 345"),
        ("#### 3 100 dollar bills", "3", "3"),
        ("5 apples, 10 20 300", "300", "300"),
        ("2 1000", "1000", "1000"),
        ("$5k", "5000", "$5k"),
        ("It costs $2.5M.", "2500000", "$2.5M"),
        ("€3bn", "3000000000", "€3bn"),
        ("He ran a 5k", "5", "5"),
        ("5 km", "5", "5"),
        ("$5 km", "5", "$5"),
        ("$5kg", "5", "$5"),
        ("$5k$", "5", "$5"),
        ("$2k+n$", "2k+n", "2k+n"),
        (".5", "0.5", ".5"),
        ("007", "7", "007"),
        ("1,000", "1000", "1,000"),
        ("2.5 million people", "2500000", "2.5 million"),
        ("<think>3</think> 4", "4", "4"),
        ("first 3, then 4", "4", "4"),
        ('{"final_answer": 18, "confidence": 95}', "18", "18"),
        ("The answer is negative 5.", "-5", " 5"),
        ("The answer is minus $5", "-5", " $5"),
        ("9 minus 5", "5", "5"),
        ("The answer is __18__ dollars.", "18", "18"),
        ("The answer is <b>18</b>.", "18", "18"),
        ("The answer is Rs.18", "18", "18"),
        ("The answer is 3i", "3i", "3i"),
        ("The answer is $x = 5$ or $x = 7$.", "5$ or $x = 7", "5$ or $x = 7"),
        ("The answer is the sum of 9 and 9, which is 18.", "18", "18"),
        ("The answer is found by multiplying 9 by 2, which gives $18", "18", "$18"),
        ("The answer is 18, which is 2.", "18", "18"),
        ("The price rose from 5 to 18.", "18", "18"),
        ("It takes from 5 to 18 days.", "5 to 18", "5 to 18"),
        ("She makes $18. (She sells 9 eggs at $2 each.)", "18", "$18"),
        ("She has 18 apples (5, 6 and 7).", "18", "18"),
        ("20 - 2 (which is = 18)", "18", "18"),
        ("It is π (about 3.14)", "3.14", "3.14"),
        ("The answer is 18. The answer is not 12.", "18", "18"),
        (
            "The answer is 18. If she had 2 more, the answer would be 22.",
            "18",
            "18",
        ),
        ("The correct answer is 18, the incorrect answer is 20.", "18", "18"),
        ("The answer is not 12 but 18.", "18", "18"),
        ("<answer>18</answer> after 3 steps", "18", "18"),
        ("The answer is １，２３４．", "1234", "１，２３４"),
        ("－１８", "-18", "－１８"),
        ("答案是42。", "42", "42"),
        ("Die Antwort ist 42, denn 6 * 7 = 42 und 1 bleibt", "42", "42"),
        ("La respuesta es 1.234,5 euros", "1234.5", "1.234,5"),
    ],
)
def test_number_found(reply: str, answer: str, characters: str) -> None:
    parsed = parse_number(reply)
    assert parsed.answer == answer
    assert reply[parsed.start : parsed.stop] == characters


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "none",
        "I cannot answer 5 questions",
        "H2O",
        "x1",
        "It is not 12.",
        "Die Antwort ist nicht 5",
    ],
)
def test_number_absent(reply: str) -> None:
    assert parse_number(reply).answer is None


def test_hostile_numbers_are_neither_evaluated_nor_expanded() -> None:
    assert parse_number("9" * 5000).answer == "9" * 5000
    assert parse_number("1e9999").answer == "1e9999"
    assert parse_number("1/0").answer == "1/0"
    assert parse_number("__import__('os').getpid()").answer is None
    assert parse_final_number("2020 was a year").answer is None


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("Answer: Paris", "Paris"),
        ("**Answer:** Paris\n", "Paris"),
        ("**Answer: Paris, I think.**", "Paris, I think."),
        ('"Paris"', "Paris"),
        ("“Paris”", "Paris"),
        ("```\nprint(1)\n```", "print(1)"),
        ("```python\nprint(1)\n```", "print(1)"),
        ("**Paris**", "Paris"),
        ("Two\nlines", "Two\nlines"),
        ("Dear John,\nthe answer is no.\nYours", "Dear John,\nthe answer is no.\nYours"),
        ("It is late.\n**The answer is:** Paris", "Paris"),
        ('"a" and "b"', '"a" and "b"'),
        ("Let me think.\nFinal answer: Paris", "Paris"),
        ("Which city?\nAnswer: Rome\nFinal answer: Paris", "Paris"),
        ("Capital of France?\nAnswer: Paris", "Capital of France?\nAnswer: Paris"),
        ("1. It flies.\nAnswer: a bird\n2. It barks.\n**Answer:** a dog",) * 2,
        ("Answer: 1. It flies.\nAnswer: a bird", "1. It flies.\nAnswer: a bird"),
        (" Answer: Paris", "Paris"),
        ("Paris, I think.\nAnswer:", "Paris, I think."),
        ("I can't help but smile at this poem.", "I can't help but smile at this poem."),
        ("I'm sorry for your loss. Take your time.", "I'm sorry for your loss. Take your time."),
        ("I don't know about you, but I do.", "I don't know about you, but I do."),
        ("I cannot say enough good things.", "I cannot say enough good things."),
        ("I can't tell you how happy I am.", "I can't tell you how happy I am."),
        ("I can't do without coffee.", "I can't do without coffee."),
    ],
)
def test_text_found(reply: str, answer: str) -> None:
    parsed = parse_text(reply)
    assert parsed.answer == answer
    assert reply[parsed.start : parsed.stop] == answer


@pytest.mark.parametrize(
    "reply",
    [
        "",
        " \n",
        "Answer:",
        "**Final answer:** ",
        "I cannot answer that.",
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but no.",
        "Sorry, I don't know.",
        "As an AI language model, I have no opinion.",
        "I am unable to determine this.",
        "I don't know",
        "Answer: I cannot determine this.",
        "I cannot...",
        '""',
        "I can't provide enough information to answer that.",
        "I cannot answer without more information.",
        "I can't tell you how to pick a lock.",
        "I don't know about your city.",
    ],
)
def test_refusals_and_empty_replies_are_no_answer(reply: str) -> None:
    for kind in ("text", "span"):
        assert parse(reply, kind=kind).answer is None


@pytest.mark.parametrize(
    ("reply", "kind", "answer"),
    [
        (" 18. She sold 3 a day.", "number", "18"),
        (" **18** dollars, as 9 * 2 = 18 and 5 were given away", "number", "18"),
        (" 9 eggs * $2 = $18", "number", "18"),
        (" $9 per egg x 2 eggs = $18", "number", "18"),
        (" 48/2 = 24; 48 + 24 = 72", "number", "72"),
        (" 3 hours * 60 = 180 minutes.", "number", "180"),
        (" 50% of 20 = 10", "number", "10"),
        (" 5! = 120", "number", "120"),
        (" 2x + 3 = 7", "number", "7"),
        (" 1. First compute 3*4.\n2. So 12 + 5 makes 17", "number", "17"),
        (" 9 * 2 = 18. That leaves 4.", "number", "18"),
        (" 9 + 2 makes 11", "number", "11"),
        (" There are 12 apples and 5 more, so 17.", "number", "17"),
        (" 3 for each; the answer is 12", "number", "12"),
        ("<think>\nOkay, 12 apples times 3", "number", None),
        ("<think>\nOkay, 12 times 3</think>36", "number", "36"),
        (" Paris\nIt lies on the Seine.", "span", "Paris"),
        (" Paris\n\nWhat is the capital of Spain?\n\nAnswer: Madrid", "span", "Paris"),
        (" 21\n\n\nWhat is 2 times 10?\nAnswer: 20\n\n", "number", "21"),
        (" B\n\nIt fell.\nA. negative\nB. neutral\nAnswer: A", "choice", "B"),
        (" Let me see.\n\n9 * 2 = 18\n\nAnswer: 18", "number", "18"),
        ("5 + 3 = 8\n\nTwice that is 16.\nAnswer: 16", "number", "16"),
        (" There are 5 + 3 = 8 apples.\n\nTwice that is 16.\nAnswer: 16", "number", "16"),
        ("A) is not it.\n\nB) is no more.\nAnswer: C", "choice", "C"),
        ("We look for a city.\n\nIt is big.\nAnswer: Paris", "span", "Paris"),
        ("Sure!\n\nIt is big.\nAnswer: Paris", "span", "Paris"),
        ("<think>\nIt could be Paris", "span", None),
        ("<think></think> 18. She sold 3 a day.", "number", "18"),
        ("<think></think>\n" * 5000 + "18", "number", "18"),
        ("<think>\n\n</think>\n\n 18. She sold 3 a day.", "number", "18"),
        ("<think>\n\n</think>\n\nB because profits fell", "choice", "B"),
        ("<think>\n\n</think>\n\n Paris\n\nCapital of Spain?\n\nAnswer: Madrid", "span", "Paris"),
        (" B", "choice", "B"),
        ("<think>\nB looks right", "choice", None),
    ],
)
def test_a_reply_that_was_begun(reply: str, kind: Kind, answer: str | None) -> None:
    options = SENTIMENT if kind == "choice" else None
    parsed = parse(reply, kind=kind, options=options, begun="Answer:")
    assert parsed.answer == answer
    if answer is not None:
        assert reply[parsed.start : parsed.stop].lstrip("$") == answer


@pytest.mark.parametrize(
    ("reply", "kind", "answer"),
    [
        ("The process begins when the egg and then the", "text", None),
        (" 18", "number", None),  # of 180?
        (" 18 dollars, as", "number", "18"),
        ("Let us see: 12 apples and 3", "number", None),
        ("Let us see: #### 12 and", "number", "12"),
        (" Paris\nIt lies", "span", "Paris"),
        (" The city on the", "span", None),
    ],
)
def test_a_reply_that_was_cut_off(reply: str, kind: Kind, answer: str | None) -> None:
    begun = "" if kind == "text" else "Answer:"
    assert parse(reply, kind=kind, begun=begun, finished=False).answer == answer


@pytest.mark.parametrize(
    "reply",
    [
        "The answer is probably neutral or positive.",
        "Answer: negative or neutral",
        "I doubt anybody knows, and I don't think it's B.",
        "I don't think the answer is B.",
        "I doubt that the answer is neutral.",
        "I'm not sure the answer is B",
        "It is so neutral.\nIt is so positive.",
        "Negative, neutral or positive?",
        "Sentiment: not given",
    ],
)
def test_what_decides_for_no_option(reply: str) -> None:
    assert parse_choice(reply, SENTIMENT).answer is None


@pytest.mark.parametrize(
    "reply",
    [
        "neutral\n\nSome would say it is positive.",
        "B\n\nA careless reader may think it is negative.",
        "The answer is B. A common mistake is to think it is A.",
        "**B. neutral**\n\nThe CEO says it is positive.",
        "The answer is (B), although he argues that it is negative.",
        "The answer is B.\nAnother tempting option is A.",
        "B is correct. The next closest choice is C.",
        "Answer: neutral\nSentiment: negative",
        "The answer is B.\nIf it had been a loss, it would be bad news, so C.",
        "A) positive\nB) neutral\nC) negative\n\nNothing changed, so B.",
    ],
)
def test_a_line_in_passing_does_not_replace_the_answer(reply: str) -> None:
    assert parse_choice(reply, SENTIMENT).answer == "B"


@pytest.mark.parametrize(
    "reply",
    [
        "If profits rise, it is positive.\nIf profits fall, it is negative.",
        "The worst option is A.",
        "The headline says it is positive.",
        "The question is whether it is neutral.",
        "A gain was announced and so positive\nnews may follow.",
        "- the first line: a gain, so positive.\n- the second line: a loss, so negative.",
    ],
)
def test_what_is_supposed_or_said_by_others_concludes_nothing(reply: str) -> None:
    long = "The results of the quarter were published. " * 8  # a short one that names one is read
    assert parse_choice(long + "\n" + reply, SENTIMENT).answer is None


def test_an_option_that_is_the_subject_of_the_first_sentence_is_no_answer() -> None:
    cells = ("mitochondria", "chloroplasts", "ribosomes")
    for reply in (
        "Mitochondria, the powerhouse of the cell, do not make sugars. Chloroplasts do.",
        "Mitochondria, which burn sugars, do not make them.",
    ):
        assert parse_choice(reply, cells).answer != "A"
    assert parse_choice("Mitochondria, unlike plastids, burn sugars. (B)", cells).answer == "B"
    options = ("yes", "no", "maybe")
    for reply in (
        "Yes, but only in women. In men, no.",
        "No. 3 on the list is the study in question.",
        "I'll say no more about the methods. The finding is significant.",
    ):
        assert parse_choice(reply, options).answer is None, reply
    assert parse_choice("Yes, there was no difference in harm.", options).answer == "A"
    assert parse_choice("Maybe. It is not clearly yes.", options).answer == "C"


def test_an_option_that_opens_a_reply_decides_whatever_is_denied_later() -> None:
    options = ("yes", "no", "maybe")
    assert parse_choice("No, this is not supported by the data.", options).answer == "B"
    assert (
        parse_choice("Yes. " + "It was shown that one does not fall. " * 20, options).answer == "A"
    )
    assert parse_choice("Yes, no, maybe: who knows.", options).answer is None
    # A list is no answer.
    assert parse_choice("1. We add two.\n2. We add three.", ("1", "2", "3")).answer is None


def test_a_range_is_one_in_a_box_and_outside() -> None:
    for reply in ("\\boxed{5-10}", "5-10", "The answer is 5-10.", "$5-$10", "5–10", "5 to 10"):
        found = parse_number(reply).answer
        assert found is not None
        assert normalise(found, "number") == "5-10", reply
    assert parse_number("\\boxed{10-5}").answer == "5"


def test_a_number_alone_in_bold() -> None:
    for reply in ("**18**", "__18__", "_18_", "**18** ", "**$18**", "**18 apples**"):
        assert parse_number(reply).answer == "18", reply
    assert parse_number("2**3").answer == "8"


def test_a_span_ends_where_it_is_explained() -> None:
    for told in (", since it rained", " because it rained", "**, as stated", " (because of it)"):
        assert parse_span(f"The answer is {'**' * told.count('**')}Paris{told}.").answer == "Paris"
    assert parse_span("The answer is because it rained.").answer == "because it rained"
    assert parse_span("Answer: since 1998").answer == "since 1998"


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("The answer is Paris, not Rome.", "Paris"),
        ("The answer is not Rome but Paris.", "Paris"),
        ("The answer is not guilty.", "not guilty"),
        ("The answer is not only Rome but Paris", "not only Rome but Paris"),
        ("The answer is Paris. Some say Lyon.", "Paris"),
        ("The answer is Prof. Smith.", "Prof. Smith"),
        ("The answer is St. Louis.", "St. Louis"),
        ('{"answer": "New York", "confidence": 0.9}', "New York"),
        ('{"reason": "It says so", "final_answer": "New York"}', "New York"),
        ('Answer: "Paris", "Rome"', '"Paris", "Rome"'),
        ("Sure!\n\nParis", "Paris"),
        ("Here is the answer:\nParis", "Paris"),
        ("Yes, because the text says so.", "Yes"),
    ],
)
def test_span_leaves_out_what_leads_to_it_and_what_follows(reply: str, answer: str) -> None:
    assert parse_span(reply).answer == answer


@pytest.mark.parametrize(
    "answer",
    [
        "Paris, as well as London",
        "John, given name Johannes",
        "Just because",
        "He left because he was ill",
        "partly because of rain",
        "(Paris, since it is old)",
        'the song "Sad, because I said so" by X',
        '{"a": "x, as y"}',
    ],
)
def test_a_span_that_holds_a_reason_itself(answer: str) -> None:
    assert parse_span(f"Answer: {answer}").answer == answer


def test_a_span_of_code_is_not_cut() -> None:
    assert parse_span("Answer: ```\n# no, because\nx = 1\n```").answer == "# no, because\nx = 1"


def test_what_will_be_chosen_in_the_course_of_a_calculation_is_no_answer() -> None:
    assert parse_number("I will pick 3 apples first and then 5 more, which makes 8").answer == "8"
    assert parse_number("I'll choose 2 of them, so there are 10 ways").answer == "10"


def test_a_formula_without_digits_is_one() -> None:
    assert normalise("\\pi", "number") == normalise("π", "number") == "π"
    assert parse_number("x+y").answer == "x+y"


def test_span_takes_what_follows_the_marker() -> None:
    reply = "The capital of France is old. The answer is **Paris**.\nIt lies on the Seine."
    parsed = parse_span(reply)
    assert parsed.answer == "Paris"
    assert reply[parsed.start : parsed.stop] == "Paris"
    assert parse_span("Paris.").answer == "Paris"
    for between in (": ", ":\n\n", ":** ", " - ", ": **"):
        for wrapped in ("Paris", "**Paris**"):
            assert parse_span(f"The answer is{between.rstrip('*')}{wrapped}").answer == "Paris"
    assert parse_span("**The answer is:** Paris").answer == "Paris"
    assert parse_span("The answer is -5 °C.").answer == "-5 °C"
    assert parse_span("The answer is 5$").answer == "5$"
    assert parse_span("The answer is the U.S.").answer == "the U.S."
    assert parse_span("The answer is:").answer is None


@pytest.mark.parametrize(
    "reply",
    [
        "**Answer: Paris**",
        "**Final answer: Paris.**",
        "\\boxed{Paris}",
        "so $\\boxed{\\text{Paris}}$.",
        "Answer: ```\nParis\n```\nIt lies on the Seine.",
        "Q: Which city?\nA: Paris",
        "<answer>Paris</answer>",
        "<answer>\nParis\n</answer>\nIt lies on the Seine.",
        '{"answer": "Paris"}',
        "Answer： Paris",
        "答案是：Paris。",
        "Die Antwort lautet: Paris",
    ],
)
def test_span_takes_no_mark_that_was_opened_before_it(reply: str) -> None:
    parsed = parse_span(reply)
    assert parsed.answer == reply[parsed.start : parsed.stop] == "Paris"


def test_kind_of_the_given_answer() -> None:
    assert answer_kind("B", SENTIMENT) == "choice"
    assert answer_kind("18", None) == "number"
    assert answer_kind("$1,234.50", None) == "number"
    assert answer_kind("50%", []) == "number"
    assert answer_kind("1 000 000", None) == answer_kind("1 000", None) == "number"
    assert answer_kind("007", None) == "span"
    assert answer_kind("New York", None) == "span"
    assert answer_kind("She has 16 - 3 = 13 eggs left to sell.\nA: 26", None) == "text"


def test_a_short_first_paragraph_is_the_span() -> None:
    for reply in ("Paris.\n\nIt is the capital.", "<think>hm</think>**Paris**\n\nExplanation: …"):
        assert parse(reply, kind="span").answer == "Paris"
    long = "The capital of France is the city of Paris\n\nIndeed"
    assert parse(long, kind="span").answer == long


def test_issue_cases_span() -> None:
    assert matches("New York", "new york", kind="span")
    assert matches("the New York", "New York.", kind="span")
    assert not matches("New York", "New Jersey", kind="span")
    assert not matches("New York", "N", kind="span")
    assert not matches("007", "008", kind="span")
    assert not matches("007", "7", kind="span")
    assert matches("007", "7", kind="number")
    assert not matches("007", "008", kind="number")
    assert matches("New York City", "New York", kind="span")
    assert not matches("May 5 1998", "May 5 1999", kind="span")
    assert not matches("guilty", "not guilty", kind="span")
    assert matches("18 dollars", "18", kind="span")
    assert matches("1,000 men", "1000 men", kind="span")
    assert matches("Obama Barack", "Barack Obama", kind="span")


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("vitamin A", "vitamin B"),
        ("blood type A", "blood type B"),
        ("3:2", "2:3"),
        ("2020-01-02", "2020-02-01"),
        ("won 2-1", "won 2"),
        ("1998-1999", "1998"),
        ("can't swim", "swim"),
        ("doesn’t rise", "rise"),
        ("C#", "C"),
        ("A-", "A"),
        ("A-", "A+"),
        ("blood group AB−", "blood group AB"),
        ("10²", "102"),
        ("1½", "11/2"),
    ],
)
def test_spans_that_differ_in_little(a: str, b: str) -> None:
    assert not matches(a, b, kind="span")
    assert not matches(b, a, kind="span")


def test_vulgar_fractions() -> None:
    assert matches("1½ cups", "1 1/2 cups", kind="span")
    assert matches("½", "1/2", kind="span")
    assert normalise("1½", "number") == "1.5"
    assert normalise("½", "number") == "0.5"


def test_gold_answer_list_is_a_list_of_answers() -> None:
    gold = ["NYC", "New York"]
    assert matches("new york", gold, kind="span")
    assert not matches("N", gold, kind="span")
    assert not matches("York NYC", gold[:0], kind="span")


def test_matches_choice_number_text() -> None:
    assert matches("b.", "B", kind="choice", options=SENTIMENT)
    assert matches("neutral", "B", kind="choice", options=SENTIMENT)
    assert not matches("positive", "B", kind="choice", options=SENTIMENT)
    assert not matches(None, "B", kind="choice", options=SENTIMENT)
    assert matches("(b)", "B", kind="choice")
    assert matches("1,000", "1000.0", kind="number")
    assert matches("50%", "50", kind="number")
    assert not matches("50%", "0.5", kind="number")
    assert matches("1/2", "0.5", kind="number")
    long = "He buys 3 eggs and 4 eggs so he has 3+4=7 eggs in his basket\nA: {}"
    assert matches(long.format(7), "Seven in all, as 3 + 4 is seven.\n#### 7", kind="text")
    assert not matches(long.format(7), long.format(8), kind="text")
    assert matches("the cat sat on the mat", "a cat sat on a mat", kind="text")
    assert not matches("dogs bark", "cats meow", kind="text")
    with pytest.raises(ValueError, match="threshold must be in"):
        matches("a", "b", kind="span", threshold=0.0)
    with pytest.raises(ValueError, match="options must hold"):
        parse("B", kind="choice")


def test_normalise() -> None:
    assert normalise("The  U.S. Army!", "span") == "us army"
    assert normalise("co\u00adoperate", "span") == "cooperate"
    assert normalise("ＦＵＬＬ width", "span") == "full width"
    assert normalise("well-known", "span") == "well known"
    assert normalise("Straße", "span") == normalise("STRASSE", "span")
    assert normalise("-5.0 °C", "span") == "-5 °c"
    assert normalise("1,000", "number") == normalise("1000", "number") == "1000"
    assert normalise(".5", "span") == "0.5"
    assert normalise("?!", "span") == "?!"
    assert normalise("(b)", "choice") == "B"
    assert token_f1("東京都", "東京") == pytest.approx(0.8)
    assert token_f1("", "") == 1.0
    assert token_f1("", "a") == 0.0


@pytest.mark.parametrize(
    "reply",
    [
        "Answer is " * 10_000,
        "(" * 100_000,
        "A" * 100_000,
        "A " * 50_000,
        "a\n" * 50_000,
        "(A)" * 33_000,
        "neutral " * 12_500,
        "*" * 100_000,
        " " * 100_000,
        "a\n" + " " * 100_000 + "a",
        "\n" * 100_000,
        "1," * 50_000,
        "1" * 100_000,
        "1 " * 50_000,
        "1/" * 50_000,
        "1,111" * 20_000,
        "100 " * 25_000,
        "answer to " * 10_000,
        "answer" + " " * 100_000,
        "-" * 100_000,
        "####" * 25_000,
        "\\boxed{" * 14_000,
        "I'm sorry " * 10_000,
        "```" * 33_000,
        '"' * 100_000,
        "é" * 100_000,
        "the option " * 9_000,
        "not. " * 20_000 + "(A)",
        "5 or " * 20_000,
        "1+" * 50_000,
        "(1" * 50_000,
        "\\frac{" * 16_000,
        "Answer: 2^" * 10_000,
        "A: 1, 2" * 14_000,
        "not A but " * 10_000,
        "wait, no, actually " * 5_500,
        "if the answer would be " * 4_500,
        "answer that " * 8_500,
        "not because " * 8_500,
        "negative " * 11_000,
        "1 from 5 to " * 8_500,
        "5, which is " * 8_500,
        "()" * 50_000,
        "answer is not " * 7_000,
        'answer: "' * 11_000,
        "Paris. Rome" * 9_000,
        "a:\n" * 33_000,
    ],
)
def test_replies_of_100_kb_take_linear_time(reply: str) -> None:
    begin = time.process_time()
    for kind in ("choice", "number", "span", "text"):
        parse(reply, kind=kind, options=SENTIMENT)
    assert time.process_time() - begin < 3.0


def test_a_long_reply_is_read_like_a_short_one() -> None:
    reasoning = "Profits rose by 3 % in May, said a manager. " * 2_300
    parsed = parse_choice(reasoning + "\n**Answer:** B", SENTIMENT)
    assert (parsed.answer, parsed.start) == ("B", len(reasoning) + 13)
    assert parse_choice(reasoning, SENTIMENT).answer is None


def test_long_texts_that_were_compared_are_not_held() -> None:
    words = [f"w{chr(97 + i % 26)}{i % 7}x" for i in range(1000)]
    tracemalloc.start()
    try:
        for i in range(300):
            agreement(" ".join([*words, f"first{i}"]), f"second{i} of them", kind="text")
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 4e6  # bytes; the words of one such text are 64 kB


def test_a_text_that_is_compared_several_times_in_a_row_is_read_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[str] = []

    def counted(reply: str) -> Parsed:
        read.append(reply)
        return parse_final_number(reply)

    monkeypatch.setattr("robustft.answers.parse_final_number", counted)
    given = "Mix the flour with the water and let the dough rest for an hour or so."
    for reply in ("Knead it well.", "Knead it well.", "Let it rest."):
        agreement(given, reply, kind="text")
    assert read == [given]


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=80), st.sampled_from(["choice", "number", "span", "text"]))
def test_law_any_reply_gives_a_span_inside_it(reply: str, kind: str) -> None:
    parsed = parse(reply, kind=kind, options=SENTIMENT)
    assert 0 <= parsed.start <= parsed.stop <= len(reply)
    assert (parsed.answer is None) == (parsed.start == parsed.stop)
    if kind in ("span", "text") and parsed.answer is not None:
        assert reply[parsed.start : parsed.stop] == parsed.answer


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_law_agreement_is_symmetric_and_reflexive(a: str, b: str) -> None:
    for kind in ("number", "span", "text"):
        assert agreement(a, a, kind=kind) == 1.0
        assert 0.0 <= agreement(a, b, kind=kind) <= 1.0
        assert agreement(a, b, kind=kind) == agreement(b, a, kind=kind)


@settings(max_examples=100, deadline=None)
@given(st.integers(-(10**9), 10**9), st.sampled_from([1, 2, 4, 5, 8, 10, 100, 3, 7]))
def test_law_numbers_survive_their_spelling(top: int, bottom: int) -> None:
    spelt = parse_number(f"{top}/{bottom}").answer
    assert spelt is not None
    assert Fraction(spelt) == Fraction(top, bottom)
    assert parse_number(f"{top:,}").answer == str(top)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=40))
@example("8\xa0…2♭x²")
def test_law_what_is_normalised_stays_as_it_is(text: str) -> None:
    for kind in ("span", "text", "choice"):
        once = normalise(text, kind)
        assert normalise(once, kind) == once
