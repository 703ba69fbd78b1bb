"""Two guards on the same rows: how far figures, scores and verdicts of one are from the other's."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from guard_service.evaluation.categories import first_named, named_f1
from guard_service.evaluation.figures import (
    NAMES,
    Floats,
    Judged,
    interval,
    measure,
    resamples,
    values,
    wilson,
)
from guard_service.evaluation.report import DIMENSIONS, digest, jsonable, labels_of, part
from guard_service.evaluation.rows import Labelled
from guard_service.evaluation.scores import Scores

FORMAT = "guard-comparison/1"


def compare(
    rows: Sequence[Labelled],
    reference: Scores,
    other: Scores,
    threshold: float | None = None,
    worst: int = 20,
) -> dict[str, Any]:
    """Differences (other minus reference), agreement and the rows that moved most, ready for JSON.

    Only rows that both have judged count; how many are left out is told. Intervals are of the
    paired bootstrap: both guards on the same resampled rows.
    """
    kept = [at for at in reference.judged() if at not in other.failures]
    rows_ = [rows[at] for at in kept]
    before, after = reference.take(kept), other.take(kept)
    labels = labels_of(rows_)
    first, second = (Judged(labels, one.unsafe, one.verdicts(threshold)) for one in (before, after))
    moved = after.unsafe - before.unsafe
    report = {
        "format": FORMAT,
        "data": {"rows": len(rows), "digest": digest(rows)},
        "judged_by_both": len(kept),
        "unjudged": {"reference": len(reference.failures), "other": len(other.failures)},
        "figures": differences(first, second),
        "verdicts": agreement(first, second),
        "unsafe_score": _distance(moved),
        "categories": _categories(rows_, before, after),
        "by": {name: _groups(rows_, first, second, name) for name in DIMENSIONS},
        "worst": [
            {
                "file": rows_[at].file,
                "id": rows_[at].id,
                "label": "unsafe" if labels[at] else "safe",
                "reference": float(before.unsafe[at]),
                "other": float(after.unsafe[at]),
            }
            for at in np.argsort(-np.abs(moved), kind="stable")[:worst]
        ],
    }
    plain: dict[str, Any] = jsonable(report)
    return plain


def differences(reference: Judged, other: Judged, seed: int = 0) -> dict[str, dict[str, Any]]:
    """For each figure: both values, their difference and its paired 95 % interval.

    The rows must be the same and in the same order, the labels too.
    """
    before, after = values(reference), values(other)
    drawn: dict[str, list[Floats]] = defaultdict(list)
    both = [(one.sorted(), np.argsort(-one.scores, kind="stable")) for one in (reference, other)]
    for weights in resamples(reference.labels, seed):
        lines = [measure(ordered, weights[:, order]) for ordered, order in both]
        for name in NAMES:
            drawn[name].append(lines[1][name] - lines[0][name])
    return {
        name: {
            "reference": before[name],
            "other": after[name],
            "difference": after[name] - before[name],
            "interval": interval(
                after[name] - before[name],
                np.concatenate(drawn[name]) if drawn else np.zeros(0),
            ),
        }
        for name in NAMES
    }


def agreement(reference: Judged, other: Judged) -> dict[str, Any]:
    """How many verdicts are the same, and which way the others went."""
    same, of = int((reference.fired == other.fired).sum()), len(reference.labels)
    return {
        "same": same,
        "agreement": same / of if of else float("nan"),
        "interval": wilson(same, of),
        "to_unsafe": int((~reference.fired & other.fired).sum()),
        "to_safe": int((reference.fired & ~other.fired).sum()),
    }


def _distance(moved: Floats) -> dict[str, float]:
    """Of scores: the greatest and the mean distance, and the mean shift."""
    if not moved.size:
        return {name: float("nan") for name in ("max", "p99", "mean", "shift")}
    far = np.abs(moved)
    return {
        "max": float(far.max()),
        "p99": float(np.percentile(far, 99)),
        "mean": float(far.mean()),
        "shift": float(moved.mean()),
    }


def _categories(rows: Sequence[Labelled], before: Scores, after: Scores) -> dict[str, Any]:
    """First-named codes: how often both name the same, how often each is right."""
    names = [[one.columns[at] for at in one.codes.argmax(axis=1)] for one in (before, after)]
    same = sum(a == b for a, b in zip(*names, strict=True))
    found: dict[str, Any] = {
        "same_first": same,
        "agreement": same / len(rows) if rows else float("nan"),
    }
    if before.columns == after.columns:
        columns = zip(before.columns, (after.codes - before.codes).T, strict=True)
        found["score_max"] = {code: _distance(moved)["max"] for code, moved in columns}
    for name, scores in (("reference", before), ("other", after)):
        truth, guess, known = first_named(rows, scores)
        f1, present = named_f1(truth, guess, len(known), np.ones((1, len(truth))))
        found[name] = {
            "rows": len(truth),
            "accuracy": float((truth == guess).mean()) if len(truth) else float("nan"),
            "macro_f1": float(f1[0, present].mean()) if len(truth) else float("nan"),
        }
    return found


def _groups(
    rows: Sequence[Labelled], reference: Judged, other: Judged, key: str
) -> Mapping[str, Any]:
    members: dict[str, list[int]] = defaultdict(list)
    for at, row in enumerate(rows):
        if name := DIMENSIONS[key](row):
            members[name].append(at)
    return {
        name: {
            "rows": len(chosen),
            "figures": differences(part(reference, chosen), part(other, chosen)),
            "verdicts": agreement(part(reference, chosen), part(other, chosen)),
            "unsafe_score": _distance(other.scores[chosen] - reference.scores[chosen]),
        }
        for name, chosen in sorted(members.items())
    }
