"""Figures of a binary judge and their intervals: arrays in, plain numbers out.

A figure that the rows do not define is NaN, never a guess: AUROC with one class missing, precision
when nothing fired. Shares of a count (recall, precision, FPR) have Wilson's interval, which says
something honest even of 0 in 20. All others are bootstrapped: resampled within each class, 1,000
times (fewer for more than 10,000 rows), from a fixed seed; below LEAST_ROWS rows of a class, or
where no resample differs, there is no interval.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]

BINS = 15
LEAST_ROWS = 10
SHARES = ("precision", "recall", "fpr")
RANKED = ("auroc", "auprc")
NAMES = ("f1", *SHARES, *RANKED, "ece", "brier")
LOWER_IS_BETTER = ("fpr", "ece", "brier")
_Z = 1.959963984540054  # the normal quantile of a 95 % interval
_PERCENTS = (2.5, 97.5)
_RESAMPLES = (200, 1000)
_WORK = 10_000_000  # resamples times rows
_CELLS = 2_000_000  # of one block of weights


@dataclass(frozen=True, slots=True)
class Judged:
    """Rows as figures see them: [rows] each, in one order. `scores` are P(unsafe) in [0, 1]."""

    labels: Bools
    scores: Floats
    fired: Bools

    def sorted(self) -> Judged:
        """The same rows, the highest score first."""
        order = np.argsort(-self.scores, kind="stable")
        return Judged(self.labels[order], self.scores[order], self.fired[order])


def measure(judged: Judged, weights: Floats) -> dict[str, Floats]:
    """Every figure of NAMES, for each line of weights [lines, rows]; rows sorted by `sorted`.

    A weight is how often a row counts. NaN where a figure is not defined.
    """
    labels, fired = judged.labels.astype(float), judged.fired.astype(float)
    unsafe, total = weights @ labels, weights.sum(axis=1)
    hits, wrong = weights @ (labels * fired), weights @ ((1 - labels) * fired)
    gaps = np.zeros((len(labels), BINS))
    gaps[np.arange(len(labels)), bins_of(judged.scores)] = judged.scores - labels
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            "f1": np.where(unsafe > 0, 2 * hits / (hits + wrong + unsafe), np.nan),
            "precision": hits / (hits + wrong),
            "recall": hits / unsafe,
            "fpr": wrong / (total - unsafe),
            **_ranking(judged, weights, unsafe, total - unsafe),
            "ece": np.abs(weights @ gaps).sum(axis=1) / total,
            "brier": weights @ (judged.scores - labels) ** 2 / total,
        }


def _ranking(judged: Judged, weights: Floats, unsafe: Floats, safe: Floats) -> dict[str, Floats]:
    """AUROC as the share of pairs in order, ties half; AUPRC as average precision, ties as one."""
    if not len(judged.labels):
        return {name: np.full(len(weights), np.nan) for name in RANKED}
    starts = np.flatnonzero(np.r_[True, np.diff(judged.scores) != 0])
    positive = np.add.reduceat(weights * judged.labels, starts, axis=1)  # [lines, ties]
    negative = np.add.reduceat(weights * ~judged.labels, starts, axis=1)
    true, false = positive.cumsum(axis=1), negative.cumsum(axis=1)
    pairs = positive * (safe[:, None] - false + negative / 2)
    precision = true / np.maximum(true + false, 1)
    both = (unsafe > 0) & (safe > 0)
    return {
        "auroc": np.where(both, pairs.sum(axis=1) / (unsafe * safe), np.nan),
        "auprc": np.where(both, (positive * precision).sum(axis=1) / unsafe, np.nan),
    }


def bins_of(scores: Floats) -> Ints:
    """The equal-width bin of each score, 0 to BINS - 1."""
    return np.minimum((scores * BINS).astype(np.int64), BINS - 1)


def values(judged: Judged) -> dict[str, float]:
    """Every figure of NAMES, without intervals."""
    found = measure(judged.sorted(), np.ones((1, len(judged.labels))))
    return {name: float(lines[0]) for name, lines in found.items()}


def figures(judged: Judged, seed: int = 0) -> dict[str, object]:
    """Counts, every figure of NAMES, and `intervals` by name: (low, high), 95 %."""
    unsafe = int(judged.labels.sum())
    found = values(judged)
    counts = {"rows": len(judged.labels), "safe": len(judged.labels) - unsafe, "unsafe": unsafe}
    return {**counts, **found, "intervals": _intervals(judged, found, seed)}


def _intervals(
    judged: Judged, found: Mapping[str, float], seed: int
) -> dict[str, tuple[float, float]]:
    labels, fired = judged.labels, judged.fired
    hits = int((labels & fired).sum())
    made = {
        "precision": wilson(hits, int(fired.sum())),
        "recall": wilson(hits, int(labels.sum())),
        "fpr": wilson(int((~labels & fired).sum()), int((~labels).sum())),
    }
    ordered = judged.sorted()
    lines = [measure(ordered, some) for some in resamples(ordered.labels, seed)]
    for name in NAMES:
        if name not in made:
            drawn = np.concatenate([line[name] for line in lines]) if lines else np.zeros(0)
            made[name] = interval(found[name], drawn, reverse=name == "ece")
    return made


def resamples(strata: NDArray[np.generic], seed: int = 0) -> Iterator[Floats]:
    """Bootstrap weights [some, rows], block by block; each stratum keeps its number of rows.

    Nothing when a stratum has fewer than LEAST_ROWS rows (Efron and Tibshirani, 1993, 8.3 for
    the scheme).
    """
    groups = [np.flatnonzero(strata == one) for one in np.unique(strata)]
    if not groups or min(map(len, groups)) < LEAST_ROWS:
        return
    rng = np.random.default_rng(seed)
    left = int(np.clip(_WORK // len(strata), *_RESAMPLES))
    most = max(1, _CELLS // len(strata))
    while left:
        size = min(left, most)
        weights = np.empty((size, len(strata)))
        for members in groups:
            drawn = rng.integers(0, len(members), (size, len(members)))
            drawn += len(members) * np.arange(size)[:, None]
            copies = np.bincount(drawn.ravel(), minlength=drawn.size)
            weights[:, members] = copies.reshape(drawn.shape)
        yield weights
        left -= size


def interval(value: float, drawn: Floats, reverse: bool = False) -> tuple[float, float]:
    """The 95 % percentile interval of resampled values; NaN when they say nothing.

    `reverse` mirrors it at the value (the basic interval): for the calibration error, of which
    every resample has more than the rows it was drawn from. The rows' own has a bias of the same
    kind, so that of few rows the low end is above 0 even where a guard is calibrated.
    """
    if math.isnan(value) or not len(drawn) or np.isnan(drawn).any() or np.ptp(drawn) == 0:
        return (math.nan, math.nan)
    low, high = (float(one) for one in np.percentile(drawn, _PERCENTS))
    return (max(0.0, 2 * value - high), max(0.0, 2 * value - low)) if reverse else (low, high)


def wilson(hits: int, of: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson, 1927); NaN of nothing."""
    if not of:
        return (math.nan, math.nan)
    share, z2 = hits / of, _Z * _Z
    centre = (share + z2 / (2 * of)) / (1 + z2 / of)
    half = _Z * math.sqrt(share * (1 - share) / of + z2 / (4 * of * of)) / (1 + z2 / of)
    # Exactly 0 and 1 where all is on one side, not 1e-17 beside them.
    return (0.0 if not hits else centre - half, 1.0 if hits == of else centre + half)


def auroc(labels: Bools, scores: Floats) -> float:
    """Area under the ROC curve (ties count half); NaN when one class is missing."""
    return values(Judged(labels, scores, labels))["auroc"]


def expected_calibration_error(labels: Bools, scores: Floats) -> float:
    """Mean gap between confidence and frequency over 15 equal-width bins (Guo et al., 2017)."""
    return values(Judged(labels, scores, labels))["ece"]
