"""Tells one version's questions from another's, so that no run mixes them unheard."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator

from robustft import prompts
from robustft.engines import Engine, Prompt
from robustft.engines.encoding import PromptEncoder
from robustft.errors import UserError
from robustft.records import Record
from robustft.store import Store

_log = logging.getLogger(__name__)
_NAME = "wording"
_EXAMPLES = (
    Record(0, 1, "0", "Which is a fruit?", ("pear", "stone"), "A", (), {}),
    Record(1, 2, "1", "What is 2 + 2?", None, "4", (("system", "Be brief."),), {}),
    Record(2, 3, "2", "Who wrote it?", None, "a friend", (("user", "Hello."),), {}),
    Record(3, 4, "3", "Tell me a tale.", None, "Once there was a fox. It ran away.", (), {}),
)


def wording(engine: Engine) -> str:
    """A digest of what every expert is asked about a few examples, 16 hexadecimal digits.

    Where the engine has a chat template of its own it is of the token ids that the model reads, and
    of those that end a reply.
    """
    encoder = getattr(engine, "encoder", None)
    digest = hashlib.blake2b(digest_size=8)
    for prompt in _prompts():
        said: object = prompt
        if isinstance(encoder, PromptEncoder):
            with contextlib.suppress(UserError):  # told where such turns are asked for
                said = encoder.encode([prompt])
        digest.update(repr(said).encode())
    if isinstance(encoder, PromptEncoder):
        digest.update(repr(sorted(encoder.ends)).encode())
    return digest.hexdigest()


def keep_wording(store: Store, engine: Engine) -> None:
    """Note how a run's experts are asked; warn, once, where they were asked otherwise before.

    A run is not refused for it: what it has heard may have cost days.
    """
    now = wording(engine)
    if store.get_meta(_NAME) == now:
        return
    if store.has_opinions:
        _log.warning(
            "%s: begun by another version of robustft, which asked in other words; what it heard "
            "is kept, the rest is asked in today's; for one wording throughout, choose another "
            "--out",
            store.path.parent,
        )
    store.set_meta(_NAME, now)


def _prompts() -> Iterator[Prompt]:
    """One of each, with the words that answer it."""
    for record in _EXAMPLES:
        answer = prompts.answer_prompt(record)
        yield answer
        yield answer._replace(prefix=answer.prefix + prompts.response(answer, record.answer))
        yield prompts.reasoning_prompt(record, ())
        yield prompts.reasoning_prompt(record, ("First.", "Then."))
        yield prompts.conclusion_prompt(record, ("First.",))
        yield prompts.checker_prompt(record, (record.answer, None))
        yield prompts.context_prompt(record, [(record.question, record.options, record.answer)])
        yield prompts.review_prompt(record, record.answer, None)
        yield prompts.select_prompt(record)
    yield prompts.neutral_prompt(_EXAMPLES[0])
    yield prompts.neutral_checker_prompt(2)
    yield prompts.neutral_select_prompt()
    words = (prompts.CHECKER_WORDS, prompts.REVIEW_WORDS, prompts.SELECT_WORDS)
    yield from (Prompt((), "".join(some)) for some in words)
