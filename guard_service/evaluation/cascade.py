"""The band of a cascade, fitted to what both guards said of the same labelled rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from guard_service.evaluation.figures import Bools, Floats, Ints

_EDGES = 300  # of bands that are tried; 45,000 bands
_POINTS = 20  # of the curve that are told


Band = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Point:
    """A band and what the two guards come to with it; None: the first decides alone.

    `sent` is the share of rows that the second judges, `agreement` the share of which the verdict
    is the second's, asked or not.
    """

    band: Band | None
    sent: float
    recall: float
    fpr: float
    agreement: float


def sent(scores: Floats, band: Band | None) -> Bools:
    """Which rows a band sends up."""
    if band is None:
        return np.zeros(len(scores), bool)
    return (scores >= band[0]) & (scores <= band[1])


@dataclass(frozen=True, slots=True)
class Fit:
    """Both guards alone, the band that was chosen, and the best bands by what they cost.

    `curve` begins with the first guard alone; each further point sends more up and has a higher
    recall less FPR than all that cost less.
    """

    first: Point
    second: Point
    chosen: Point
    curve: tuple[Point, ...]


def fit_band(labels: Bools, scores: Floats, first: Bools, second: Bools, tolerance: float) -> Fit:
    """The band that sends the fewest rows up, of those that are as good as the second guard alone:
    its recall less `tolerance` at least, its FPR plus `tolerance` at most.

    `labels`: whether each row is unsafe; `scores`: the first guard's P(unsafe); `first`, `second`:
    whether each guard fired [rows]. Every band that ends at a score of a row is tried, of many
    scores 300, evenly spread. Raises ValueError unless there are rows of both labels.
    """
    if labels.all() or not labels.any():
        raise ValueError("a band is fitted to safe and unsafe rows; there are none of one kind")
    bands, sums = _bands(labels, scores, first, second)
    points = _Points(bands, sums, labels, first, second)
    alone = points.of_second
    good = (points.recall >= alone.recall - tolerance - 1e-12) & (
        points.fpr <= alone.fpr + tolerance + 1e-12
    )
    ranked = np.lexsort((points.fpr - points.recall, points.sent))  # the cheapest first
    chosen = ranked[good[ranked]]
    curve = _frontier(points, ranked)
    return Fit(
        first=points[0],
        second=alone,
        chosen=points[int(chosen[0])],
        curve=tuple(points[at] for at in curve),
    )


def _bands(
    labels: Bools, scores: Floats, first: Bools, second: Bools
) -> tuple[list[Band | None], Ints]:
    """Bands, the empty one first, and of the rows in each what `_Points` counts [bands, 6]."""
    unique, which = np.unique(scores, return_inverse=True)
    counted = np.stack(
        [
            np.ones_like(labels),
            labels & first,
            labels & second,
            ~labels & first,
            ~labels & second,
            first != second,
        ],
        axis=1,
    ).astype(np.int64)
    below = np.zeros((len(unique) + 1, counted.shape[1]), np.int64)  # [scores + 1, 6]
    np.add.at(below, which + 1, counted)
    below = below.cumsum(axis=0)
    picked = np.unique(np.linspace(0, len(unique) - 1, _EDGES).astype(int))
    low, high = (side.ravel() for side in np.meshgrid(picked, picked, indexing="ij"))
    low, high = low[low <= high], high[low <= high]
    bands = [None, *((_low(unique, i), _high(unique, j)) for i, j in zip(low, high, strict=True))]
    inside = below[high + 1] - below[low]
    return bands, np.concatenate([np.zeros((1, inside.shape[1]), np.int64), inside])


def _low(unique: Floats, at: int) -> float:
    return _between(float(unique[at - 1]), float(unique[at])) if at else 0.0


def _high(unique: Floats, at: int) -> float:
    last = at + 1 == len(unique)
    return 1.0 if last else _between(float(unique[at]), float(unique[at + 1]))


def _between(low: float, high: float) -> float:
    """A number between two, with as few digits as may be: scores in files are rounded."""
    middle = (low + high) / 2
    rounded = (round(middle, digits) for digits in range(1, 10))
    return next((short for short in rounded if low < short < high), middle)


class _Points:
    """Bands and their figures [bands]."""

    def __init__(
        self,
        bands: Sequence[Band | None],
        inside: Ints,
        labels: Bools,
        first: Bools,
        second: Bools,
    ) -> None:
        rows, unsafe = len(labels), int(labels.sum())
        sent, hit_1, hit_2, wrong_1, wrong_2, differ = inside.T
        self.bands = bands
        self.sent: Floats = sent / rows
        self.recall: Floats = ((labels & first).sum() - hit_1 + hit_2) / unsafe
        self.fpr: Floats = ((~labels & first).sum() - wrong_1 + wrong_2) / (rows - unsafe)
        self.agreement: Floats = 1 - ((first != second).sum() - differ) / rows
        recall, fpr = second[labels].mean(), second[~labels].mean()
        self.of_second = Point((0.0, 1.0), 1.0, float(recall), float(fpr), 1.0)

    def __getitem__(self, at: int) -> Point:
        figures = (self.sent, self.recall, self.fpr, self.agreement)
        return Point(self.bands[at], *(float(one[at]) for one in figures))


def _frontier(points: _Points, ranked: NDArray[np.intp]) -> list[int]:
    gain = (points.recall - points.fpr)[ranked]
    best = np.maximum.accumulate(gain)
    better = np.r_[True, best[1:] > best[:-1] + 1e-12]
    found = ranked[better]
    keep = np.unique(np.linspace(0, len(found) - 1, _POINTS).astype(int))
    return [int(at) for at in found[keep]]
