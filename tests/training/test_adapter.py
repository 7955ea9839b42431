"""Adapters from elsewhere: what is not understood is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from trained import WEIGHTS, config_for

from robustft.errors import UserError
from robustft.models import find_model, load_causal_lm
from robustft.training import load_adapter, train


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    rows = [{"question": "q", "options": ["a", "b"], "answer": "A"}] * 2
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(config_for(data, tiny_model, folder / "out", epochs=1))
    return folder / "out"


def damaged(adapter: Path, tmp_path: Path, **changes: object) -> Path:
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in (WEIGHTS, "adapter_config.json"):
        (copy / name).write_bytes((adapter / name).read_bytes())
    stored = json.loads((copy / "adapter_config.json").read_text()) | changes
    (copy / "adapter_config.json").write_text(json.dumps(stored))
    return copy


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "IA3"}, "field 'peft_type': expected LORA, found 'IA3'"),
        ({"alora_invocation_tokens": [1, 2]}, "field 'alora_invocation_tokens'"),
        ({"unheard_of": {"a": 1}}, "field 'unheard_of': {'a': 1} is not supported"),
        ({"r": 4}, "does not fit the model"),
        ({"layers_to_transform": [0]}, "does not fit the model"),
        ({"target_modules": ["nothing"]}, "does not fit the model"),
        ({"target_modules": "("}, "does not fit the model"),
        ({"rank_pattern": None}, "does not fit the model"),
        ({"modules_to_save": {"q_proj": "x"}}, "does not fit the model"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    adapter: Path, tiny_model: Path, tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    model = load_causal_lm(find_model(str(tiny_model)), dtype=torch.float32)
    with pytest.raises(UserError) as caught:
        load_adapter(model, damaged(adapter, tmp_path, **changes))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("base", ["tiny-llama", "owner/tiny-llama", "another", None])
def test_an_adapter_of_another_model_is_told(
    adapter: Path,
    tiny_model: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    base: str | None,
) -> None:
    folder = damaged(adapter, tmp_path, base_model_name_or_path=base)
    model = load_causal_lm(find_model(str(tiny_model)), dtype=torch.float32)
    load_adapter(model, folder, "tiny-llama")
    told = f"{folder}: the adapter was trained for another, as its settings say, not for tiny-llama"
    assert (told in caplog.text) == (base == "another") == bool(caplog.text)


def test_a_pickled_adapter_is_refused(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    model = load_causal_lm(find_model(str(tiny_model)), dtype=torch.float32)
    folder = damaged(adapter, tmp_path)
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(UserError, match="a pickle checkpoint, which can run code and is refused"):
        load_adapter(model, folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(UserError, match="is training unfinished"):
        load_adapter(model, folder)
    with pytest.raises(UserError, match="expected a LoRA adapter"):
        load_adapter(model, tmp_path)
    (folder / WEIGHTS).write_bytes(b"rubbish")
    with pytest.raises(UserError, match="does not fit the model"):
        load_adapter(model, folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("embedding", ["lm_head", "embed_tokens"])
def test_of_tied_embeddings_the_adapted_one_alone_changes(
    tiny_model: Path, tmp_path: Path, embedding: str, dtype: torch.dtype
) -> None:
    from peft import LoraConfig, get_peft_model

    source = find_model(str(tiny_model))
    settings = LoraConfig(r=4, target_modules=["q_proj", embedding], task_type="CAUSAL_LM")
    trained = get_peft_model(load_causal_lm(source, dtype=dtype), settings).eval()
    torch.manual_seed(0)
    for name, parameter in trained.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    trained.save_pretrained(tmp_path, save_embedding_layers=False)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = trained(input_ids=ids).logits
        found = load_adapter(load_causal_lm(source, dtype=dtype), tmp_path)(input_ids=ids).logits
    torch.testing.assert_close(found, expected)
