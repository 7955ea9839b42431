"""The expert panel: who is asked what about a record, and what the reply means.

base (eq. 1), reasoning with reflection (eq. 2), checker (eq. 3), context (eq. 5), review (eq. 6).
Each method takes the records of one chunk with the opinions it builds on, and returns one opinion
a record. Whatever the store already holds is not asked again.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from robustft import answers, prompts
from robustft.answers import Kind
from robustft.config import ExpertConfig
from robustft.engines import Choice, Engine, Generation, Prompt
from robustft.records import Record
from robustft.store import Opinion, Stopwatch, Store

Neighbour = tuple[str, Sequence[str] | None, str]  # question, options, answer
_SHORT_ANSWER_TOKENS = 32


@dataclass(frozen=True, slots=True)
class _Question:
    """One thing to ask: `candidates` are read from a prefill, otherwise text is generated."""

    key: bytes
    prompt: Prompt
    candidates: tuple[str, ...] = ()  # allowed continuations
    names: tuple[str, ...] = ()  # the answer each candidate stands for
    neutral: Prompt | None = None  # the content-free prompt to calibrate with
    max_tokens: int = 0
    kind: Kind | None = None  # how to parse generated text; None: the text itself is wanted
    options: tuple[str, ...] | None = None


def record_kind(record: Record) -> Kind:
    """choice, number, span or text, by the given answer."""
    return answers.answer_kind(record.answer, record.options)


class Panel:
    """Asks an engine, batch by batch, writing each batch to the store as it is done.

    Parameters
    ----------
    unit: the number of the input chunk at work; set it before asking about another chunk.
    progress: called with (expert, questions answered) after every batch and for stored answers.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        config: ExpertConfig,
        *,
        seed: int = 0,
        progress: Callable[[str, int], None] = lambda expert, count: None,
    ) -> None:
        self._engine = engine
        self._store = store
        self._config = config
        self._seed = seed
        self._progress = progress
        self._priors: dict[tuple[Prompt, tuple[str, ...]], np.ndarray] = {}
        self.unit = 0

    # --- the experts -----------------------------------------------------------------------

    def base(self, records: Sequence[Record]) -> list[Opinion]:
        """The base model's own answer (eq. 1)."""
        return self._ask(
            "base", 0, [self._answer_question(r, prompts.answer_prompt(r, record_kind(r)))
                        for r in records],
        )  # fmt: skip

    def reasoning(self, records: Sequence[Record]) -> list[Opinion]:
        """The answer after `rounds` alternations of reasoning and reflection (eq. 2).

        Every step sees all earlier ones; the opinion's text is the last reasoning.
        """
        transcripts: list[list[str]] = [[] for _ in records]
        for round_ in range(1, self._config.rounds + 1):
            for expert, build in (
                ("reasoning", prompts.reasoning_prompt),
                ("reflection", prompts.reflection_prompt),
            ):
                questions = [
                    _Question(
                        key=record.question_key,
                        prompt=build(record, transcript),
                        max_tokens=self._config.reasoning_tokens,
                    )
                    for record, transcript in zip(records, transcripts, strict=True)
                ]
                for transcript, said in zip(
                    transcripts, self._ask(expert, round_, questions), strict=True
                ):
                    transcript.append(said.text.strip())
        return self._ask(
            "reasoned",
            0,
            [
                self._answer_question(
                    record, prompts.conclusion_prompt(record, transcript, record_kind(record))
                )
                for record, transcript in zip(records, transcripts, strict=True)
            ],
        )

    def checker(
        self, records: Sequence[Record], predictions: Sequence[Sequence[Opinion]]
    ) -> list[Opinion]:
        """Is the given answer consistent with the predictions (eq. 3)? "yes" or "no".

        Read from the probabilities of the two allowed answers, never from prose, each divided by
        its probability after an empty question (Zhao et al. 2021): what a model says to nothing
        at all must not decide the split.
        """
        questions = [
            _Question(
                key=record.key,
                prompt=prompts.checker_prompt(record, [opinion.answer for opinion in said]),
                candidates=prompts.CHECKER_WORDS,
                names=("yes", "no"),
                neutral=prompts.neutral_checker_prompt(len(said)),
            )
            for record, said in zip(records, predictions, strict=True)
        ]
        return self._ask("checker", 0, questions)

    def context(
        self, records: Sequence[Record], neighbours: Sequence[Sequence[Neighbour]]
    ) -> list[Opinion]:
        """The answer with the nearest clean questions and answers as context (eq. 4, 5)."""
        questions = [
            self._answer_question(
                record, prompts.context_prompt(record, record_kind(record), near), record.key
            )
            for record, near in zip(records, neighbours, strict=True)
        ]
        return self._ask("context", 0, questions)

    def review(
        self, records: Sequence[Record], context: Sequence[Opinion], reasoned: Sequence[Opinion]
    ) -> list[Opinion]:
        """The reviewer's label from the context-enhanced and the reasoned answer (eq. 6)."""
        questions = []
        for record, first, second in zip(records, context, reasoned, strict=True):
            kind = record_kind(record)
            prompt = prompts.review_prompt(record, kind, first.answer, second.answer)
            if kind == "choice":
                questions.append(self._answer_question(record, prompt, record.key))
            else:
                names = (first.answer or "", second.answer or "")
                questions.append(_Question(record.key, prompt, prompts.REVIEW_WORDS, names))
        return self._ask("review", 0, questions)

    def _answer_question(
        self, record: Record, prompt: Prompt, key: bytes | None = None
    ) -> _Question:
        kind = record_kind(record)
        key = key or record.question_key
        if kind == "choice" and self._config.choice == "likelihood":
            assert record.options is not None
            names = tuple(prompts.LETTERS[: len(record.options)])
            neutral = prompts.neutral_prompt(record) if self._config.calibrate else None
            return _Question(key, prompt, prompts.letters(record.options), names, neutral)
        limit = self._config.answer_tokens if kind == "text" else _SHORT_ANSWER_TOKENS
        return _Question(key, prompt, max_tokens=limit, kind=kind, options=record.options)

    # --- asking ----------------------------------------------------------------------------

    def _ask(self, expert: str, round_: int, questions: Sequence[_Question]) -> list[Opinion]:
        """One opinion a question, from the store or from the engine."""
        unique = list({question.key: question for question in questions}.values())
        stored = self._store.find([question.key for question in unique], expert, round_)
        # Batches are formed from everything this chunk asks first, done or not, so that a resumed
        # run forms the batches of the run it resumes.
        mine = [q for q in unique if q.key not in stored or stored[q.key][0] == self.unit]
        opinions = {key: opinion for key, (_, opinion) in stored.items()}
        if len(opinions) < len(unique):
            for read in (True, False):
                group = [question for question in mine if bool(question.candidates) == read]
                limit = max((question.max_tokens for question in group), default=0)
                for batch in self._engine.plan([question.prompt for question in group], limit):
                    todo = [group[i] for i in batch if group[i].key not in opinions]
                    if todo:
                        done = self._ask_batch(expert, round_, todo)
                        opinions.update(done)
                        self._progress(expert, len(done))
        self._progress(expert, len(questions) - (len(unique) - len(stored)))
        return [opinions[question.key] for question in questions]

    def _ask_batch(
        self, expert: str, round_: int, batch: Sequence[_Question]
    ) -> dict[bytes, Opinion]:
        watch = Stopwatch()
        asked = [question.prompt for question in batch]
        if batch[0].candidates:
            choices = self._engine.choose(asked, [question.candidates for question in batch])
            priors = self._neutral_logprobs(batch)
            said = [
                _read_choice(question, choice, prior)
                for question, choice, prior in zip(batch, choices, priors, strict=True)
            ]
        else:
            seeds = [self._sampling_seed(expert, round_, question.key) for question in batch]
            limit = max(question.max_tokens for question in batch)
            replies = self._engine.generate(asked, limit, seeds)
            said = [_read_text(*pair) for pair in zip(batch, replies, strict=True)]
        done = dict(zip((question.key for question in batch), said, strict=True))
        self._store.add(expert, round_, self.unit, list(done.items()), watch.seconds())
        return done

    def _neutral_logprobs(self, batch: Sequence[_Question]) -> list[np.ndarray | None]:
        """Log-probabilities of each question's candidates after its content-free prompt."""
        wanted = {
            (question.neutral, question.candidates)
            for question in batch
            if question.neutral is not None
        }
        missing = [
            pair for pair in sorted(wanted - self._priors.keys(), key=repr) if pair[0] is not None
        ]
        if len(self._priors) > 10_000:
            self._priors.clear()
            missing = sorted(wanted, key=repr)
        texts = [prompt for prompt, _ in missing if prompt is not None]
        for rows in self._engine.plan(texts):
            choices = self._engine.choose(
                [texts[row] for row in rows], [missing[row][1] for row in rows]
            )
            for row, choice in zip(rows, choices, strict=True):
                self._priors[texts[row], missing[row][1]] = choice.logprobs.astype(np.float64)
        return [
            self._priors.get((question.neutral, question.candidates))
            if question.neutral is not None
            else None
            for question in batch
        ]

    def _sampling_seed(self, expert: str, round_: int, key: bytes) -> int:
        text = f"{self._seed}/{expert}/{round_}/".encode() + key
        return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")


def _read_choice(question: _Question, choice: Choice, prior: np.ndarray | None) -> Opinion:
    logprobs = choice.logprobs.astype(np.float64)
    weights = logprobs if prior is None else logprobs - prior
    weights = np.exp(weights - weights.max())
    probabilities = weights / weights.sum()
    best = int(probabilities.argmax())
    return Opinion(
        answer=question.names[best] or None,
        nll=-float(logprobs[best]),
        entropy=choice.entropy,
        probabilities=tuple(round(float(p), 6) for p in probabilities),
        prompt_tokens=choice.prompt_tokens,
        new_tokens=1,
    )


def _read_text(question: _Question, reply: Generation) -> Opinion:
    silent = Opinion(
        answer=None,
        text=reply.text,
        prompt_tokens=reply.prompt_tokens,
        new_tokens=len(reply.nll),
    )
    if question.kind is None:
        return silent
    text = question.prompt.prefix + reply.text
    shift = len(question.prompt.prefix)
    parsed = answers.parse(text, kind=question.kind, options=question.options)
    if parsed.answer is None:
        return silent
    start, stop = max(parsed.start - shift, 0), max(parsed.stop - shift, 0)
    return dataclasses.replace(
        silent,
        answer=parsed.answer,
        nll=reply.span_mean(reply.nll, start, stop),
        entropy=reply.span_mean(reply.entropy, start, stop),
    )
