"""How well a guard judges: figures by file, source, language and category, and its calibration."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from guard_policies.assessment import Direction
from guard_policies.taxonomy import LLAMA_GUARD_3
from guard_quantization.data import Row
from guard_quantization.teacher import CODES
from guard_quantization.training import Report
from guard_service.conversation import Conversation
from guard_service.engines import Engine
from guard_service.manifest import Calibration

Floats = NDArray[np.float64]
_BATCH = 64
_BINS = 15


@dataclass(frozen=True, slots=True)
class Scores:
    """What a guard said of rows, in their order."""

    unsafe: Floats  # P(unsafe) [rows]
    codes: Floats  # share of each code [rows, codes]


def score_rows(engine: Engine, rows: Sequence[Row], what: str = "evaluate") -> Scores:
    """Judge rows as the service would: its prompts, its windows, the worst window counts."""
    builder = engine.prompt_builder()
    unsafe = np.zeros(len(rows))
    codes = np.zeros((len(rows), len(CODES)))
    report = Report(what, len(rows))
    order = sorted(range(len(rows)), key=lambda at: sum(len(t) for _, t in rows[at].turns))
    for begin in range(0, len(rows), _BATCH):
        part = order[begin : begin + _BATCH]
        built = [builder.build(Conversation.of(*rows[at].turns), LLAMA_GUARD_3) for at in part]
        found = iter(engine.assess([prompt for one in built for prompt in one.prompts]))
        for at, one in zip(part, built, strict=True):
            assessed = [next(found).assessment for _ in one.prompts]
            worst = max(assessed, key=lambda assessment: assessment.unsafe_score)
            unsafe[at] = worst.unsafe_score
            codes[at] = [worst.category_scores.get(code, 0.0) for code in CODES]
        report.at(begin + len(part), "")
    report.close()
    return Scores(unsafe, codes / np.maximum(unsafe, 1e-12)[:, None])


def auroc(labels: NDArray[np.bool_], scores: Floats) -> float:
    """Area under the ROC curve (ties count half); NaN when one class is missing."""
    if labels.all() or not labels.any():
        return float("nan")
    return float(roc_auc_score(labels, scores))


def expected_calibration_error(labels: NDArray[np.bool_], scores: Floats) -> float:
    """Mean gap between confidence and frequency over 15 equal-width bins (Guo et al., 2017)."""
    bins = np.minimum((scores * _BINS).astype(int), _BINS - 1)
    gap = 0.0
    for at in range(_BINS):
        inside = bins == at
        if inside.any():
            gap += inside.mean() * abs(scores[inside].mean() - labels[inside].mean())
    return float(gap)


def figures(rows: Sequence[Row], scores: Floats, threshold: float = 0.5) -> dict[str, float]:
    """Counts, AUROC, F1, recall and false positive rate at `threshold`, and calibration error."""
    labels = np.array([row.unsafe for row in rows], bool)
    fired = scores >= threshold
    hits = int((fired & labels).sum())
    wrong = int((fired & ~labels).sum())
    missed = int((~fired & labels).sum())
    return {
        "safe": int((~labels).sum()),
        "unsafe": int(labels.sum()),
        "auroc": auroc(labels, scores),
        "f1": 2 * hits / max(1, 2 * hits + wrong + missed) if labels.any() else float("nan"),
        "recall": hits / labels.sum() if labels.any() else float("nan"),
        "fpr": wrong / (~labels).sum() if (~labels).any() else float("nan"),
        "ece": expected_calibration_error(labels, scores),
    }


def by(
    rows: Sequence[Row], scores: Floats, key: Callable[[Row], str], threshold: float = 0.5
) -> dict[str, dict[str, float]]:
    """`figures` of every group of rows that share a key."""
    groups: dict[str, list[int]] = defaultdict(list)
    for at, row in enumerate(rows):
        groups[key(row)].append(at)
    return {
        name: figures([rows[at] for at in members], scores[members], threshold)
        for name, members in sorted(groups.items())
    }


def category_figures(rows: Sequence[Row], codes: Floats) -> dict[str, Any]:
    """F1 of the first-named code on unsafe rows that have codes: each one's, and their mean.

    A row of several codes counts as right when the first-named is one of them.
    """
    hits: dict[str, int] = defaultdict(int)
    said: dict[str, int] = defaultdict(int)
    real: dict[str, int] = defaultdict(int)
    for row, shares in zip(rows, codes, strict=True):
        if not row.categories:
            continue
        guess = CODES[int(shares.argmax())]
        truth = guess if guess in row.categories else row.categories[0]
        said[guess] += 1
        real[truth] += 1
        hits[guess] += guess == truth
    each = {
        code: {"rows": real[code], "f1": 2 * hits[code] / (said[code] + real[code])}
        for code in CODES
        if real[code]
    }
    mean = float(np.mean([one["f1"] for one in each.values()])) if each else float("nan")
    return {"macro_f1": mean, "by_category": each}


def fit_calibration(labels: NDArray[np.bool_], scores: Floats) -> Calibration:
    """Platt scaling (Platt, 1999) of uncalibrated P(unsafe), at the rows' own share of unsafe.

    A weak prior (C = 1) keeps the scale finite where rows are told apart without a mistake.
    """
    clipped = np.clip(scores, 1e-6, 1 - 1e-6)
    logits = np.log(clipped / (1 - clipped))
    fitted = LogisticRegression(C=1.0).fit(logits[:, None], labels)
    return Calibration(float(max(fitted.coef_[0, 0], 1e-3)), float(fitted.intercept_[0]))


def calibrations(rows: Sequence[Row], scores: Floats) -> Mapping[Direction, Calibration]:
    """A calibration per direction, from scores without one."""
    fitted = {}
    for direction in Direction:
        own = np.array([row.direction is direction for row in rows])
        labels = np.array([row.unsafe for row in rows], bool)[own]
        fitted[direction] = fit_calibration(labels, scores[own])
    return fitted
