"""`report.html`: what a cleaning run did, for a person, in one file that works offline.

No script, no font, no image from elsewhere: a content security policy in the page forbids them, and
every character of the data is escaped, hidden and reordering characters shown as what they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from robustft.files import write_atomically
from robustft.report import figures, markup
from robustft.report.confusions import confusions_table
from robustft.report.data import (
    Counts,
    ExpertRow,
    Histogram,
    ModelRow,
    NeighbourRow,
    Opinion,
    ReportData,
    Suspect,
)
from robustft.report.figures import Bar, Series
from robustft.report.suspects import suspects_section
from robustft.terminal import counted, listed

__all__ = [
    "Counts",
    "ExpertRow",
    "Histogram",
    "ModelRow",
    "NeighbourRow",
    "Opinion",
    "ReportData",
    "Suspect",
    "render",
    "write_report",
]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_KEEP, _RELABEL = Series("kept as given", "keep"), Series("relabeled", "relabel")
_DROP, _REJECT = Series("dropped", "drop"), Series("rejected", "reject")
_MEANING = {
    _KEEP: "",
    _RELABEL: "the answer was replaced",
    _DROP: "no answer was sure enough",
    _REJECT: "could not be read",
}
_REASONS = 8
# What an expert is, for a reader who has not seen the paper.
_EXPERTS = {
    "base": "the model's own answer",
    "reasoned": "its answer after reasoning and reflection",
    "checker": "whether it calls the given answer right",
    "tuned": "the model fine-tuned on other records",
    "context": "its answer with clean neighbours shown",
    "review": "its decision, given the reasoned answer and that one",
}


def write_report(path: Path, summary: ReportData) -> None:
    """Write `summary` as one self-contained HTML file at `path`, in full or not at all.

    Raises:
        UserError: `path` cannot be written.
    """
    write_atomically(path, render(summary))


def render(summary: ReportData) -> str:
    """The report's HTML, a complete document in UTF-8."""
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    suspects = suspects_section(summary.suspects, summary.counts.noisy, _letters(summary))
    sections = (
        _outcome(summary),
        _figures(summary),
        "" if summary.powerless else suspects,
        _experts(summary),
        _run(summary),
    )
    name = markup.plain(Path(summary.source).name or summary.source, 120)
    where = (
        "" if name == markup.plain(summary.source) else f"{markup.plain(summary.source, 300)} · "
    )
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        "<meta name='referrer' content='no-referrer'><meta name='color-scheme' "
        f"content='light dark'><title>robustft: {name}</title><style>{style}</style></head>"
        f"<body><header><p class='brand'>robustft <span>cleaning report</span></p><h1>{name}</h1>"
        f"<p class='when'>{where}{markup.plain(summary.finished)} · version "
        f"{markup.plain(summary.version)}</p></header><main>{''.join(sections)}</main>"
        "<footer>Every record of the input has one line in <code>verdicts.jsonl</code> or "
        "<code>rejects.jsonl</code>.</footer></body></html>\n"
    )


def _outcome(summary: ReportData) -> str:
    """What happened, in one sentence, one bar and four numbers; then what to do next."""
    counts = summary.counts
    parts = [
        (_KEEP, counts.keep),
        (_RELABEL, counts.relabel),
        (_DROP, counts.drop),
        (_REJECT, counts.rejected),
    ]
    records = counts.records
    unjudged = f"{counts.unjudged:,} could not be judged" if counts.unjudged else ""
    if counts.input == 0:
        sentence = "The input held no record."
    elif records == 0:
        sentence = "No line of the input could be read as a record: see <code>rejects.jsonl</code>."
    elif summary.powerless:
        sentence = (
            f"The experts could not judge these {counted(records, 'record')}: nothing was "
            "changed, and the cleaned set is the input as it came."
        )
    elif counts.noisy == 0:
        sentence = (
            f"Of {counted(records, 'record')} none looked noisy"
            f"{f' ({unjudged})' if unjudged else ''}: the cleaned set is the input as it came."
        )
    else:
        sentence = (
            f"<b>{counts.noisy:,}</b> of {counted(records, 'record')} looked noisy "
            f"({markup.percent(counts.noisy, records)})"
            f"{f', {unjudged}' if unjudged else ''}. The cleaned set holds "
            f"<b>{counts.keep + counts.relabel:,}</b>."
        )
    tiles = "".join(
        f"<li class='tile'><span class='dot {series.tone}'></span><b>{number:,}</b>"
        f"<span>{series.name}{f': {meaning}' if (meaning := _MEANING[series]) else ''}</span>"
        f"<i>{markup.percent(number, counts.input)}</i></li>"
        for series, number in parts
    )
    if estimate := markup.plain(_sentence(summary.estimate)):
        sentence += f"<br><span class='estimate'>{estimate}.</span>"
    steps = "".join(
        f"<pre><code>{markup.data(step, 600)}</code></pre>" for step in summary.next_steps
    )
    if steps:
        look = "Look through the most suspicious records below. If the verdicts convince you, train"
        look = look if summary.suspects and not summary.powerless else "Train"
        steps = (
            f"<h3>Next</h3><p class='lead'>{look} on the cleaned set, and measure what that is "
            f"worth on a test file of yours:</p>{steps}"
        )
    return (
        f"<section><p class='sentence'>{sentence}</p><div class='share'>{figures.share_bar(parts)}"
        f"</div><ul class='tiles'>{tiles}</ul>{_notes(summary)}{steps}</section>"
    )


def _sentence(words: str) -> str:
    """`words` with a capital at their head."""
    return words[:1].upper() + words[1:]


def _notes(summary: ReportData) -> str:
    """What to know before reading on: warnings of the run, then of its models."""
    notes = [markup.data(_sentence(warning), 600) for warning in summary.warnings]
    notes += [
        f"<b>{markup.data(model.name, 120)}</b>: {markup.data(model.note, 300)}"
        for model in summary.models
        if model.note
    ]
    return "".join(f"<p class='note'>{note}</p>" for note in notes)


def _figures(summary: ReportData) -> str:
    """The drawn figures, each in a card, each with what it says when it is empty.

    Without verdicts, the reasons alone.
    """
    counts = summary.counts
    why = _card(
        "Why records went where they did",
        "",
        _counted(summary.reasons) + _counted(summary.reject_reasons),
        "No reason was recorded.",
    )
    if summary.powerless:
        return _seen(why)
    cards = [
        _card(
            "Noise score",
            "Higher is noisier: with the crowd, the probability that the given answer is wrong.",
            _stacked(
                (Series("clean", "keep"), summary.scores_clean),
                (Series("noisy", "noisy"), summary.scores_noisy),
                "noise score",
            ),
            "No record was judged.",
        ),
        _card(
            "Confidence of the new answers",
            "How unsure the experts are of each new answer (eq. 7, mean nll; lower is surer). Only "
            "the surest are kept: of all, or of each label where learners on this corpus chose it.",
            _stacked(
                (Series("kept", "relabel"), summary.nll_kept),
                (Series("dropped", "drop"), summary.nll_dropped),
                "nats per token",
                summary.nll_threshold,
            ),
            "No record was denoised, so there was nothing to select."
            if counts.noisy == 0
            else "Selection did not rank by confidence in this run.",
        ),
        _card(
            "Answers before and after",
            "All readable input records against the cleaned set." + _letters(summary),
            figures.before_after(summary.before, summary.after)
            + _legend((Series("before", "before"), Series("after", "after")))
            if summary.before or summary.after
            else "",
            "Only lettered answers are counted here, and there is none.",
        ),
        why,
    ]
    if table := confusions_table(summary.confusions):
        cards.append(
            _card(
                "Given in place of",
                "The commonest pairs among noisy records that share their options. Share: of all "
                "records for which the crowd holds the second option right.",
                table,
                "",
            )
        )
    return _seen(*cards)


def _seen(*cards: str) -> str:
    return f"<section><h2>What the run saw</h2><div class='cards'>{''.join(cards)}</div></section>"


def _card(title: str, caption: str, drawing: str, empty: str) -> str:
    body = drawing or f"<p class='empty'>{empty}</p>"
    return (
        f"<figure class='card'><figcaption><h3>{title}</h3>"
        f"<p>{caption}</p></figcaption>{body}</figure>"
    )


def _legend(names: Iterable[Series]) -> str:
    items = "".join(f"<li><span class='dot {s.tone}'></span>{s.name}</li>" for s in names)
    return f"<ul class='legend'>{items}</ul>"


def _stacked(
    first: tuple[Series, Histogram | None],
    second: tuple[Series, Histogram | None],
    x_label: str,
    threshold: float | None = None,
) -> str:
    layers = [(series, h) for series, h in (first, second) if h is not None and h.total]
    if not layers:
        return ""
    mark = None if threshold is None else (threshold, f"kept up to {threshold:.3g}")
    return figures.histogram(layers, x_label, mark) + _legend(series for series, _ in layers)


def _counted(numbers: Mapping[str, int]) -> str:
    """The commonest reasons; those that start with an action have its colour."""
    rows = sorted(numbers.items(), key=lambda item: (-item[1], item[0]))
    rest = rows[_REASONS:]
    if not sum(number for _, number in rows):
        return ""
    shown = [Bar(name, number, f"{number:,}", _tone(name)) for name, number in rows[:_REASONS]]
    drawn = figures.bars(shown, "Records by reason.")
    if rest:
        records = counted(sum(number for _, number in rest), "record")
        drawn += f"<p class='lead'>and {records} for {counted(len(rest), 'other reason')}</p>"
    return drawn


def _letters(summary: ReportData) -> str:
    """What the letters of options stand for; nothing where there are none."""
    if not (summary.before or any(one.options for one in summary.suspects)):
        return ""
    called = f" The input's {markup.plain(summary.called)}." if summary.called else ""
    return f" Letters count the options: A is the first.{called}"


def _tone(reason: str) -> str:
    action = reason.partition(":")[0]
    return action if action in ("keep", "relabel", "drop") else "reject"


def _experts(summary: ReportData) -> str:
    """Who was asked, how often each agreed with the given answers, and what it cost."""
    if not summary.experts:
        body = "<p class='empty'>No expert was asked.</p>"
    else:
        agreement = [
            Bar(
                expert.name,
                expert.agreed / expert.answered if expert.answered else 0.0,
                f"{markup.percent(expert.agreed, expert.answered)} of {expert.answered:,}",
                "keep",
            )
            for expert in summary.experts
        ]
        rows = "".join(
            f"<tr><th scope='row'>{markup.data(e.name, 60)}</th><td class='num'>{e.asked:,}</td>"
            f"<td class='num'>{e.asked - e.answered:,}</td><td class='num'>{e.prompt_tokens:,}</td>"
            f"<td class='num'>{e.generated_tokens:,}</td></tr>"
            for e in summary.experts
            if not e.learner
        )
        body = (
            f"{_who(summary)}<div class='cards'><figure class='card'><figcaption>"
            "<h3>Agreement with the given answer</h3><p>Share of the answers that could be read; "
            "for the checker, the share that calls it right.</p></figcaption>"
            + figures.bars(agreement, "Agreement with the given answer.", full=1.0)
            + "</figure>"
            + _votes(summary)
            + "<div class='card scroll'><h3>Work</h3><table><thead><tr><th>Expert</th>"
            "<th class='num'>asked</th><th class='num'>unread</th><th class='num'>tokens in</th>"
            f"<th class='num'>tokens out</th></tr></thead><tbody>{rows}</tbody></table></div></div>"
        )
    return f"<section><h2>Experts</h2>{body}</section>"


def _who(summary: ReportData) -> str:
    """What each expert is."""
    told = [f"<b>{e.name}</b>: {_EXPERTS[e.name]}" for e in summary.experts if e.name in _EXPERTS]
    learners = [markup.plain(expert.name) for expert in summary.experts if expert.learner]
    if learners:
        told.append(f"<b>{listed(learners)}</b>: small classifiers learnt from this corpus")
    return f"<p class='lead'>{'; '.join(told)}.</p>" if told else ""


def _votes(summary: ReportData) -> str:
    """Whom the verdicts rest on."""
    weights = summary.weights
    if not weights:
        return ""
    shares = [Bar(name, w, markup.percent(w, 1.0), "keep") for name, w in weights.items()]
    return _card(
        "Share of the vote",
        "How far the corpus itself shows that each expert can be trusted; 0 is muted.",
        figures.bars(shares, "Share of the vote.", full=1.0),
        "",
    )


def _run(summary: ReportData) -> str:
    """How the run was made: models, time, memory, settings, files, command."""
    whole = sum(summary.stage_seconds.values())
    stages = figures.bars(
        [
            Bar(name, value, f"{markup.seconds(value)} · {markup.percent(value, whole)}", "time")
            for name, value in summary.stage_seconds.items()
        ],
        "Seconds per stage.",
    )
    models = "".join(
        f"<tr><th scope='row'>{markup.data(m.role, 60)}</th><td>{markup.data(m.name, 120)}"
        + (f"<br><small>{markup.data(m.revision, 60)}</small>" if m.revision else "")
        + "</td></tr>"
        for m in summary.models
    )
    memory = summary.peak_memory_bytes
    facts: dict[str, str] = {}
    if memory is not None:
        facts["peak memory"] = f"{memory / 2**30:.2f} GiB"
    return (
        "<section><h2>The run</h2><div class='cards'>"
        f"<figure class='card'><figcaption><h3>Time: {markup.seconds(whole)}</h3></figcaption>"
        f"{stages if summary.stage_seconds else '<p class=empty>Not measured.</p>'}</figure>"
        f"<div class='card scroll'><h3>Models</h3><table>{models}</table>"
        f"{_table('Machine', facts)}</div>"
        f"<div class='card scroll'>{_table('Settings', summary.settings)}</div>"
        f"<div class='card scroll files'>{_table('Files', summary.files)}</div></div>"
        f"<h3>Command</h3><pre><code>{markup.data(summary.command, 1500)}</code></pre></section>"
    )


def _table(title: str, rows: Mapping[str, str]) -> str:
    if not rows:
        return f"<h3>{title}</h3><p class='empty'>None recorded.</p>"
    body = "".join(
        f"<tr><th scope='row'>{markup.data(name, 60)}</th><td>{markup.data(value, 300)}</td></tr>"
        for name, value in rows.items()
    )
    return f"<h3>{title}</h3><table>{body}</table>"
