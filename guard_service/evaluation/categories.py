"""Figures by hazard category, and how often the category that is named first is right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from guard_service.evaluation.figures import (
    Bools,
    Floats,
    Ints,
    Judged,
    figures,
    interval,
    resamples,
    wilson,
)
from guard_service.evaluation.rows import Labelled
from guard_service.evaluation.scores import Scores

_KEPT = ("rows", "unsafe", "recall", "auroc")


def category_figures(rows: Sequence[Labelled], judged: Judged, scores: Scores) -> dict[str, Any]:
    """`by_category`: how each code's rows are found; `categories`: how well codes are named.

    AUROC of a code ranks its unsafe rows against all safe rows. Naming is measured on unsafe rows
    that have codes, whatever the verdict on them. A row of several codes is right when the first
    named is one of them, and else counts for its first.
    """
    codes = sorted({code for row in rows if row.unsafe for code in row.categories or ()}, key=_key)
    naming, named = _naming(rows, scores)
    found = {}
    for code in codes:
        has = np.array([code in (row.categories or ()) for row in rows], bool)
        chosen = has & judged.labels | ~judged.labels
        own = Judged(judged.labels[chosen], judged.scores[chosen], judged.fired[chosen])
        all_of = figures(own)
        kept = {name: all_of[name] for name in _KEPT}
        intervals: Any = all_of["intervals"]
        kept["intervals"] = {name: intervals[name] for name in ("recall", "auroc")}
        found[code] = {**kept, "rows": int(has.sum()), **named.get(code, {})}
    return {"categories": naming, "by_category": found}


def _naming(
    rows: Sequence[Labelled], scores: Scores
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    truth, guess, columns = first_named(rows, scores)
    of, hits = len(truth), int((truth == guess).sum())
    f1, present = named_f1(truth, guess, len(columns), np.ones((1, of)))
    macro = float(f1[0, present].mean()) if of else np.nan
    drawn = [
        named_f1(truth, guess, len(columns), weights)[0][:, present].mean(axis=1)
        for weights in resamples(truth)
    ]
    lines = np.concatenate(drawn) if drawn else np.zeros(0)
    whole = {
        "rows": of,
        "accuracy": hits / of if of else np.nan,
        "macro_f1": macro,
        "intervals": {"accuracy": wilson(hits, of), "macro_f1": interval(macro, lines)},
    }
    each = {
        columns[at]: {"named_rows": int((truth == at).sum()), "named_f1": float(f1[0, at])}
        for at in np.flatnonzero(present)
    }
    return whole, each


def first_named(rows: Sequence[Labelled], scores: Scores) -> tuple[Ints, Ints, tuple[str, ...]]:
    """Columns of the true and of the first-named code, of unsafe rows with codes; the columns."""
    known = {code for row in rows for code in row.categories or ()}
    columns = (*scores.columns, *sorted(known - {*scores.columns}, key=_key))
    truth, guess = [], []
    for row, shares in zip(rows, scores.codes, strict=True):
        if row.unsafe and row.categories:
            said = columns[int(shares.argmax())]
            real = said if said in row.categories else row.categories[0]
            truth.append(columns.index(real))
            guess.append(columns.index(said))
    return np.array(truth, np.int64), np.array(guess, np.int64), columns


def named_f1(truth: Ints, guess: Ints, codes: int, weights: Floats) -> tuple[Floats, Bools]:
    """F1 of each code [lines, codes] for weights [lines, rows], and which codes have rows."""
    every = np.arange(codes)
    real = truth[:, None] == every  # [rows, codes]
    said = guess[:, None] == every
    both = weights @ (real & said)
    return 2 * both / np.maximum(weights @ real + weights @ said, 1), real.any(axis=0)


def _key(code: str) -> tuple[str, int, str]:
    digits = code.lstrip("S")
    return (code[:1], int(digits) if digits.isdecimal() else 0, code)
