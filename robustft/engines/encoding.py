"""From prompts to token ids, such that data never becomes control tokens.

The chat template is rendered around placeholders once for each sequence of roles; its own text is
tokenised with control tokens, the messages' text without them. `<|im_end|>` inside a record is
then the eight or so ordinary tokens that spell it.
"""

from __future__ import annotations

import functools
import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any, Concatenate, ParamSpec, TypeVar

from robustft.engines import Prompt
from robustft.errors import UserError
from robustft.terminal import counted, plural_of

_P = ParamSpec("_P")
_T = TypeVar("_T")
# Private-use characters: no template looks for them, and they stand alone in the rendering.
_PLACEHOLDER = "\ue0f0{}\ue0f1"
_SPLIT = re.compile("\ue0f0([0-9]+)\ue0f1")
_TODAY = re.compile(r"""\bstrftime_now\(\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*\)""")
_DAY = datetime(2024, 7, 26)  # which the templates of Llama 3 name by default
_REPLY = -1  # stands for the reply where others are messages' numbers
# Prompts encoded in one turn, and their characters: some milliseconds, in which others wait.
_MOST_PROMPTS = 16
_MOST_CHARACTERS = 50_000


def cuts_told(count: int) -> str:
    """What is said of prompts whose middle was cut out to fit the window."""
    return (
        f"{counted(count, 'prompt')} exceeded the model's window and lost "
        f"{plural_of(count, 'its', 'their')} middle"
    )


def _any_of(spellings: Iterable[str]) -> re.Pattern[str]:
    longest = sorted(filter(None, spellings), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest)) or r"(?!)")


def _spaced(found: re.Match[str]) -> str:
    """A control token's spelling, broken by a space."""
    return f"{found[0][:1]} {found[0][1:]}"


def _on_one_day(found: re.Match[str]) -> str:
    """A template's call for today's date as a text that never changes."""
    return f"{found[1]}{_DAY.strftime(found[2])}{found[1]}"


def _rendered(tokenizer: Any, messages: Sequence[dict[str, str]], **settings: Any) -> str:
    """A conversation that nobody has to answer; "" where the chat template takes no such turns."""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **settings))
    except Exception:  # a template may raise anything (jinja2 errors, mostly)
        return ""


def end_of_turn(tokenizer: Any) -> list[int]:
    """Return the token that ends an assistant's turn, as the chat template has it, or no token.

    It is not always the tokenizer's end-of-text token. A model that never saw it after its answers
    would not stop; one that did writes it, and what comes next is no part of the reply.
    """
    if getattr(tokenizer, "chat_template", None):
        slot = _PLACEHOLDER.format(1)
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": slot}]
        after = _rendered(tokenizer, turns).rpartition(slot)[2]
        ids = tokenizer.encode(after, add_special_tokens=False) if after else []
        # Many templates end a turn in a control token that is none of the tokenizer's named ones.
        added = tokenizer.added_tokens_decoder.items()
        control = {*tokenizer.all_special_ids, *(i for i, token in added if token.special)}
        if ids and ids[0] in control:
            return [int(ids[0])]
    end = tokenizer.eos_token_id
    return [] if end is None else [int(end)]


def _one_thread(
    method: Callable[Concatenate[PromptEncoder, _P], _T],
) -> Callable[Concatenate[PromptEncoder, _P], _T]:
    """A short method that one thread at a time is in; it calls no other one of these."""

    @functools.wraps(method)
    def locked(self: PromptEncoder, /, *given: _P.args, **named: _P.kwargs) -> _T:
        with self._next, self._lock:
            return method(self, *given, **named)

    return locked


def _portions(prompts: Sequence[Prompt]) -> Iterator[slice]:
    """Rows of a few prompts each, of one where they are long."""
    start = characters = 0
    for row, prompt in enumerate(prompts):
        size = sum(len(message.content) for message in prompt.messages)
        if row > start and (row - start == _MOST_PROMPTS or characters + size > _MOST_CHARACTERS):
            yield slice(start, row)
            start, characters = row, 0
        characters += size
    if prompts:
        yield slice(start, len(prompts))


class PromptEncoder:
    """Encodes prompts for one tokenizer; templates and candidate endings are cached.

    Any thread may ask. One is served at a time: whether a tokenizer spells control tokens out is a
    setting of the tokenizer, and not of a call. Who encodes many prompts lets others in between: a
    server's replies are decoded meanwhile.

    Args:
        tokenizer: a Hugging Face tokenizer.
        window: tokens that the model takes, prompt and reply.
        ends: further ids that end a reply, beside the tokenizer's own and its template's.
    """

    def __init__(
        self, tokenizer: Any, window: int = 1 << 30, ends: Iterable[int | None] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._next = threading.Lock()  # held by one who waits for a turn: nobody gets in before
        self.window = window
        own = (*ends, tokenizer.eos_token_id, *end_of_turn(tokenizer))
        self.ends = frozenset(int(end) for end in own if end is not None)
        self.truncated = 0  # prompts cut to the window so far
        self._templates: dict[tuple[str, ...], tuple[list[list[int] | int], set[int]]] = {}
        self._endings: dict[tuple[str, str], list[int]] = {}

    def _in_turns(self, prompts: Sequence[Prompt], work: Callable[[slice], list[_T]]) -> list[_T]:
        """What `work` finds for some prompts after the other, in one turn each."""
        found: list[_T] = []
        for rows in _portions(prompts):
            with self._next:  # a lock alone would be taken again before those who wait wake up
                pass
            with self._lock:
                found += work(rows)
        return found

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of every prompt, ready for the model to continue."""
        return self._in_turns(prompts, lambda rows: self._encode(prompts[rows]))

    def _encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        texts: list[str] = []
        inside: list[bool] = []
        for prompt in prompts:
            unspaced = self._template(tuple(message.role for message in prompt.messages))[1]
            texts += [*(message.content for message in prompt.messages), prompt.prefix]
            inside += [slot in unspaced for slot in (*range(len(prompt.messages)), _REPLY)]
        pieces = iter(self._placed(texts, inside))
        encoded = []
        for prompt in prompts:
            contents = [next(pieces) for _ in prompt.messages]
            prefix = next(pieces)
            ids: list[int] = []
            for part in self._template(tuple(message.role for message in prompt.messages))[0]:
                ids += contents[part] if isinstance(part, int) else part
            encoded.append(ids + prefix)
        return encoded

    def fit(self, prompts: Sequence[Prompt], room: int) -> list[list[int]]:
        """Token ids of every prompt, its middle cut out where `room` more would not fit.

        Raises:
            UserError: `room` leaves less than a quarter of the window, where no question survives.
        """
        if prompts and room > self.window - self.window // 4:
            raise UserError(
                f"replies of up to {room} tokens leave too little of the model's window, "
                f"{self.window} tokens, for the question; expected a model with a longer one or, "
                "where the command takes them, a lower --answer-tokens or --reasoning-tokens"
            )

        def fitted(rows: slice) -> list[list[int]]:
            encoded = self._encode(prompts[rows])
            self._cut(encoded, [room] * len(encoded))
            return encoded

        return self._in_turns(prompts, fitted)

    def fit_with(
        self, prompts: Sequence[Prompt], responses: Sequence[str], room: int = 0
    ) -> tuple[list[list[int]], list[list[int]], list[bool]]:
        """Token ids of every prompt and of its response, and whether one of them was cut.

        A response loses what is beyond half the window, a prompt its middle.
        """
        most = max(self.window // 2, 1)

        def fitted(rows: slice) -> list[tuple[list[int], list[int], bool]]:
            pairs = zip(prompts[rows], responses[rows], strict=True)
            endings = [self._response(prompt, response) for prompt, response in pairs]
            cut = [len(ids) > most for ids in endings]
            endings = [ids[:most] for ids in endings]
            encoded = self._encode(prompts[rows])
            shorter = self._cut(encoded, [len(ids) + room for ids in endings])
            either = [a or b for a, b in zip(cut, shorter, strict=True)]
            return list(zip(encoded, endings, either, strict=True))

        found = self._in_turns(prompts, fitted)
        return [one[0] for one in found], [one[1] for one in found], [one[2] for one in found]

    def _cut(self, encoded: list[list[int]], rooms: Sequence[int]) -> list[bool]:
        """Cut the middle out of those where their `rooms` more would not fit; which they were."""
        cut = []
        for index, (ids, room) in enumerate(zip(encoded, rooms, strict=True)):
            keep = max(self.window - room, 2)
            cut.append(len(ids) > keep)
            if cut[-1]:
                encoded[index] = ids[: keep - keep // 2] + ids[len(ids) - keep // 2 :]
        self.truncated += sum(cut)
        return cut

    @_one_thread
    def decode(self, tokens: Sequence[int]) -> tuple[str, tuple[int, ...]]:
        """Text of generated `tokens` and the character offset at which each token starts."""
        if not tokens:  # transformers decodes no rows at all to one empty text
            return "", (0,)
        prefixes = [list(tokens[:stop]) for stop in range(1, len(tokens) + 1)]
        texts = self._tokenizer.batch_decode(
            prefixes, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        text = texts[-1]
        # A prefix that ends inside a character decodes to U+FFFD: the next token takes the room.
        whole = (0 if t.endswith("\ufffd") else min(len(t), len(text)) for t in texts)
        offsets = (0, *itertools.accumulate(whole, max))
        return text, (*offsets[:-1], len(text))

    @_one_thread
    def render(self, prompt: Prompt) -> str:
        """The prompt as text for a server that tokenises it, control tokens included, itself.

        A control token that data spells out is broken by a space: "< |im_end|>".
        """
        pieces = _SPLIT.split(self._render(tuple(message.role for message in prompt.messages)))
        for slot in range(1, len(pieces), 2):
            pieces[slot] = self._harmless(prompt.messages[int(pieces[slot])].content)
        text = "".join(pieces)
        bos = getattr(self._tokenizer, "bos_token", None)
        if bos and text.startswith(bos) and self._adds_bos():
            text = text[len(bos) :]
        return text + self._harmless(prompt.prefix)

    def _harmless(self, text: str) -> str:
        return self._control.sub(_spaced, text)

    @functools.cached_property
    def _control(self) -> re.Pattern[str]:
        """The spellings of all control tokens."""
        added = self._tokenizer.added_tokens_decoder.values()
        return _any_of({str(one.content) for one in added} | {*self._tokenizer.all_special_tokens})

    def _adds_bos(self) -> bool:
        bos = self._tokenizer.bos_token_id
        return bos is not None and self._tokenizer.encode("a")[:1] == [bos]

    @_one_thread
    def continuation(self, prefix: str, text: str) -> list[int]:
        """Token ids of `text` where it follows `prefix` in the same turn; never empty for text."""
        return self._continuation(prefix, text)

    def _continuation(self, prefix: str, text: str) -> list[int]:
        key = (prefix, text)
        found = self._endings.get(key)
        if found is None:
            whole, head, alone = self._data([prefix + text, prefix, text])
            found = whole[len(head) :] if whole[: len(head)] == head else alone
            if len(self._endings) < 4096 and len(text) < 64:
                self._endings[key] = found
        return found

    @_one_thread
    def response(self, prompt: Prompt, text: str) -> list[int]:
        """Token ids of `text` where it replies to `prompt`."""
        return self._response(prompt, text)

    def _response(self, prompt: Prompt, text: str) -> list[int]:
        if self._lead is not None and not prompt.prefix:
            inside = self._template(tuple(message.role for message in prompt.messages))[1]
            return self._placed([text], [_REPLY in inside])[0]
        return self._continuation(prompt.prefix, text)

    @functools.cached_property
    def _lead(self) -> list[int] | None:
        """Token ids of a line end, where the tokenizer puts a space before what begins a text.

        SentencePiece does, and its heirs. What stands further on in a prompt must be without it, or
        the prompt is not the one that the model was trained on.
        """
        lead, led, alone = self._data(["\n", "\na", "a"])
        return lead if led[: len(lead)] == lead and led[len(lead) :] != alone else None

    def _placed(self, texts: Sequence[str], inside: Sequence[bool]) -> list[list[int]]:
        """Token ids of plain texts, without `_lead`'s space of those that are `inside` a prompt."""
        if self._lead is None:
            return self._data(texts)
        found = self._data([f"\n{t}" if led else t for t, led in zip(texts, inside, strict=True)])
        for row in itertools.compress(range(len(found)), inside):
            behind = self._behind_lead(found[row])
            found[row] = self._data([texts[row]])[0] if behind is None else behind
        return found

    def _behind_lead(self, led: list[int]) -> list[int] | None:
        """What follows `_lead` in a text's tokens; None where a line end of its own joined it."""
        lead = self._lead or []
        return led[len(lead) :] if led[: len(lead)] == lead else None

    def _data(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of plain text: control tokens are spelled out, none is added."""
        if not texts:
            return []
        if self._markers is not None:
            texts = [self._markers.sub(_spaced, text) for text in texts]
        ids = self._tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        return [list(row) for row in ids]

    @functools.cached_property
    def _markers(self) -> re.Pattern[str] | None:
        """What the template marks turns with that the tokenizer does not list as special.

        Some models' do not, and what is not listed it does not spell out. Other added tokens
        ("<think>") are ordinary parts of a text.
        """
        added = self._tokenizer.added_tokens_decoder.values()
        plain = {str(token.content) for token in added if not token.special}
        plain = {token for token in plain if len(token.strip()) > 1}  # line ends may be such, too
        if not plain or not getattr(self._tokenizer, "chat_template", None):
            return None
        try:
            rendered = self._render(("user", "assistant", "user"))
        except UserError:  # told where such turns are asked for
            return None
        # Without what invites the next reply, which may open a thought.
        turns = _SPLIT.split(rendered)[:-1]
        found = {token for token in plain if token in "".join(turns[::2])}
        return _any_of(found) if found else None

    def _template(self, roles: tuple[str, ...]) -> tuple[list[list[int] | int], set[int]]:
        """The template's own token ids, with message numbers where contents go.

        Also the numbers of the messages that no space is put before, see `_lead`: they stand
        further on, and neither after a space (theirs then) nor after a control token of rules of
        its own.
        """
        found = self._templates.get(roles)
        if found is None:
            parts: list[list[int] | int] = []
            inside = set()
            pieces = _SPLIT.split(self._render(roles))
            for piece, slot in zip(pieces[::2], [*pieces[1::2], str(_REPLY)], strict=True):
                if self._lead is not None and piece.endswith(" "):
                    piece = piece[:-1]
                elif piece and (piece[-1].isspace() or slot != str(_REPLY)):
                    inside.add(int(slot))
                if piece:
                    ids = list(self._tokenizer.encode(piece, add_special_tokens=False))
                    if parts and self._lead is not None:
                        led = self._tokenizer.encode(f"\n{piece}", add_special_tokens=False)
                        behind = self._behind_lead(list(led))
                        ids = ids if behind is None else behind
                    if ids and ids[-1] in self._tokenizer.added_tokens_decoder:
                        inside.discard(int(slot))
                    parts.append(ids)
                parts.append(int(slot))
            parts.pop()  # the reply's
            if not getattr(self._tokenizer, "chat_template", None):
                parts = [[self._tokenizer.bos_token_id], *parts] if self._adds_bos() else parts
            found = self._templates[roles] = parts, inside
        return found

    def _render(self, roles: tuple[str, ...]) -> str:
        """The conversation with a placeholder for each message.

        A template that takes user and assistant in turn alone gets neighbours of one role as one
        message, and what the system says at the head of the user's. Models that think before they
        answer are told not to, as answers are read from the first tokens: by the template where it
        knows how, else as `_begun` does. A template that tells the date (Llama 3.2, gpt-oss) tells
        one that never changes: what a run asks must not depend on the day it is resumed or tested.
        """
        slots = [_PLACEHOLDER.format(index) for index in range(len(roles))]
        template = getattr(self._tokenizer, "chat_template", None)
        if not template:
            return "\n\n".join(slots) + "\n"
        settings: dict[str, Any] = {}
        if "enable_thinking" in str(template):
            settings["enable_thinking"] = False
        if isinstance(template, str):  # else several, by name
            settings["chat_template"] = _TODAY.sub(_on_one_day, template)
        asked = next((n for n, role in enumerate(roles) if role == "user"), 0)
        plain = ["user" if n < asked or role == "system" else role for n, role in enumerate(roles)]
        refusal = ""
        for named in (roles, plain):
            messages: list[dict[str, str]] = []
            for role, slot in zip(named, slots, strict=True):
                if named is plain and messages and messages[-1]["role"] == role:
                    messages[-1]["content"] += f"\n\n{slot}"
                else:
                    messages.append({"role": role, "content": slot})
            try:
                rendered = str(
                    self._tokenizer.apply_chat_template(
                        messages, tokenize=False, add_generation_prompt=True, **settings
                    )
                )
            except Exception as error:  # a template may raise anything (jinja2 errors, mostly)
                refusal = refusal or f"refuses the roles {', '.join(roles)}: {error}"
                continue
            if all(rendered.count(slot) == 1 for slot in slots):
                return self._begun(rendered, messages, settings)
            refusal = refusal or "drops or repeats a message; use another"
        raise UserError(f"the model's chat template {refusal}")

    def _begun(
        self, rendered: str, messages: Sequence[dict[str, str]], settings: dict[str, Any]
    ) -> str:
        """The rendered conversation up to the first word of an answer.

        Some templates put more before an answer than what they invite it with: the channel of
        gpt-oss, the mark of Command A, or all of it where they invite none. Left to the model, it
        would begin with a thought, or with the user's next turn. A thought that is open is closed.
        """
        slot = _PLACEHOLDER.format(_REPLY)  # messages that were joined hold several numbers
        answer = {"role": "assistant", "content": slot}
        answered = _rendered(self._tokenizer, [*messages, answer], **settings)
        begun, found, _ = answered.partition(slot)
        if found and begun.startswith(rendered) and begun[len(rendered) :].strip():
            rendered = begun
        opened = rendered.rstrip().endswith("<think>")
        return rendered.rstrip() + "\n\n</think>\n\n" if opened else rendered
