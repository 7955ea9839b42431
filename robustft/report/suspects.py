"""The report's list of suspicious records: everything needed to judge one, opened by a tap."""

from __future__ import annotations

import math
from collections.abc import Sequence

from robustft.report import markup
from robustft.report.data import Opinion, Suspect
from robustft.report.figures import gauge
from robustft.terminal import counted

SHOWN = 20
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ACTIONS = {"keep": "kept", "relabel": "relabeled", "drop": "dropped"}


def suspects_section(suspects: Sequence[Suspect], noisy: int, letters: str = "") -> str:
    """<section> with the first twenty suspects, or a sentence saying that there are none.

    `letters`: what these stand for, in HTML.
    """
    if not suspects:
        body = (
            "<p class='empty'>No record was suspicious enough to show.</p>"
            if noisy == 0
            else "<p class='empty'>No examples were collected for this report.</p>"
        )
    else:
        shown = suspects[:SHOWN]
        shared = _shared_opening([suspect.question for suspect in shown])
        body = "".join(_card(rank, one, shared) for rank, one in enumerate(shown, start=1))
        many = "The most suspicious record" if len(shown) == 1 else f"The {len(shown)} most "
        many += "" if len(shown) == 1 else "suspicious records"
        lead = f"{many}, highest noise score first. Tap one to open it.{letters}"
        body = f"<p class='lead'>{lead}</p>{body}"
    return f"<section id='suspects'><h2>Most suspicious</h2>{body}</section>"


def _shared_opening(questions: Sequence[str]) -> int:
    """Length of the instruction that opens every question; a headline without it tells more."""
    if len(questions) < 2:
        return 0
    low, high = min(questions), max(questions)  # what these two share, all share
    length = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    opening = low[:length]
    cut = max(opening.rfind("\n"), opening.rfind(": "), opening.rfind("? ")) + 1
    return cut if cut >= 20 and all(len(question) > cut for question in questions) else 0


def _card(rank: int, suspect: Suspect, shared: int) -> str:
    action = suspect.action if suspect.action in _ACTIONS else "keep"
    change = f"<span class='given'>{_short(suspect, suspect.given)}</span>"
    if action == "relabel" and suspect.answer is not None and suspect.answer != suspect.given:
        change += f" → <span class='final'>{_short(suspect, suspect.answer)}</span>"
    score = 0.0 if math.isnan(suspect.noise_score) else min(max(suspect.noise_score, 0.0), 1.0)
    headline = "… " * bool(shared) + suspect.question[shared : shared + 160]
    return (
        f"<details class='suspect'{' open' if rank == 1 else ''}><summary>"
        f"<span class='rank'>{rank}</span>"
        f"<span class='headline'>{markup.plain(headline)}</span>"
        f"<span class='facts'><span class='tag {action}'>{_ACTIONS[action]}</span>{change}"
        f"<span class='score'>{gauge(score)}{score:.2f}</span></span></summary>"
        f"<div class='body'><p class='question'>{markup.data(suspect.question)}</p>"
        f"{_options(suspect)}{_answers(suspect)}{_opinions(suspect.opinions)}"
        f"{_neighbours(suspect)}"
        f"<p class='reason'><b>Why:</b> {markup.data(suspect.reason or 'no reason recorded', 600)}"
        f"</p><p class='id'>record {markup.data(suspect.id, 80)}</p></div></details>"
    )


def _options(suspect: Suspect) -> str:
    """The options as a list; given and final answer are marked in words, not by colour alone."""
    if not suspect.options:
        return ""
    items = []
    for letter, option in zip(_LETTERS, suspect.options, strict=False):
        marks = ""
        if letter == suspect.given:
            marks += "<span class='mark given'>given</span>"
        if letter == suspect.answer:
            marks += "<span class='mark final'>final</span>"
        items.append(f"<li><b>{letter}</b> <span>{markup.data(option, 300)}</span>{marks}</li>")
    return f"<ul class='options'>{''.join(items)}</ul>"


def _answers(suspect: Suspect) -> str:
    """Given and final answer in full; not needed where marked options already say it."""
    if suspect.options:
        return ""
    given = f"<dt>Given</dt><dd>{markup.data(suspect.given, 800)}</dd>"
    final = (
        ""
        if suspect.answer in (None, suspect.given)
        else (f"<dt>Final</dt><dd>{markup.data(suspect.answer, 800)}</dd>")
    )
    return f"<dl class='answers'>{given}{final}</dl>"


def _opinions(opinions: Sequence[Opinion]) -> str:
    if not opinions:
        return "<p class='empty'>No expert's opinion is recorded.</p>"
    rows = "".join(
        f"<tr><th scope='row'>{markup.data(opinion.expert, 60)}</th><td>"
        + (markup.data(opinion.answer, 200) if opinion.answer is not None else "<i>none read</i>")
        + f"</td><td class='num'>{_nats(opinion.nll)}</td>"
        f"<td class='num'>{_nats(opinion.entropy)}</td></tr>"
        for opinion in opinions
    )
    return (
        "<div class='scroll'><table><thead><tr><th>Expert</th><th>Answer</th>"
        "<th class='num'>nll</th><th class='num'>entropy</th></tr></thead>"
        f"<tbody>{rows}</tbody></table><p><small>nll: how improbable its answer was to "
        "the expert itself; entropy: how undecided it was. Nats a token; lower is surer."
        "</small></p></div>"
    )


def _neighbours(suspect: Suspect) -> str:
    neighbours = suspect.neighbours
    if not neighbours:
        if all(opinion.expert != "context" for opinion in suspect.opinions):
            return ""
        return "<p class='empty'>No clean neighbours were shown to the context expert.</p>"
    items = "".join(
        f"<li><span class='cosine'>{neighbour.cosine:.2f}</span> "
        f"{markup.data(neighbour.question, 240)} "
        f"<b class='says'>{markup.data(neighbour.answer, 120)}</b> "
        f"<span class='id'>{markup.data(neighbour.id, 60)}</span></li>"
        for neighbour in neighbours
    )
    return (
        f"<details class='neighbours'><summary>{counted(len(neighbours), 'clean neighbour')}"
        f" used as context</summary><ul>{items}</ul></details>"
    )


def _short(suspect: Suspect, answer: str) -> str:
    """`C positive` for a choice, the answer's beginning otherwise."""
    place = _LETTERS.find(answer) if len(answer) == 1 else -1
    if suspect.options and 0 <= place < len(suspect.options):
        answer = f"{answer} {suspect.options[place]}"
    return markup.plain(answer, 28) + "…" * (len(answer) > 28) or "<i>empty</i>"


def _nats(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.3f}"
