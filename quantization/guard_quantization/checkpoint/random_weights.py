"""A Llama of any geometry with random weights, in the layout that a real checkpoint has.

For sizes, speed and memory at the real geometry where the real, gated weights are not at hand.
config.json says `random_weights`, so that the result never passes for the real thing.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from guard_quantization.checkpoint.tensors import (
    DTYPES,
    SHARD_BYTES,
    Entry,
    layout,
    shape_of,
    write_tensors,
)
from guard_quantization.export.decoder import ExportError
from guard_quantization.folders import write_json
from guard_service.artifact import fresh_folder
from guard_service.tokenizer import load_tokenizer

# Unlike Llama 3.2 1B, embedding and output layer are not tied, and the rope factor is 8.
LLAMA_GUARD_3_1B_CONFIG: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 128256,
}
_STD = 0.02
_OUTLIER = 12.0  # times the scale of an ordinary channel


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

    Matrices are normal with a standard deviation of 0.02, norms near 1; the same `outliers`
    channels of every layer's norms are 12 times as large, as trained Llamas have a few. A tensor
    depends on `seed` and its name alone. `tokenizer_path` is a tokenizer.json or a rank file.
    Raises ExportError for a config that is not a Llama's or has fewer tokens than the tokenizer,
    FileExistsError when `folder` exists, OSError when the disk is too small.
    """
    shape = shape_of(config)
    names = {str(known).removeprefix("torch."): code for code, known in DTYPES.items()}
    if dtype not in names:
        raise ExportError(f"dtype is {dtype!r}, must be one of {', '.join(names)}")
    if not 0 <= outliers <= shape.hidden:
        raise ExportError(f"outliers must be 0 to {shape.hidden}, the hidden size")
    tokenizer = load_tokenizer(tokenizer_path)
    if tokenizer.get_vocab_size() > shape.vocab:
        raise ExportError(
            f"{tokenizer_path} has {tokenizer.get_vocab_size()} tokens, config.json's vocab_size "
            f"is {shape.vocab}"
        )
    entries = [Entry(name, size, names[dtype]) for name, size in layout(config)]
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


def _generation(config: Mapping[str, Any]) -> dict[str, Any]:
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id") if name in config}
    return {"_from_model_config": True, **ids}


def _random(sizes: Mapping[str, Entry], seed: int, outliers: int, name: str) -> Tensor:
    entry = sizes[name]
    tensor = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
    if tensor.dim() == 2:
        return tensor.normal_(0.0, _STD, generator=_generator(seed, name))
    tensor.normal_(1.0, 0.05, generator=_generator(seed, name))
    if outliers and "layers" in name:
        order = torch.randperm(len(tensor), generator=_generator(seed, "outliers"))
        tensor[order[:outliers]] *= _OUTLIER
    return tensor


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
