"""What `clean --dataset-info` writes, read by the trainers themselves."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from commandline import read
from transformers import AutoTokenizer

pytestmark = pytest.mark.integration


def test_trl_trains_five_steps(cleaned: Path, tiny_model: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import load_dataset

    data = load_dataset(
        "json", data_files=str(cleaned / "messages.jsonl"), split="train", cache_dir=str(tmp_path)
    )
    trainer = trl.SFTTrainer(
        model=str(tiny_model),
        train_dataset=data,
        args=trl.SFTConfig(
            output_dir=str(tmp_path / "trl"), max_steps=5, per_device_train_batch_size=4,
            logging_steps=1, report_to="none", use_cpu=True, max_length=256,
            save_strategy="no", disable_tqdm=True,
        ),
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 5
    assert all(math.isfinite(loss) for loss in losses)


@contextlib.contextmanager
def in_parts(package: str, *folders: str) -> Iterator[None]:
    """Modules of `package` and these folders of it can be imported without what those import."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed (pip install --no-deps {package})")
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("", *folders):
            shell = ModuleType(f"{package}.{folder}".rstrip("."))
            shell.__path__ = [str(Path(spec.origin).parent / folder)]
            patch.setitem(sys.modules, shell.__name__, shell)
        yield


@pytest.fixture(scope="module")
def llama_factory() -> SimpleNamespace:
    """LLaMA-Factory's parser and converter."""
    with in_parts("llamafactory", "data"):
        return SimpleNamespace(
            parser=importlib.import_module("llamafactory.data.parser"),
            converter=importlib.import_module("llamafactory.data.converter"),
            types=importlib.import_module("llamafactory.extras.constants").FILEEXT2TYPE,
        )


def test_torchtune_reads_every_record(cleaned: Path, tmp_path: Path) -> None:
    with in_parts("torchtune", "data", "datasets", "modules"):
        messages = importlib.import_module("torchtune.data._messages")
        datasets = importlib.import_module("torchtune.datasets._sft")
    data = datasets.SFTDataset(
        source="json", data_files=str(cleaned / "messages.jsonl"), split="train",
        cache_dir=str(tmp_path), message_transform=messages.OpenAIToMessages(),
        model_transform=lambda sample: {**sample, "tokens": [], "mask": []},
    )  # fmt: skip
    lines = read(cleaned / "messages.jsonl")
    assert len(data) == len(lines)
    for line, example in zip(lines, data, strict=True):
        found = [{"role": m.role, "content": m.text_content} for m in example["messages"]]
        assert found == line["messages"]
        assert [m.masked for m in example["messages"]] == [
            m["role"] != "assistant" for m in line["messages"]
        ]


def test_axolotl_trains_on_the_answers(cleaned: Path, tiny_model: Path) -> None:
    if importlib.util.find_spec("axolotl") is None:
        pytest.skip("axolotl is not installed (pip install --no-deps axolotl colorama addict)")
    strategies = importlib.import_module("axolotl.prompt_strategies.chat_template")
    settings = importlib.import_module("axolotl.utils.dict").DictDefault
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    strategy = strategies.load(
        tokenizer,
        settings(sequence_len=2048, train_on_inputs=False),
        {"type": "chat_template", "chat_template": "tokenizer_default"},
    )
    for line in read(cleaned / "messages.jsonl"):
        found = strategy.tokenize_prompt(line)
        learnt = [
            token
            for token, label in zip(found["input_ids"], found["labels"], strict=True)
            if label != -100
        ]
        assert tokenizer.decode(learnt) == line["messages"][-1]["content"] + tokenizer.eos_token


def converted(llama_factory: SimpleNamespace, folder: Path, cache: Path) -> dict[str, list[Any]]:
    """Every dataset that dataset_info.json names, converted as LLaMA-Factory's loader does it."""
    from datasets import load_dataset

    names = list(json.loads((folder / "dataset_info.json").read_text()))
    found = {}
    for attributes in llama_factory.parser.get_dataset_list(names, str(folder)):
        path = folder / attributes.dataset_name
        kind = llama_factory.types[path.suffix[1:]]
        data = load_dataset(kind, data_files=str(path), split="train", cache_dir=str(cache))
        arguments = SimpleNamespace(media_dir="", streaming=True)
        made = llama_factory.converter.align_dataset(
            data.to_iterable_dataset(), attributes, arguments, SimpleNamespace()
        )
        found[names[len(found)]] = list(made)
    return found


def test_llama_factory_converts_every_record(
    llama_factory: SimpleNamespace, cleaned: Path, tmp_path: Path
) -> None:
    found = converted(llama_factory, cleaned, tmp_path)
    lines = read(cleaned / "messages.jsonl")
    assert set(found) == {"messages"}
    for line, example in zip(lines, found["messages"], strict=True):
        assert [*example["_prompt"], *example["_response"]] == line["messages"]


@pytest.mark.parametrize("schema", ["qa", "alpaca", "prompt-completion", "messages", "sharegpt"])
def test_llama_factory_reads_the_cleaned_file_itself(
    llama_factory: SimpleNamespace, tmp_path: Path, schema: str
) -> None:
    from commandline import write
    from test_exchange import ROWS, exchanged

    exchanged(write(tmp_path / "cleaned.jsonl", [ROWS[schema]] * 3))
    found = converted(llama_factory, tmp_path, tmp_path / "cache")
    assert set(found) == {"messages", "cleaned"}
    assert len(found["cleaned"]) == 3
    for example in found["cleaned"]:
        assert example["_prompt"][-1]["role"] == "user"
        assert example["_response"][0]["content"]
