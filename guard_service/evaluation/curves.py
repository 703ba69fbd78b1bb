"""Curves of a judge, thinned to what a plot shows: ROC, precision over recall, calibration."""

from __future__ import annotations

from typing import Any

import numpy as np

from guard_service.evaluation.figures import BINS, Floats, Judged, bins_of, wilson

_POINTS = 200


def curves(judged: Judged) -> dict[str, Any]:
    """`roc` [[fpr, recall]], `pr` [[recall, precision]], `calibration`: a dict for each bin.

    ROC and PR are empty when a class is missing. Plain numbers, ready for JSON.
    """
    return {**_ranked(judged.sorted()), "calibration": _calibration(judged)}


def _ranked(judged: Judged) -> dict[str, list[list[float]]]:
    labels = judged.labels
    unsafe, safe = int(labels.sum()), int((~labels).sum())
    if not unsafe or not safe:
        return {"roc": [], "pr": []}
    ends = np.flatnonzero(np.r_[np.diff(judged.scores) != 0, True])  # last row of each tie
    true, false = labels.cumsum()[ends], (~labels).cumsum()[ends]
    keep = np.unique(np.linspace(0, len(ends) - 1, _POINTS).astype(int))
    recall, fpr = true[keep] / unsafe, false[keep] / safe
    precision = (true / (true + false))[keep]
    return {"roc": [[0.0, 0.0], *_points(fpr, recall)], "pr": _points(recall, precision)}


def _points(x: Floats, y: Floats) -> list[list[float]]:
    return [[round(float(a), 5), round(float(b), 5)] for a, b in zip(x, y, strict=True)]


def _calibration(judged: Judged) -> list[dict[str, Any]]:
    at = bins_of(judged.scores)
    found = []
    for number in range(BINS):
        inside = at == number
        if rows := int(inside.sum()):
            unsafe = int(judged.labels[inside].sum())
            found.append(
                {
                    "low": number / BINS,
                    "high": (number + 1) / BINS,
                    "rows": rows,
                    "score": float(judged.scores[inside].mean()),
                    "unsafe": unsafe / rows,
                    "interval": list(wilson(unsafe, rows)),
                }
            )
    return found
