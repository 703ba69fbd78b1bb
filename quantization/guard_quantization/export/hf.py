"""A Llama Guard 3 checkpoint in the Hugging Face layout: read without running anything in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from guard_quantization.checkpoint.quantized import QUANTIZATION_FILE, QuantizedCheckpoint
from guard_quantization.checkpoint.tensors import Tensors, check_tensors, read_config
from guard_quantization.export.artifact import Release, make_artifact, verdict_tokens
from guard_quantization.export.decoder import ExportError, Precision
from guard_quantization.folders import member
from guard_service.artifact import Artifact
from guard_service.tokenizer import TokenizerError, load_tokenizer

RANDOM = "random weights, not a guard: its verdicts mean nothing"
# Scores of random weights lie near one half and hang on every rounding: a kernel plan that a model
# would score the same by may score them this much differently.
_RANDOM_TOLERANCE = 0.2

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


@dataclass(frozen=True, slots=True)
class Source:
    """What a folder holds besides weights."""

    config: Mapping[str, Any]
    tokenizer: Tokenizer


def read_source(folder: Path) -> Source:
    """config.json and the tokenizer (tokenizer.json, else tokenizer.model). Raises ExportError."""
    config = read_config(folder, codes=(folder / QUANTIZATION_FILE).exists())
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).exists():
            try:
                return Source(config, load_tokenizer(member(folder, name)))
            except TokenizerError as error:
                raise ExportError(f"{folder}: {error}") from error
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
    this precision, FileExistsError, OSError when the disk is too small.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists; results are never written over")
    read = read_source(source)
    if read.config.get("random_weights"):
        release = replace(
            release,
            name=f"{release.name}-random",
            notice=RANDOM,
            licence="none",
            tolerance=_RANDOM_TOLERANCE,
        )
    origin = {"source": {"layout": "huggingface", "config": dict(read.config)}}
    release = replace(release, provenance={**release.provenance, **origin})
    cut = _head_is_cut(read, release)
    precision = precision or Precision()
    if (source / QUANTIZATION_FILE).exists():
        codes = QuantizedCheckpoint(source)
        return make_artifact(
            folder, read.config, codes, read.tokenizer, release, precision, head_is_cut=cut
        )
    with Tensors(source) as weights:
        check_tensors(weights, read.config)
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
