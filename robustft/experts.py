"""The expert panel: who is asked what about a record, and what the reply means.

base (eq. 1), reasoning with reflection (eq. 2), checker (eq. 3), context (eq. 5), review (eq. 6).
Each method takes the records of one chunk with the opinions it builds on, and returns one opinion
a record. Whatever the store already holds is not asked again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from robustft import answers, prompts
from robustft.answers import Kind
from robustft.config import ExpertConfig
from robustft.engines import Choice, Engine, Failure, Generation, Prompt
from robustft.records import Record
from robustft.store import UNIT_ROWS, Opinion, Said, Stopwatch, Store

Neighbour = tuple[str, Sequence[str] | None, str]  # question, options, answer
_SHORT_ANSWER_TOKENS = 32


@dataclass(frozen=True, slots=True)
class _Question:
    """One thing to ask, read from a prefill or from generated text; equal ones are asked once."""

    prompt: Prompt
    candidates: tuple[str, ...] = ()  # allowed continuations
    read: bool = False  # candidates are chosen by likelihood; otherwise text is generated
    names: tuple[str, ...] = ()  # the answer each candidate stands for
    neutral: Prompt | None = None  # the content-free prompt to calibrate with
    max_tokens: int = 0
    kind: Kind | None = None  # how to parse generated text; None: the text itself is wanted
    options: tuple[str, ...] | None = None
    basis: str = ""  # a digest of the prompt, where the record alone does not settle it
    blocked: str = field(default="", compare=False)  # why it cannot be asked: a failure before it


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
            "base", 0, records, [self._answer_question(r, prompts.answer_prompt(r, record_kind(r)))
                        for r in records],
        )  # fmt: skip

    def reasoning(self, records: Sequence[Record]) -> list[Opinion]:
        """The answer after `rounds` alternations of reasoning and reflection (eq. 2).

        Every step sees all earlier ones; the opinion's text is the last reasoning.
        """
        transcripts: list[list[str]] = [[] for _ in records]
        failures = [""] * len(records)
        for round_ in range(1, self._config.rounds + 1):
            for expert, build in (
                ("reasoning", prompts.reasoning_prompt),
                ("reflection", prompts.reflection_prompt),
            ):
                questions = [
                    _Question(
                        prompt=build(record, transcript),
                        max_tokens=self._config.reasoning_tokens,
                        blocked=failure,
                    )
                    for record, transcript, failure in zip(
                        records, transcripts, failures, strict=True
                    )
                ]
                replies = self._ask(expert, round_, records, questions)
                for transcript, said in zip(transcripts, replies, strict=True):
                    transcript.append(said.text.strip())
                failures = [said.failure for said in replies]
        return self._ask(
            "reasoned",
            0,
            records,
            [
                self._answer_question(
                    record,
                    prompts.conclusion_prompt(record, transcript, record_kind(record)),
                    blocked=failure,
                )
                for record, transcript, failure in zip(records, transcripts, failures, strict=True)
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
            self._word_question(
                prompts.checker_prompt(record, [opinion.answer for opinion in said]),
                prompts.CHECKER_WORDS,
                ("yes", "no"),
                neutral=prompts.neutral_checker_prompt(len(said)),
                blocked=_failure(said),
            )
            for record, said in zip(records, predictions, strict=True)
        ]
        return self._ask("checker", 0, records, questions)

    def context(
        self, records: Sequence[Record], neighbours: Sequence[Sequence[Neighbour]]
    ) -> list[Opinion]:
        """The answer with the nearest clean questions and answers as context (eq. 4, 5)."""
        questions = []
        for record, near in zip(records, neighbours, strict=True):
            prompt = prompts.context_prompt(record, record_kind(record), near)
            questions.append(self._answer_question(record, prompt, basis=_digest(prompt)))
        return self._ask("context", 0, records, questions)

    def review(
        self, records: Sequence[Record], context: Sequence[Opinion], reasoned: Sequence[Opinion]
    ) -> list[Opinion]:
        """The reviewer's label from the context-enhanced and the reasoned answer (eq. 6)."""
        questions = []
        for record, first, second in zip(records, context, reasoned, strict=True):
            kind = record_kind(record)
            prompt = prompts.review_prompt(record, kind, first.answer, second.answer)
            basis, blocked = _digest(prompt), _failure((first, second))
            if kind == "choice":
                questions.append(self._answer_question(record, prompt, basis, blocked))
            else:
                names = (first.answer or "", second.answer or "")
                words = prompts.REVIEW_WORDS
                asked = self._word_question(prompt, words, names, basis=basis, blocked=blocked)
                questions.append(asked)
        return self._ask("review", 0, records, questions)

    def _answer_question(
        self, record: Record, prompt: Prompt, basis: str = "", blocked: str = ""
    ) -> _Question:
        kind = record_kind(record)
        if (
            kind == "choice"
            and self._config.choice == "likelihood"
            and self._engine.abilities.choose
        ):
            assert record.options is not None
            names = tuple(prompts.LETTERS[: len(record.options)])
            neutral = prompts.neutral_prompt(record) if self._config.calibrate else None
            letters = prompts.letters(record.options)
            return _Question(prompt, letters, True, names, neutral, basis=basis, blocked=blocked)
        limit = self._config.answer_tokens if kind == "text" else _SHORT_ANSWER_TOKENS
        return _Question(
            prompt,
            max_tokens=limit,
            kind=kind,
            options=record.options,
            basis=basis,
            blocked=blocked,
        )

    def _word_question(
        self,
        prompt: Prompt,
        words: tuple[str, ...],
        names: tuple[str, ...],
        *,
        neutral: Prompt | None = None,
        basis: str = "",
        blocked: str,
    ) -> _Question:
        """One of a few words, read from generated text where the engine has no likelihoods."""
        read = self._engine.abilities.choose
        limit = _SHORT_ANSWER_TOKENS
        return _Question(prompt, words, read, names, neutral, limit, basis=basis, blocked=blocked)

    # --- asking ----------------------------------------------------------------------------

    def _ask(
        self, expert: str, round_: int, records: Sequence[Record], questions: Sequence[_Question]
    ) -> list[Opinion]:
        """One opinion a record, from the store or from the engine."""
        stored = self._store.opinions(self.unit, expert, round_)
        rows: dict[_Question, list[int]] = {}  # whose question it is
        for record, question in zip(records, questions, strict=True):
            rows.setdefault(question, []).append(record.index % UNIT_ROWS)
        opinions: dict[_Question, Opinion] = {}
        for question, mine in rows.items():
            kept = [stored[row] for row in mine if row in stored]
            if len(kept) == len(mine) and all(one.basis == question.basis for one in kept):
                opinions[question] = kept[0].opinion
            elif question.blocked:
                opinions[question] = Opinion(None, failure=question.blocked)
        before = len(opinions)
        if before < len(rows):
            # Batches are formed of everything this unit asks, done or not, so that a resumed run
            # forms the batches of the run it resumes.
            for read in (True, False):
                group = [question for question in rows if question.read == read]
                limit = max((question.max_tokens for question in group), default=0)
                for batch in self._engine.plan([question.prompt for question in group], limit):
                    todo = [group[i] for i in batch if group[i] not in opinions]
                    if todo:
                        opinions.update(self._ask_batch(expert, round_, todo, rows))
                        self._progress(expert, len(todo))
        self._progress(expert, len(questions) - (len(rows) - before))
        return [opinions[question] for question in questions]

    def _ask_batch(
        self,
        expert: str,
        round_: int,
        batch: Sequence[_Question],
        rows: Mapping[_Question, Sequence[int]],
    ) -> dict[_Question, Opinion]:
        watch = Stopwatch()
        asked = [question.prompt for question in batch]
        said: list[Opinion]
        if batch[0].read:
            choices = self._engine.choose(asked, [question.candidates for question in batch])
            priors = self._neutral_logprobs(batch)
            said = [
                _read_choice(question, choice, prior)
                for question, choice, prior in zip(batch, choices, priors, strict=True)
            ]
        else:
            seeds = [self._sampling_seed(expert, round_, prompt) for prompt in asked]
            limit = max(question.max_tokens for question in batch)
            replies = self._engine.generate(asked, limit, seeds)
            said = [_read_text(*pair) for pair in zip(batch, replies, strict=True)]
        done = dict(zip(batch, said, strict=True))
        kept = [Said(rows[question][0], question.basis, done[question]) for question in batch]
        for question in batch:
            others = rows[question][1:]
            kept += [Said(row, question.basis, done[question]) for row in others]
        self._store.add(self.unit, expert, round_, kept, watch.seconds(), questions=len(batch))
        return done

    def _neutral_logprobs(self, batch: Sequence[_Question]) -> list[np.ndarray | Failure | None]:
        """Log-probabilities of each question's candidates after its content-free prompt."""
        failed: dict[tuple[Prompt, tuple[str, ...]], Failure] = {}
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
                pair = texts[row], missing[row][1]
                if isinstance(choice, Failure):
                    failed[pair] = choice
                else:
                    self._priors[pair] = choice.logprobs.astype(np.float64)
        found: list[np.ndarray | Failure | None] = []
        for question in batch:
            if question.neutral is None:
                found.append(None)
            else:
                pair = question.neutral, question.candidates
                found.append(failed[pair] if pair in failed else self._priors[pair])
        return found

    def _sampling_seed(self, expert: str, round_: int, prompt: Prompt) -> int:
        text = f"{self._seed}/{expert}/{round_}/{prompt!r}".encode(errors="surrogatepass")
        return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")


def _digest(prompt: Prompt) -> str:
    """What tells whether a stored opinion answers this prompt.

    A record that could not be judged at first may be, on resume, a neighbour of this one; what
    was asked without it is then no answer to what is asked now.
    """
    text = repr(prompt).encode(errors="surrogatepass")
    return hashlib.blake2b(text, digest_size=8).hexdigest()


def _failure(opinions: Sequence[Opinion]) -> str:
    """Why an opinion that rests on these cannot be had; empty where it can."""
    return next((said.failure for said in opinions if said.failure), "")


def _read_choice(
    question: _Question, choice: Choice | Failure, prior: np.ndarray | Failure | None
) -> Opinion:
    if isinstance(choice, Failure):
        return Opinion(None, failure=choice.reason)
    if isinstance(prior, Failure):
        return Opinion(None, failure=prior.reason)
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


def _read_text(question: _Question, reply: Generation | Failure) -> Opinion:
    if isinstance(reply, Failure):
        return Opinion(None, failure=reply.reason)
    silent = Opinion(
        answer=None,
        text=reply.text,
        prompt_tokens=reply.prompt_tokens,
        new_tokens=len(reply.nll),
    )
    if question.candidates:
        return _read_word(question, reply, silent)
    if question.kind is None:
        return silent
    text = question.prompt.prefix + reply.text
    shift = len(question.prompt.prefix)
    parsed = answers.parse(text, kind=question.kind, options=question.options)
    if parsed.answer is None:
        return silent
    start, stop = max(parsed.start - shift, 0), max(parsed.stop - shift, 0)
    return silent._replace(
        answer=parsed.answer,
        nll=reply.span_mean(reply.nll, start, stop),
        entropy=reply.span_mean(reply.entropy, start, stop),
    )


def _read_word(question: _Question, reply: Generation, silent: Opinion) -> Opinion:
    """The candidate that a reply begins with, after "Answer:" where it repeats that."""
    words = "|".join(re.escape(word.strip()) for word in question.candidates)
    found = re.match(rf"[\W_]*(?:answer\b[\W_]*)?({words})\b", reply.text, re.IGNORECASE)
    if found is None:
        return silent
    said = [word.strip().casefold() for word in question.candidates].index(found[1].casefold())
    return silent._replace(
        answer=question.names[said] or None,
        nll=reply.span_mean(reply.nll, *found.span(1)),
        entropy=reply.span_mean(reply.entropy, *found.span(1)),
        probabilities=tuple(float(index == said) for index in range(len(question.names))),
    )
