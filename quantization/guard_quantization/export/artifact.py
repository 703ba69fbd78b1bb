"""From float weights to a finished artifact: quantize, export, score the golden prompts, seal."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from guard_policies.assessment import Direction
from guard_quantization.checkpoint.tensors import stored_bytes
from guard_quantization.export.decoder import (
    ExportError,
    Precision,
    Shape,
    Weights,
    export_graphs,
)
from guard_quantization.folders import check_room
from guard_service.artifact import TOKENIZER_FILE, Artifact, fresh_folder, load, seal
from guard_service.engines import scoring
from guard_service.engines.golden import CONVERSATIONS, Turns
from guard_service.engines.onnx import OnnxEngine
from guard_service.manifest import Calibration, Geometry, Manifest, Quantization, Verdict
from guard_service.tokenizer import TokenizerError

_SCHEME = {32: "fp32", 8: "int8", 4: "int4"}
_MOST_POSITIONS = 4096  # attention over more than this in one run takes gigabytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """What an artifact is called, how it is prompted and under which terms it is used."""

    name: str
    template: str
    window_tokens: int
    categories: tuple[str, ...]
    licence: str
    custom_categories: bool = False
    codes: tuple[str, ...] = ()  # that a prompt may list; `categories` when empty
    notice: str = ""
    calibration: Mapping[Direction, Calibration] = field(
        default_factory=lambda: {way: Calibration() for way in Direction}
    )
    golden: tuple[Turns, ...] = CONVERSATIONS
    tolerance: float = 0.05
    documents: Mapping[str, Path] = field(default_factory=dict)  # MODEL_CARD.md and the like
    provenance: Mapping[str, Any] = field(default_factory=dict)


def verdict_tokens(tokenizer: Tokenizer, codes: Sequence[str]) -> Verdict:
    """As `scoring.verdict_tokens`; raises ExportError."""
    try:
        return scoring.verdict_tokens(tokenizer, codes)
    except TokenizerError as error:
        raise ExportError(str(error)) from error


def make_artifact(
    folder: Path,
    config: Mapping[str, Any],
    weights: Weights,
    tokenizer: Tokenizer,
    release: Release,
    precision: Precision,
    *,
    head_is_cut: bool = False,
) -> Artifact:
    """Make an artifact folder. `head_is_cut`: lm_head has only the rows of `verdict_tokens`.

    The golden prompts are scored by the engine that serves, on what was exported. Raises
    FileExistsError when `folder` exists, ExportError for a model that cannot be exported, OSError
    when the disk is too small.
    """
    verdict = verdict_tokens(tokenizer, release.codes or release.categories)
    p = precision
    check_room(folder, stored_bytes(config, len(verdict.head), p.bits, p.block, p.embedding_bits))
    with fresh_folder(folder) as made:
        head = None if head_is_cut else verdict.head
        parameters = export_graphs(made, config, weights, head, precision)
        (made / TOKENIZER_FILE).write_text(tokenizer.to_str(), "utf-8")
        for name, document in release.documents.items():
            shutil.copyfile(document, made / name)
        manifest = _manifest(config, release, verdict, precision, parameters)
        engine = OnnxEngine(seal(made, manifest))
        golden = tuple(engine.score(turns) for turns in release.golden)
        engine.close()
        seal(made, replace(manifest, golden=golden))
    return load(folder)


def _manifest(
    config: Mapping[str, Any],
    release: Release,
    verdict: Verdict,
    precision: Precision,
    parameters: int,
) -> Manifest:
    shape = Shape.of(config)
    versions = {name: version(name) for name in ("onnx", "onnxruntime", "numpy", "tokenizers")}
    return Manifest(
        name=release.name,
        template=release.template,
        window_tokens=release.window_tokens,
        categories=release.categories,
        custom_categories=release.custom_categories,
        verdict=verdict,
        geometry=Geometry(
            layers=shape.layers,
            hidden=shape.hidden,
            mlp=shape.mlp,
            heads=shape.heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            vocab=shape.vocab,
            max_positions=min(config.get("max_position_embeddings", 2048), _MOST_POSITIONS),
        ),
        parameters=parameters,
        quantization=Quantization(
            scheme=_SCHEME[precision.bits],
            embedding=_SCHEME[precision.embedding_bits],
            block=0 if precision.bits == 32 else precision.block,
        ),
        licence=release.licence,
        notice=release.notice,
        calibration=release.calibration,
        tolerance=release.tolerance,
        provenance={
            **release.provenance,
            "export": {"precision": asdict(precision), "versions": versions},
        },
    )
