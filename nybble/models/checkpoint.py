"""`Checkpoint`: where a model lies, and what its small JSON files say. Weights are `models.load`'s.

Owns: finding (or downloading) the directory, config.json, generation_config.json, the list of weight files.
Does not know: tensors, devices, tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast, get_args

from nybble.core.config import DType, EngineConfig, ModelFacts
from nybble.core.errors import ModelError, UnsupportedError

TINY = Path(__file__).parent.parent / "assets" / "tiny"
INDEX = "model.safetensors.index.json"
SMALL_FILES = ("*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt")
PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# Where older exporters put what is now config.json's quantization_config.
SIDE_CONFIGS = {"quant_config.json": "awq", "quantize_config.json": "gptq"}


@dataclass(frozen=True)
class Checkpoint:
    """A model directory. `hf` is config.json with `quantization_config` filled in from older side files."""

    path: Path
    hf: Mapping[str, Any]
    generation: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def locate(config: EngineConfig) -> Checkpoint:
        """Find the model that `config.model` names, downloading it if need be (HF_TOKEN, HF_HUB_OFFLINE are respected).

        Raises:
            ModelError: there is no such model, it cannot be fetched, or its JSON files are damaged.
        """
        return Checkpoint.open(_directory(config))

    @staticmethod
    def open(path: Path) -> Checkpoint:
        """Read the small files of a model directory."""
        if not (path / "config.json").is_file():
            raise ModelError(f"{path} has no config.json: it is not a Hugging Face model directory")
        hf = _read_json(path / "config.json")
        if hf.get("quantization_config") is None:
            for name, method in SIDE_CONFIGS.items():
                if (path / name).is_file():
                    hf["quantization_config"] = {"quant_method": method} | _read_json(path / name)
        generation = path / "generation_config.json"
        return Checkpoint(path, hf, _read_json(generation) if generation.is_file() else {})

    def facts(self) -> ModelFacts:
        """What settings depend on.

        Raises:
            ModelError: config.json lacks something or is nonsense.
            UnsupportedError: a family nybble does not run.
        """
        from nybble.models.registry import family_of  # needs torch; locating a model does not

        decoder = family_of(self.hf).read_config(self.hf)
        return ModelFacts(
            max_position_embeddings=decoder.max_position_embeddings,
            dtype=self._dtype(),
            vocab_size=decoder.vocab_size,
        )

    @property
    def eos_token_ids(self) -> list[int]:
        """The ids that end a text: generation_config.json's, else config.json's; may be empty."""
        for name, source in (("generation_config.json", self.generation), ("config.json", self.hf)):
            value = source.get("eos_token_id")
            if value is None:
                continue
            ids = value if isinstance(value, list) else [value]
            if not all(type(i) is int and i >= 0 for i in ids):
                raise ModelError(f"{name}: eos_token_id must be an id or a list of ids, got {value!r}")
            return list(ids)
        return []

    @property
    def default_sampling(self) -> dict[str, Any]:
        """What generation_config.json recommends, in `SamplingParams`' names; greedy if it says `do_sample: false`."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        wishes = {name: self.generation[name] for name in names if self.generation.get(name) is not None}
        for name, value in wishes.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ModelError(f"generation_config.json: {name} must be a number, got {value!r}")
        if isinstance(longest := self.generation.get("max_new_tokens"), int):
            wishes["max_tokens"] = longest
        return wishes | {"temperature": 0.0} if self.generation.get("do_sample") is False else wishes

    @cached_property
    def weight_map(self) -> dict[str, Path] | None:
        """Tensor name → file, where an index says so; None for a single file."""
        if not (self.path / INDEX).is_file():
            return None
        entries = _read_json(self.path / INDEX).get("weight_map")
        if not isinstance(entries, dict) or not entries:
            raise ModelError(f"{self.path / INDEX}: weight_map must be an object: tensor name → file name")
        for name, file in entries.items():
            if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                raise ModelError(
                    f"{self.path / INDEX}: {name} is in {file!r}, not a .safetensors file beside the index"
                )
        return {name: self.path / file for name, file in entries.items()}

    @cached_property
    def weight_files(self) -> list[Path]:
        """The safetensors files that make up the model.

        Raises:
            UnsupportedError: only pickled weights are there.
            ModelError: a file of the index is missing, or which files belong together is unclear.
        """
        if self.weight_map is not None:
            files = sorted(set(self.weight_map.values()))
            there = {file.name for file in self.path.iterdir() if file.is_file()}
            missing = [file.name for file in files if file.name not in there]
            if missing:
                raise ModelError(f"{self.path}: {INDEX} names {', '.join(missing)}, which is not there")
            return files
        files = sorted(file for file in self.path.glob("*.safetensors") if file.is_file())
        single = self.path / "model.safetensors"
        if single in files or len(files) == 1:
            return [single if single in files else files[0]]
        if files:
            raise ModelError(f"{self.path} has {len(files)} .safetensors files, no model.safetensors and no {INDEX}")
        pickled = [file.name for file in sorted(self.path.iterdir()) if file.suffix in PICKLED]
        if pickled:
            raise UnsupportedError(
                f"{self.path} has pickled weights only ({pickled[0]}). They can run code and are never opened; "
                f"convert the model to safetensors"
            )
        raise ModelError(f"{self.path} has no .safetensors file; nybble reads weights in safetensors only")

    def _dtype(self) -> DType:
        value = self.hf.get("dtype") or self.hf.get("torch_dtype") or "float16"
        name = str(value).removeprefix("torch.")
        if name not in get_args(DType):
            raise UnsupportedError(
                f"config.json: dtype {value!r} is not supported; accepted are {', '.join(get_args(DType))}"
            )
        return cast(DType, name)


def _directory(config: EngineConfig) -> Path:
    if config.model == "tiny":
        return TINY
    path = Path(config.model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{config.model} is a file; give the model's directory (nybble reads safetensors directories)")
    if config.model.startswith((".", "/", "~")) or config.model.count("/") > 1:
        raise ModelError(f"{config.model}: no such directory")
    return _download(config)


def _download(config: EngineConfig) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    weights = () if config.load_format == "dummy" else ("*.safetensors",)
    where = f"{config.model} (no such directory here, so taken as a Hugging Face id)"
    try:
        return Path(
            snapshot_download(
                config.model,
                revision=config.revision,
                cache_dir=config.download_dir,
                allow_patterns=[*SMALL_FILES, *weights],
                # Subfolders hold other packagings of the same model, `consolidated*` Mistral's own.
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except HFValidationError as error:
        raise ModelError(f"{config.model} is neither a directory nor a Hugging Face id ({error})") from error
    except GatedRepoError as error:
        raise ModelError(f"{where}: access is gated; accept its terms on the model's page and set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise ModelError(f"{where}: has no revision {config.revision!r}") from error
    except RepositoryNotFoundError as error:
        raise ModelError(f"{where}: not found; check the spelling, or set HF_TOKEN if it is private") from error
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{where}: not in the local cache, and the hub cannot be reached or HF_HUB_OFFLINE is set"
        ) from error
    except Exception as error:  # the HTTP and transfer libraries below have roots of their own
        raise ModelError(f"{where}: download failed: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error})") from error
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object")
    return value
