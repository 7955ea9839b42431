"""From prompts to token ids, such that data never becomes control tokens.

The chat template is rendered around placeholders once for each sequence of roles; its own text is
tokenised with control tokens, the messages' text without them. `<|im_end|>` inside a record is
then the eight or so ordinary tokens that spell it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from robustft.engines import Prompt
from robustft.errors import UserError

# Private-use characters: no template looks for them, and they stand alone in the rendering.
_PLACEHOLDER = "\ue0f0{}\ue0f1"
_SPLIT = re.compile("\ue0f0([0-9]+)\ue0f1")


class PromptEncoder:
    """Encodes prompts for one tokenizer; templates and candidate endings are cached."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._templates: dict[tuple[str, ...], list[list[int] | int]] = {}
        self._endings: dict[tuple[str, str], list[int]] = {}

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of every prompt, ready for the model to continue."""
        texts = [text for p in prompts for text in (*(m.content for m in p.messages), p.prefix)]
        pieces = iter(self._data(texts))
        encoded = []
        for prompt in prompts:
            contents = [next(pieces) for _ in prompt.messages]
            prefix = next(pieces)
            ids: list[int] = []
            for part in self._template(tuple(message.role for message in prompt.messages)):
                ids += contents[part] if isinstance(part, int) else part
            encoded.append(ids + prefix)
        return encoded

    def continuation(self, prefix: str, text: str) -> list[int]:
        """Token ids of `text` where it follows `prefix` in the same turn; never empty for text."""
        key = (prefix, text)
        found = self._endings.get(key)
        if found is None:
            whole, head, alone = self._data([prefix + text, prefix, text])
            found = whole[len(head) :] if whole[: len(head)] == head else alone
            if len(self._endings) < 4096 and len(text) < 64:
                self._endings[key] = found
        return found

    def _data(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of plain text: special tokens are spelled out, none is added."""
        if not texts:
            return []
        ids = self._tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False
        )["input_ids"]
        return [list(row) for row in ids]

    def _template(self, roles: tuple[str, ...]) -> list[list[int] | int]:
        """The template's own token ids, with message numbers where contents go."""
        found = self._templates.get(roles)
        if found is None:
            parts: list[list[int] | int] = []
            for index, piece in enumerate(_SPLIT.split(self._render(roles))):
                if index % 2:
                    parts.append(int(piece))
                elif piece:
                    parts.append(list(self._tokenizer.encode(piece, add_special_tokens=False)))
            if not getattr(self._tokenizer, "chat_template", None):
                bos = self._tokenizer.bos_token_id
                adds_bos = bos is not None and self._tokenizer.encode("a")[:1] == [bos]
                parts = [[bos], *parts] if adds_bos else parts
            found = self._templates[roles] = parts
        return found

    def _render(self, roles: tuple[str, ...]) -> str:
        slots = [_PLACEHOLDER.format(index) for index in range(len(roles))]
        if not getattr(self._tokenizer, "chat_template", None):
            return "\n\n".join(slots) + "\n"
        messages = [
            {"role": role, "content": slot} for role, slot in zip(roles, slots, strict=True)
        ]
        try:
            rendered = str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:  # a template may raise anything (jinja2 errors, mostly)
            raise UserError(
                f"the model's chat template refuses the roles {', '.join(roles)}: {error}"
            ) from error
        if any(rendered.count(slot) != 1 for slot in slots):
            raise UserError("the model's chat template drops or repeats a message; use another")
        return rendered
