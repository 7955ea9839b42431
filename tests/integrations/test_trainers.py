"""What `clean --dataset-info` writes, read by the trainers themselves."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from commandline import read

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


@pytest.fixture(scope="module")
def llama_factory() -> SimpleNamespace:
    """LLaMA-Factory's parser and converter, without its packages' other modules and needs."""
    spec = importlib.util.find_spec("llamafactory")
    if spec is None or spec.origin is None:
        pytest.skip("llamafactory is not installed (pip install --no-deps llamafactory)")
    root = Path(spec.origin).parent
    shells = {"llamafactory": root, "llamafactory.data": root / "data"}
    with pytest.MonkeyPatch.context() as patch:
        for name, folder in shells.items():
            shell = ModuleType(name)
            shell.__path__ = [str(folder)]
            patch.setitem(sys.modules, name, shell)
        return SimpleNamespace(
            parser=importlib.import_module("llamafactory.data.parser"),
            converter=importlib.import_module("llamafactory.data.converter"),
            types=importlib.import_module("llamafactory.extras.constants").FILEEXT2TYPE,
        )


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
