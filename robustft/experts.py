"""The expert panel: who is asked what about a record, and what the reply means.

base (eq. 1), reasoning with reflection (eq. 2), checker (eq. 3), context (eq. 5), review (eq. 6).
Each method takes the records of one chunk with the opinions it builds on, and returns one opinion
a record. Whatever the store already holds is not asked again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from robustft import answers, prompts
from robustft.answers import Kind
from robustft.config import ExpertConfig
from robustft.engines import Choice, Engine, Failure, Generation, Prompt
from robustft.records import Record
from robustft.store import Opinion, Stopwatch, Store

Neighbour = tuple[str, Sequence[str] | None, str]  # question, options, answer
_SHORT_ANSWER_TOKENS = 32


@dataclass(frozen=True, slots=True)
class _Question:
    """One thing to ask, read from a prefill or from generated text."""

    key: bytes
    prompt: Prompt
    candidates: tuple[str, ...] = ()  # allowed continuations
    read: bool = False  # candidates are chosen by likelihood; otherwise text is generated
    names: tuple[str, ...] = ()  # the answer each candidate stands for
    neutral: Prompt | None = None  # the content-free prompt to calibrate with
    max_tokens: int = 0
    kind: Kind | None = None  # how to parse generated text; None: the text itself is wanted
    options: tuple[str, ...] | None = None
    blocked: str = ""  # why it cannot be asked: what it builds on failed


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
        self._failed: dict[tuple[bytes, str, int], str] = {}  # not asked again in this session
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
        failures = [""] * len(records)
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
                        blocked=failure,
                    )
                    for record, transcript, failure in zip(
                        records, transcripts, failures, strict=True
                    )
                ]
                replies = self._ask(expert, round_, questions)
                for transcript, said in zip(transcripts, replies, strict=True):
                    transcript.append(said.text.strip())
                failures = [said.failure for said in replies]
        return self._ask(
            "reasoned",
            0,
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
                record.key,
                prompts.checker_prompt(record, [opinion.answer for opinion in said]),
                prompts.CHECKER_WORDS,
                ("yes", "no"),
                neutral=prompts.neutral_checker_prompt(len(said)),
                blocked=_failure(said),
            )
            for record, said in zip(records, predictions, strict=True)
        ]
        return self._ask("checker", 0, questions)

    def context(
        self, records: Sequence[Record], neighbours: Sequence[Sequence[Neighbour]]
    ) -> list[Opinion]:
        """The answer with the nearest clean questions and answers as context (eq. 4, 5)."""
        questions = []
        for record, near in zip(records, neighbours, strict=True):
            prompt = prompts.context_prompt(record, record_kind(record), near)
            questions.append(self._answer_question(record, prompt, _content_key(record, prompt)))
        return self._ask("context", 0, questions)

    def review(
        self, records: Sequence[Record], context: Sequence[Opinion], reasoned: Sequence[Opinion]
    ) -> list[Opinion]:
        """The reviewer's label from the context-enhanced and the reasoned answer (eq. 6)."""
        questions = []
        for record, first, second in zip(records, context, reasoned, strict=True):
            kind = record_kind(record)
            prompt = prompts.review_prompt(record, kind, first.answer, second.answer)
            key, blocked = _content_key(record, prompt), _failure((first, second))
            if kind == "choice":
                questions.append(self._answer_question(record, prompt, key, blocked))
            else:
                names = (first.answer or "", second.answer or "")
                words = prompts.REVIEW_WORDS
                questions.append(self._word_question(key, prompt, words, names, blocked=blocked))
        return self._ask("review", 0, questions)

    def _answer_question(
        self, record: Record, prompt: Prompt, key: bytes | None = None, blocked: str = ""
    ) -> _Question:
        kind = record_kind(record)
        key = key or record.question_key
        if (
            kind == "choice"
            and self._config.choice == "likelihood"
            and self._engine.abilities.choose
        ):
            assert record.options is not None
            names = tuple(prompts.LETTERS[: len(record.options)])
            neutral = prompts.neutral_prompt(record) if self._config.calibrate else None
            letters = prompts.letters(record.options)
            return _Question(key, prompt, letters, True, names, neutral, blocked=blocked)
        limit = self._config.answer_tokens if kind == "text" else _SHORT_ANSWER_TOKENS
        return _Question(
            key, prompt, max_tokens=limit, kind=kind, options=record.options, blocked=blocked
        )

    def _word_question(
        self,
        key: bytes,
        prompt: Prompt,
        words: tuple[str, ...],
        names: tuple[str, ...],
        *,
        neutral: Prompt | None = None,
        blocked: str,
    ) -> _Question:
        """One of a few words, read from generated text where the engine has no likelihoods."""
        read = self._engine.abilities.choose
        return _Question(
            key, prompt, words, read, names, neutral, _SHORT_ANSWER_TOKENS, blocked=blocked
        )

    # --- asking ----------------------------------------------------------------------------

    def _ask(self, expert: str, round_: int, questions: Sequence[_Question]) -> list[Opinion]:
        """One opinion a question, from the store or from the engine."""
        unique = list({question.key: question for question in questions}.values())
        stored = self._store.find([question.key for question in unique], expert, round_)
        # Batches are formed from everything this chunk asks first, done or not, so that a resumed
        # run forms the batches of the run it resumes.
        mine = [q for q in unique if q.key not in stored or stored[q.key][0] == self.unit]
        opinions = {key: opinion for key, (_, opinion) in stored.items()}
        for question in unique:
            failure = question.blocked or self._failed.get((question.key, expert, round_), "")
            if failure and question.key not in opinions:
                opinions[question.key] = Opinion(None, failure=failure)
        before = len(opinions)
        if before < len(unique):
            for read in (True, False):
                group = [question for question in mine if question.read == read]
                limit = max((question.max_tokens for question in group), default=0)
                for batch in self._engine.plan([question.prompt for question in group], limit):
                    todo = [group[i] for i in batch if group[i].key not in opinions]
                    if todo:
                        done = self._ask_batch(expert, round_, todo)
                        opinions.update(done)
                        self._progress(expert, len(done))
        self._progress(expert, len(questions) - (len(unique) - before))
        return [opinions[question.key] for question in questions]

    def _ask_batch(
        self, expert: str, round_: int, batch: Sequence[_Question]
    ) -> dict[bytes, Opinion]:
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
            seeds = [self._sampling_seed(expert, round_, question.key) for question in batch]
            limit = max(question.max_tokens for question in batch)
            replies = self._engine.generate(asked, limit, seeds)
            said = [_read_text(*pair) for pair in zip(batch, replies, strict=True)]
        done = dict(zip((question.key for question in batch), said, strict=True))
        answered = [(key, opinion) for key, opinion in done.items() if not opinion.failure]
        if answered:
            self._store.add(expert, round_, self.unit, answered, watch.seconds())
        for key, opinion in done.items():
            if opinion.failure:
                self._failed[key, expert, round_] = opinion.failure
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

    def _sampling_seed(self, expert: str, round_: int, key: bytes) -> int:
        text = f"{self._seed}/{expert}/{round_}/".encode() + key
        return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")


def _content_key(record: Record, prompt: Prompt) -> bytes:
    """The key of a question that is not settled by its record alone.

    A record that could not be judged at first may be, on resume, a neighbour of this one; what
    was asked without it is then no answer to what is asked now.
    """
    text = record.key + repr(prompt).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


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
    return dataclasses.replace(
        silent,
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
    return dataclasses.replace(
        silent,
        answer=question.names[said] or None,
        nll=reply.span_mean(reply.nll, *found.span(1)),
        entropy=reply.span_mean(reply.entropy, *found.span(1)),
        probabilities=tuple(float(index == said) for index in range(len(question.names))),
    )
