"""The cleaned set for other trainers: as chat turns, and described for LLaMA-Factory.

`messages.jsonl` holds one object a record, `{"id": …, "messages": [{"role", "content"}, …]}`: what
`robustft train` shows the model, whatever the input's schema. TRL, Axolotl, torchtune and
LLaMA-Factory read this form as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import orjson

from robustft.files import atomic_file, write_atomically
from robustft.outputs import DATASET_INFO, EXCHANGE, MESSAGES
from robustft.prompts import answer_prompt, response
from robustft.records import Record, RecordSource, reopened

__all__ = ["DATASET_INFO", "MESSAGES", "chat_turns", "exchange", "kept_ids", "write_exchange"]

_OPENAI_TAGS = {
    "role_tag": "role", "content_tag": "content", "user_tag": "user",
    "assistant_tag": "assistant", "system_tag": "system",
}  # fmt: skip
_SHAREGPT_TAGS = {
    "role_tag": "from", "content_tag": "value", "user_tag": "human",
    "assistant_tag": "gpt", "system_tag": "system",
}  # fmt: skip
# What LLaMA-Factory has to be told about a file of each schema to read it as it stands.
_ENTRIES: dict[str, dict[str, Any]] = {
    "alpaca": {"columns": {"prompt": "instruction", "query": "input", "response": "output"}},
    "prompt-completion": {"columns": {"prompt": "prompt", "response": "completion"}},
    "qa": {"columns": {"prompt": "question", "response": "answer"}},
    "messages": {
        "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": _OPENAI_TAGS,
    },
    "sharegpt": {
        "formatting": "sharegpt", "columns": {"messages": "conversations"}, "tags": _SHAREGPT_TAGS,
    },
}  # fmt: skip


def chat_turns(record: Record) -> list[dict[str, str]]:
    """The record as chat turns, the given answer last: what `robustft train` trains on."""
    prompt = answer_prompt(record)
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
    answer = prompt.prefix + response(prompt, record.answer)
    return [*turns, {"role": "assistant", "content": answer}]


def kept_ids(verdicts: Path) -> Iterator[str]:
    """The ids of the records that a `verdicts.jsonl` does not drop, in order."""
    with verdicts.open("rb") as lines:
        for verdict in map(orjson.loads, lines):
            if verdict["action"] != "drop":
                yield verdict["id"]


def exchange(source: RecordSource, cleaned: Path, *, left: int) -> None:
    """Offer the training set that a run made of `source` to other trainers, beside `cleaned`.

    `left` is how many records it has; where none are, an earlier run's files go.
    """
    folder = cleaned.parent
    if left:
        write_exchange(reopened(source, cleaned), folder, kept_ids(folder / "verdicts.jsonl"))
    else:
        for name in EXCHANGE:
            (folder / name).unlink(missing_ok=True)


def write_exchange(source: RecordSource, folder: Path, ids: Iterable[str]) -> None:
    """Write `messages.jsonl` and `dataset_info.json` to `folder`, which holds `source`'s file.

    `ids` are those of the records in the run, which a file of the kept ones alone does not tell.
    `dataset_info.json` names the datasets `messages` and, where LLaMA-Factory reads the file itself
    rightly, `cleaned`. It would drop answers that are not text without a word, and join no options
    to a question, so other files are offered as messages only.
    """
    readable = _readable_as_it_is(source)
    with atomic_file(folder / MESSAGES) as handle:
        for record, id_ in zip(source, ids, strict=True):
            if isinstance(record, Record):
                line = {"id": id_, "messages": chat_turns(record)}
                handle.write(orjson.dumps(line) + b"\n")
                readable = readable and _ROWS[source.schema](record.row)
    entries = {"messages": {"file_name": MESSAGES, **_ENTRIES["messages"]}}
    if readable:
        entries["cleaned"] = {"file_name": Path(source.path).name, **_ENTRIES[source.schema]}
    info = orjson.dumps(entries, option=orjson.OPT_INDENT_2) + b"\n"
    write_atomically(folder / DATASET_INFO, info)


def _readable_as_it_is(source: RecordSource) -> bool:
    """Whether LLaMA-Factory opens such a file, and its cells keep their types.

    A CSV file's cells do not: it reads an answer "18" as a number, and drops it.
    """
    return source.schema in _ROWS and source.suffix in (".jsonl", ".json", ".parquet")


def _all_text(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda row: all(isinstance(row.get(name, ""), str) for name in names)


def _plain_turns(name: str, role: str, text: str, *roles: str) -> Callable[[Any], bool]:
    def plain(row: Mapping[str, Any]) -> bool:
        turns = row[name]
        return isinstance(turns, list) and all(
            turn.get(role) in roles and isinstance(turn.get(text), str) for turn in turns
        )

    return plain


_ROWS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "alpaca": _all_text("instruction", "input", "output"),
    "prompt-completion": _all_text("prompt", "completion"),
    "qa": _all_text("question", "answer"),
    "messages": _plain_turns("messages", "role", "content", "system", "user", "assistant"),
    "sharegpt": _plain_turns("conversations", "from", "value", "system", "human", "gpt"),
}
