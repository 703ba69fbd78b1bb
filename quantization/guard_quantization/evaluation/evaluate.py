"""Judging labelled rows with an engine, and fitting its calibration.

The figures themselves are `guard_service.evaluation`'s: those that `guardctl eval` has for any
running guard.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from guard_policies.assessment import Direction
from guard_policies.taxonomy import LLAMA_GUARD_3
from guard_quantization.data import Row
from guard_quantization.training import Report
from guard_service.conversation import Conversation
from guard_service.engines import Assessed, ModelCard
from guard_service.evaluation.categories import first_named, named_f1
from guard_service.evaluation.figures import (
    Floats,
    Judged,
    auroc,
    expected_calibration_error,
    values,
)
from guard_service.evaluation.report import labels_of
from guard_service.evaluation.rows import Labelled
from guard_service.evaluation.scores import CODES, Scores
from guard_service.manifest import Calibration
from guard_service.prompt import InvalidConversation, Prompt, PromptBuilder

__all__ = [
    "Judge",
    "Scores",
    "auroc",
    "by",
    "calibrations",
    "category_figures",
    "expected_calibration_error",
    "figures",
    "fit_calibration",
    "fit_temperature",
    "score_rows",
    "scored",
]
_BATCH = 64


class Judge(Protocol):
    """What is asked of an Engine here."""

    card: ModelCard

    def prompt_builder(self) -> PromptBuilder:
        """See Engine."""
        ...

    def assess(self, prompts: Sequence[Prompt]) -> list[Assessed]:
        """See Engine."""
        ...

    def close(self) -> None:
        """See Engine."""
        ...


def score_rows(judge: Judge, rows: Sequence[Row], what: str = "evaluate") -> Scores:
    """`scored`, with progress shown."""
    report = Report(what, len(rows))
    try:
        return scored(judge, rows, lambda count: report.at(count, ""))
    finally:
        report.close()


def scored(
    judge: Judge, rows: Sequence[Row], done: Callable[[int], None] = lambda count: None
) -> Scores:
    """Judge rows as the service would: its prompts, its windows, the worst window counts.

    The list is of the categories that the model knows. A text that is none (half a surrogate pair)
    is a failure, with NaN as its score. `done` is told how many rows are judged. Raises
    EngineFailed.
    """
    builder, known = judge.prompt_builder(), judge.card.categories
    listed = tuple(category for category in LLAMA_GUARD_3 if category.code in known)
    unsafe, codes = np.full(len(rows), np.nan), np.zeros((len(rows), len(CODES)))
    failures: dict[int, str] = {}
    order = sorted(range(len(rows)), key=lambda at: sum(len(t) for _, t in rows[at].turns))
    for begin in range(0, len(rows), _BATCH):
        part = order[begin : begin + _BATCH]
        built = {}
        for at in part:
            try:
                built[at] = builder.build(Conversation.of(*rows[at].turns), listed).prompts
            except InvalidConversation:
                failures[at] = "INVALID_CONVERSATION"
        found = iter(judge.assess([prompt for prompts in built.values() for prompt in prompts]))
        for at, prompts in built.items():
            assessed = [next(found).assessment for _ in prompts]
            worst = max(assessed, key=lambda assessment: assessment.unsafe_score)
            unsafe[at] = worst.unsafe_score
            codes[at] = [worst.category_scores.get(code, 0.0) for code in CODES]
        done(begin + len(part))
    shares = codes / np.maximum(np.nan_to_num(unsafe), 1e-12)[:, None]
    return Scores(unsafe, shares, failures=failures)


def figures(rows: Sequence[Labelled], scores: Floats, threshold: float = 0.5) -> dict[str, float]:
    """Counts and every figure at `threshold`, without intervals."""
    labels = labels_of(rows)
    counts = {"safe": int((~labels).sum()), "unsafe": int(labels.sum())}
    return {**counts, **values(Judged(labels, scores, scores >= threshold))}


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


def category_figures(rows: Sequence[Labelled], codes: Floats) -> dict[str, Any]:
    """F1 of the first-named code on unsafe rows that have codes: each one's, and their mean."""
    unsafe = np.zeros(len(rows))
    truth, guess, columns = first_named(rows, Scores(unsafe, codes))
    f1, present = named_f1(truth, guess, len(columns), np.ones((1, len(truth))))
    each = {
        columns[at]: {"rows": int((truth == at).sum()), "f1": float(f1[0, at])}
        for at in np.flatnonzero(present)
    }
    mean = float(np.mean([one["f1"] for one in each.values()])) if each else float("nan")
    return {"macro_f1": mean, "by_category": each}


def fit_calibration(labels: NDArray[np.bool_], scores: Floats, bias: bool = True) -> Calibration:
    """Platt scaling (Platt, 1999) of uncalibrated P(unsafe), at the rows' own share of unsafe.

    A weak prior (C = 1) keeps the scale finite where rows are told apart without a mistake.
    Without `bias` it is temperature scaling.
    """
    clipped = np.clip(scores, 1e-6, 1 - 1e-6)
    logits = np.log(clipped / (1 - clipped))
    fitted = LogisticRegression(C=1.0, fit_intercept=bias).fit(logits[:, None], labels)
    offset = float(fitted.intercept_[0]) if bias else 0.0
    return Calibration(float(max(fitted.coef_[0, 0], 1e-3)), offset)


def fit_temperature(labels: NDArray[np.bool_], scores: Floats) -> Calibration:
    """Temperature scaling (Guo et al., 2017): the scale is 1 / temperature, the bias 0."""
    return fit_calibration(labels, scores, bias=False)


def calibrations(rows: Sequence[Labelled], scores: Floats) -> Mapping[Direction, Calibration]:
    """A calibration per direction, from scores without one; none where a label has no rows."""
    fitted, labels = {}, labels_of(rows)
    for direction in Direction:
        own = np.array([row.direction is direction for row in rows], bool)
        both = len(set(labels[own].tolist())) == 2
        fitted[direction] = fit_calibration(labels[own], scores[own]) if both else Calibration()
    return fitted


def calibrate(
    rows: Sequence[Labelled], scores: Floats, fitted: Mapping[Direction, Calibration]
) -> Floats:
    """Scores without a calibration, each by the one of its direction."""
    clipped = np.clip(scores, 1e-9, 1 - 1e-9)
    pairs = zip(rows, clipped, strict=True)
    return np.array([fitted[row.direction].probability(math.log(p / (1 - p))) for row, p in pairs])
