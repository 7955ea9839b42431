"""The expert panel: who is asked what about a record.

base (eq. 1), reasoning with reflection (eq. 2), checker (eq. 3), context (eq. 5), review (eq. 6).
Each method takes the records of one chunk with the opinions it builds on, and returns one opinion
a record. Whatever the store already holds is not asked again.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from robustft import prompts
from robustft.config import ExpertConfig
from robustft.consensus import consensus
from robustft.engines import Engine, Failure, Prompt
from robustft.opinions import Opinion, Said, first_failure
from robustft.questions import Question, read_choices, read_text
from robustft.records import Record
from robustft.store import UNIT_ROWS, Stopwatch, Store

Neighbour = tuple[str, Sequence[str] | None, str]  # question, options, answer
_Neutral = tuple[Prompt, tuple[str, ...]]  # a content-free prompt and its candidates
_SHORT_ANSWER_TOKENS = 32


class Panel:
    """Asks an engine, batch by batch, writing each batch to the store as it is done.

    Parameters
    ----------
    unit: the number of the input chunk at work; `at` asks about another one.
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
        self._priors: dict[_Neutral, np.ndarray] = {}
        self.unit = 0

    def at(self, unit: int) -> Panel:
        """The same panel, to be asked about another chunk, by another thread perhaps."""
        panel = copy.copy(self)
        panel.unit = unit
        return panel

    # --- the experts -----------------------------------------------------------------------

    def base(self, records: Sequence[Record]) -> list[Opinion]:
        """The base model's own answer (eq. 1)."""
        questions = [self._answer_question(r, prompts.answer_prompt(r)) for r in records]
        return self._ask("base", 0, records, questions)

    def tuned(self, records: Sequence[Record], basis: str) -> list[Opinion]:
        """The answer of a fine-tuned model to the base expert's prompt; `basis` names the model."""
        questions = [
            self._answer_question(record, prompts.answer_prompt(record), basis)
            for record in records
        ]
        return self._ask("tuned", 0, records, questions)

    def reasoning(self, records: Sequence[Record]) -> list[Opinion]:
        """The answer after `rounds` alternations of reasoning and reflection (eq. 2).

        Every step sees all earlier ones. With several `samples` all of that is done as often, and
        the answers are made into one.
        """
        samples = self._config.samples
        if samples == 1:
            return self._reasoned(records, 0)
        stored = self._store.opinions(self.unit, "reasoned")
        settled = [stored.get((record.index % UNIT_ROWS, "")) for record in records]
        if all(settled):
            self._progress("reasoned", samples * len(records))
            for expert in ("reasoning", "reflection"):
                self._progress(expert, samples * self._config.rounds * len(records))
            return [one for one in settled if one]
        chains = [self._reasoned(records, sample) for sample in range(1, samples + 1)]
        found = [
            consensus(said, prompts.LETTERS, record.kind)
            for record, said in zip(records, zip(*chains, strict=True), strict=True)
        ]
        said = [Said(r.index % UNIT_ROWS, "", one) for r, one in zip(records, found, strict=True)]
        self._store.add(self.unit, "reasoned", 0, said, 0.0, questions=0)
        return found

    def _reasoned(self, records: Sequence[Record], sample: int) -> list[Opinion]:
        """The answer after one chain of reasoning and reflection; `sample` 0: the only one."""
        transcripts: list[list[str]] = [[] for _ in records]
        failures = [""] * len(records)
        first = 1 + max(sample - 1, 0) * self._config.rounds
        for round_ in range(first, first + self._config.rounds):
            for expert in ("reasoning", "reflection"):
                limit = self._config.reasoning_tokens
                questions = [
                    Question(prompts.reasoning_prompt(record, transcript), max_tokens=limit)
                    for record, transcript in zip(records, transcripts, strict=True)
                ]
                replies = self._ask(expert, round_, records, questions, failures)
                for transcript, said in zip(transcripts, replies, strict=True):
                    transcript.append(said.text.strip())
                failures = [said.failure for said in replies]
        questions = [
            self._answer_question(record, prompts.conclusion_prompt(record, transcript))
            for record, transcript in zip(records, transcripts, strict=True)
        ]
        name = "sampled" if sample else "reasoned"
        return self._ask(name, sample, records, questions, failures)

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
            )
            for record, said in zip(records, predictions, strict=True)
        ]
        return self._ask("checker", 0, records, questions, list(map(first_failure, predictions)))

    def context(
        self, records: Sequence[Record], neighbours: Sequence[Sequence[Neighbour]]
    ) -> list[Opinion]:
        """The answer with the nearest clean questions and answers as context (eq. 4, 5)."""
        questions = []
        for record, near in zip(records, neighbours, strict=True):
            prompt = prompts.context_prompt(record, near)
            questions.append(self._answer_question(record, prompt, basis=_digest(prompt)))
        return self._ask("context", 0, records, questions)

    def review(
        self, records: Sequence[Record], context: Sequence[Opinion], reasoned: Sequence[Opinion]
    ) -> list[Opinion]:
        """The reviewer's label from the context-enhanced and the reasoned answer (eq. 6).

        A small model prefers a place, not an answer: of 300 pairs of a right and a wrong number the
        default one took the first in 98 %, with what it says to an empty question divided out the
        second in 99 %, and asked in both orders at once, for twice the tokens, it was right in
        41 %. So the paper's one question it is.
        """
        questions = []
        for record, first, second in zip(records, context, reasoned, strict=True):
            prompt = prompts.review_prompt(record, first.answer, second.answer)
            basis = _digest(prompt)
            if record.kind == "choice":
                questions.append(self._answer_question(record, prompt, basis))
            else:
                names = (first.answer or "", second.answer or "")
                words = prompts.REVIEW_WORDS
                questions.append(self._word_question(prompt, words, names, basis=basis))
        failures = list(map(first_failure, zip(context, reasoned, strict=True)))
        return self._ask("review", 0, records, questions, failures)

    def _answer_question(self, record: Record, prompt: Prompt, basis: str = "") -> Question:
        kind = record.kind
        if (
            kind == "choice"
            and self._config.choice == "likelihood"
            and self._engine.abilities.choose
        ):
            assert record.options is not None
            names = tuple(prompts.LETTERS[: len(record.options)])
            neutral = prompts.neutral_prompt(record) if self._config.calibrate else None
            letters = prompts.letters(record.options)
            return Question(prompt, letters, True, names, neutral, basis=basis)
        limit = self._config.answer_tokens if kind == "text" else _SHORT_ANSWER_TOKENS
        return Question(prompt, max_tokens=limit, kind=kind, options=record.options, basis=basis)

    def _word_question(
        self,
        prompt: Prompt,
        words: tuple[str, ...],
        names: tuple[str, ...],
        *,
        neutral: Prompt | None = None,
        basis: str = "",
    ) -> Question:
        """One of a few words, read from generated text where the engine has no likelihoods."""
        read = self._engine.abilities.choose
        limit = _SHORT_ANSWER_TOKENS
        return Question(prompt, words, read, names, neutral, limit, basis=basis)

    # --- asking ----------------------------------------------------------------------------

    def _ask(
        self,
        expert: str,
        round_: int,
        records: Sequence[Record],
        questions: Sequence[Question],
        failures: Sequence[str] = (),
    ) -> list[Opinion]:
        """One opinion a record, from the store or from the engine.

        `failures`: for each question why it cannot be asked, a failure before it; empty: it can.
        """
        stored = self._store.opinions(self.unit, expert, round_)
        numbers: dict[Question, int] = {}
        rows: list[list[int]] = []  # of the unit, whose question it is
        mine = []
        blocked: list[str] = []
        failures = failures or [""] * len(questions)
        for record, question, failure in zip(records, questions, failures, strict=True):
            number = numbers.setdefault(question, len(rows))
            if number == len(rows):
                rows.append([])
                blocked.append(failure)
            rows[number].append(record.index % UNIT_ROWS)
            mine.append(number)
        asked = list(numbers)
        opinions: dict[int, Opinion] = {}
        for number, question in enumerate(asked):
            kept = [stored.get((row, question.basis)) for row in rows[number]]
            if kept[0] is not None and None not in kept:
                opinions[number] = kept[0]
            elif blocked[number]:
                opinions[number] = Opinion(None, failure=blocked[number])
        known = set(opinions)
        if len(known) < len(asked):
            # Batches are formed of everything this unit asks, done or not, so that a resumed run
            # forms the batches of the run it resumes.
            for read in (True, False):
                group = [number for number, one in enumerate(asked) if one.read == read]
                limit = max((asked[number].max_tokens for number in group), default=0)
                prompts_ = [asked[number].prompt for number in group]
                for batch in self._engine.plan(prompts_, limit):
                    todo = [group[i] for i in batch if group[i] not in opinions]
                    if todo:
                        chosen = [asked[number] for number in todo]
                        whose = [rows[number] for number in todo]
                        said = self._ask_batch(expert, round_, chosen, whose)
                        opinions.update(zip(todo, said, strict=True))
                        self._progress(expert, len(todo))
        newest = {row: basis for row, basis in stored}
        outdated = [
            Said(row, question.basis, opinions[number])
            for number, question in enumerate(asked)
            if newest and (number in known or opinions[number].failure)
            for row in rows[number]
            if newest.get(row, question.basis) != question.basis
        ]
        if outdated:  # what was said last answers another prompt, under another detector perhaps
            self._store.renew(self.unit, expert, round_, outdated)
        self._progress(expert, len(questions) - (len(asked) - len(known)))
        return [opinions[number] for number in mine]

    def _ask_batch(
        self,
        expert: str,
        round_: int,
        batch: Sequence[Question],
        rows: Sequence[Sequence[int]],
    ) -> list[Opinion]:
        """The opinion on each question, which is that on all of its `rows`."""
        watch = Stopwatch()
        asked = [question.prompt for question in batch]
        if batch[0].read:
            choices = self._engine.choose(asked, [question.candidates for question in batch])
            said = read_choices(batch, choices, self._neutral_logprobs(batch))
        else:
            seeds = [self._sampling_seed(expert, round_, prompt) for prompt in asked]
            limit = max(question.max_tokens for question in batch)
            replies = self._engine.generate(asked, limit, seeds)
            said = [read_text(*pair) for pair in zip(batch, replies, strict=True)]
        triples = list(zip(batch, said, rows, strict=True))
        kept = [Said(mine[0], question.basis, one) for question, one, mine in triples]
        for question, one, mine in triples:
            kept += [Said(row, question.basis, one) for row in mine[1:]]
        self._store.add(self.unit, expert, round_, kept, watch.seconds(), questions=len(batch))
        return said

    def _neutral_logprobs(self, batch: Sequence[Question]) -> list[np.ndarray | Failure | None]:
        """Log-probabilities of each question's candidates after its content-free prompt."""
        # Most questions share their content-free prompt, and hashing it takes long.
        shared = {
            (id(question.neutral), question.candidates): (question.neutral, question.candidates)
            for question in batch
            if question.neutral is not None
        }
        if len(self._priors) > 10_000:
            self._priors.clear()  # perhaps under the eyes of another thread: so looked up once
        found: dict[_Neutral, np.ndarray | Failure | None]
        found = {pair: self._priors.get(pair) for pair in shared.values()}
        missing = sorted((pair for pair, prior in found.items() if prior is None), key=repr)
        texts = [prompt for prompt, _ in missing]
        for rows in self._engine.plan(texts):
            choices = self._engine.choose(
                [texts[row] for row in rows], [missing[row][1] for row in rows]
            )
            for row, choice in zip(rows, choices, strict=True):
                pair = missing[row]
                if isinstance(choice, Failure):
                    found[pair] = choice
                else:
                    found[pair] = self._priors[pair] = choice.logprobs.astype(np.float64)
        priors = {key: found[pair] for key, pair in shared.items()}
        return [priors.get((id(question.neutral), question.candidates)) for question in batch]

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
