"""A Llama Guard 3 checkpoint in the Hugging Face layout: read without running anything in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from guard_quantization.export.artifact import Release, make_artifact, verdict_tokens
from guard_quantization.export.decoder import ExportError, Precision
from guard_service.artifact import Artifact
from guard_service.tokenizer import load_tokenizer

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")

RANDOM = "random weights, not a guard: its verdicts mean nothing"

# The published 1B model knows S1 to S13; a policy may bring categories of its own.
LLAMA_GUARD_3_1B = Release(
    name="llama-guard-3-1b",
    template="llama-guard-3-1b",
    window_tokens=512,
    categories=tuple(f"S{number}" for number in range(1, 14)),
    codes=tuple(f"S{number}" for number in range(1, 100)),
    custom_categories=True,
    licence="Llama 3.2 Community License",
    notice="Built with Llama",
)


class Checkpoint:
    """Tensors of a safetensors folder by name, read when asked for and not kept.

    Raises ExportError for a folder without safetensors (pickles are never read), for damaged files
    and for tensors that are missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places = _places(folder)
        self._open: dict[str, Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.clear()

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name not in self._places:
            raise ExportError(f"{self.folder}: no tensor {name}")
        file = self._places[name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            tensor = self._open[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ExportError(f"{self.folder / file}: {name} cannot be read ({error})") from error
        floats: NDArray[np.float32] = tensor.float().numpy()
        return floats


@dataclass(frozen=True, slots=True)
class Source:
    """What a folder holds besides weights."""

    config: Mapping[str, Any]
    tokenizer: Tokenizer


def read_source(folder: Path) -> Source:
    """config.json and the tokenizer (tokenizer.json, else tokenizer.model). Raises ExportError."""
    config = _json(folder / "config.json")
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return Source(config, load_tokenizer(folder / name))
    raise ExportError(f"{folder}: neither tokenizer.json nor tokenizer.model here")


def export_checkpoint(
    source: Path,
    folder: Path,
    release: Release = LLAMA_GUARD_3_1B,
    precision: Precision | None = None,
) -> Artifact:
    """Make an artifact of a checkpoint folder, int4 unless asked otherwise.

    The folder may be pruned (`verdict_head` in its config.json) or quantized (`quantized`); codes
    are taken as they are. Random weights are called that in name and notice. Memory: the embedding
    table in float and its codes at the most. Raises ExportError, ValueError when codes are not of
    this precision, FileExistsError.
    """
    from guard_quantization.checkpoint.quantized import QUANTIZATION_FILE, QuantizedCheckpoint

    read = read_source(source)
    if read.config.get("random_weights"):
        release = replace(release, name=f"{release.name}-random", notice=RANDOM, licence="none")
    origin = {"source": {"layout": "huggingface", "config": dict(read.config)}}
    release = replace(release, provenance={**release.provenance, **origin})
    cut = _head_is_cut(read, release)
    precision = precision or Precision()
    if (source / QUANTIZATION_FILE).exists():
        codes = QuantizedCheckpoint(source)
        return make_artifact(
            folder, read.config, codes, read.tokenizer, release, precision, head_is_cut=cut
        )
    with Checkpoint(source) as weights:
        return make_artifact(
            folder, read.config, weights, read.tokenizer, release, precision, head_is_cut=cut
        )


def _head_is_cut(read: Source, release: Release) -> bool:
    head = read.config.get("verdict_head")
    if head is None:
        return False
    wanted = verdict_tokens(read.tokenizer, release.codes or release.categories).head
    if tuple(head) != wanted:
        raise ExportError("config.json: verdict_head is not the tokenizer's verdict tokens")
    return True


def _places(folder: Path) -> dict[str, str]:
    """Which file holds each tensor."""
    if (folder / INDEX_FILE).is_file():
        places = _json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(places, dict) or not all(map(_plain, places.values())):
            raise ExportError(f"{folder / INDEX_FILE}: weight_map must name files of this folder")
        return places
    single = folder / SINGLE_FILE
    if not single.is_file():
        if any(any(folder.glob(pattern)) for pattern in PICKLES):
            raise ExportError(
                f"{folder}: its weights are pickles, which can run code and are never read; "
                "convert them to safetensors"
            )
        raise ExportError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE} here")
    try:
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), SINGLE_FILE)
    except (SafetensorError, OSError) as error:
        raise ExportError(f"{single}: not a safetensors file ({error})") from error


def _plain(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{path}: cannot be read as JSON") from error
    if not isinstance(found, dict):
        raise ExportError(f"{path}: not a JSON object")
    return found
