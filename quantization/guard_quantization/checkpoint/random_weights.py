"""A Llama or Mllama of any geometry with random weights, in the layout that a real checkpoint has.

For sizes, speed and memory at the real geometry where the real, gated weights are not at hand.
config.json says `random_weights`, so that the result never passes for the real thing.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from guard_quantization.checkpoint.tensors import (
    DTYPES,
    SHARD_BYTES,
    Entry,
    layout,
    write_tensors,
)
from guard_quantization.export.decoder import ExportError
from guard_quantization.folders import write_json
from guard_service.artifact import ArtifactError, fresh_folder
from guard_service.engines.torch.geometry import MLLAMA, read_geometry
from guard_service.engines.torch.loading import shapes_of
from guard_service.tokenizer import from_ranks, load_tokenizer

_STD = 0.02
_OUTLIER = 12.0  # times the scale of an ordinary channel


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama or Mllama by name. Raises ExportError for another config."""
    if config.get("architectures") != [MLLAMA]:
        return dict(layout(config))
    try:
        return shapes_of(read_geometry(json.dumps(config).encode()))
    except ArtifactError as error:
        raise ExportError(str(error)) from error


def write_random_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    tokenizer_path: Path,
    seed: int,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    outliers: int = 0,
    done: Callable[[int], None] = lambda count: None,
) -> int:
    """Write the folder and return how many parameters it has; one tensor is held at a time.

    Matrices are normal with a standard deviation of 0.02, norms near 1, biases near 0; the same
    `outliers` channels of every layer's norms are 12 times as large, as trained Llamas have a few.
    A tensor depends on `seed` and its name alone. `tokenizer_path` is a tokenizer.json or a rank
    file. Raises ExportError for a config that is not a Llama's or Mllama's or has fewer tokens than
    the tokenizer, FileExistsError when `folder` exists, OSError when the disk is too small.
    """
    sees = config.get("architectures") == [MLLAMA]
    shapes = tensor_shapes(config)
    text = config["text_config"] if sees else config
    names = {str(known).removeprefix("torch."): code for code, known in DTYPES.items()}
    if dtype not in names:
        raise ExportError(f"dtype is {dtype!r}, must be one of {', '.join(names)}")
    if not 0 <= outliers <= text["hidden_size"]:
        raise ExportError(f"outliers must be 0 to {text['hidden_size']}, the hidden size")
    tokenizer = _tokenizer(tokenizer_path, sees)
    size, rows = tokenizer.get_vocab_size(), text["vocab_size"] + sees
    if size > rows:
        raise ExportError(
            f"{tokenizer_path} has {size} tokens, config.json's vocab_size is {text['vocab_size']}"
        )
    entries = [Entry(name, size, names[dtype]) for name, size in shapes.items()]
    sizes = {entry.name: entry for entry in entries}
    with fresh_folder(folder) as made:
        marked = {**config, "torch_dtype": dtype, "random_weights": True}
        write_json(made / "config.json", marked)
        write_json(made / "generation_config.json", _generation(config))
        if tokenizer_path.suffix == ".json":
            shutil.copyfile(tokenizer_path, made / "tokenizer.json")
        else:
            (made / "tokenizer.json").write_text(tokenizer.to_str(), "utf-8")
        make = partial(_random, sizes, seed, outliers)
        write_tensors(made, entries, make, shard_bytes, done)
    return sum(torch.Size(entry.shape).numel() for entry in entries)


def _tokenizer(path: Path, image: bool) -> Tokenizer:
    """With the image's token behind the others, where a rank file is for a model that sees."""
    if image and path.suffix != ".json":
        return from_ranks(path.read_bytes(), image=True)
    return load_tokenizer(path)


def _generation(config: Mapping[str, Any]) -> dict[str, Any]:
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id") if name in config}
    return {"_from_model_config": True, **ids}


def _random(sizes: Mapping[str, Entry], seed: int, outliers: int, name: str) -> Tensor:
    entry = sizes[name]
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    if tensor.dim() >= 2:
        return tensor.normal_(0.0, _STD, generator=_generator(seed, name))
    if name.endswith(".bias"):
        return tensor.normal_(0.0, _STD, generator=_generator(seed, name))
    tensor.normal_(1.0, 0.05, generator=_generator(seed, name))
    if outliers and "layers" in name:
        order = torch.randperm(len(tensor), generator=_generator(seed, "outliers"))
        tensor[order[:outliers]] *= _OUTLIER
    return tensor


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
