"""Thresholds fitted on dev rows, by direction and language, written as a piece of a policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from guard_policies.assessment import Direction
from guard_policies.schema import DEFAULT_THRESHOLD, MIN_THRESHOLD, normal_tag
from guard_quantization.evaluation.evaluate import fit_temperature
from guard_service.evaluation.figures import Floats, Judged
from guard_service.evaluation.report import labels_of
from guard_service.evaluation.rows import Labelled

Bools = NDArray[np.bool_]
_DIGITS = 6


@dataclass(frozen=True, slots=True)
class Aim:
    """What a threshold is fitted to. `fpr` None: the best F1."""

    fpr: float | None = None
    least_rows: int = 50  # of each class that the aim needs, below which a language has no own


@dataclass(frozen=True, slots=True)
class Fit:
    """A threshold and what it comes to on the rows it was fitted on. `language` "": all of them.

    `threshold` None: too few rows. `temperature` is of the scores as they are: 1 is calibrated.
    """

    direction: Direction
    language: str
    safe: int
    unsafe: int
    threshold: float | None
    f1: float = math.nan
    recall: float = math.nan
    fpr: float = math.nan
    temperature: float = math.nan


def fit_thresholds(rows: Sequence[Labelled], scores: Floats, aim: Aim) -> list[Fit]:
    """For each direction, all its rows first, then each language."""
    found = []
    labels = labels_of(rows)
    ways = np.array([row.direction.value for row in rows], object)
    tags = np.array([normal_tag(row.language) for row in rows], object)
    for way in Direction:
        own = ways == way.value
        for tag in ("", *sorted(set(tags[own]) - {""})):
            chosen = own if not tag else own & (tags == tag)
            found.append(_fit(way, tag, labels[chosen], scores[chosen], aim))
    return found


def _fit(way: Direction, tag: str, labels: Bools, scores: Floats, aim: Aim) -> Fit:
    safe, unsafe = int((~labels).sum()), int(labels.sum())
    needed = safe if aim.fpr is not None else min(safe, unsafe)
    if needed < aim.least_rows:
        return Fit(way, tag, safe, unsafe, None)
    at = best_f1(labels, scores) if aim.fpr is None else at_most_fpr(labels, scores, aim.fpr)
    fired = scores >= at
    hits, wrong = int((fired & labels).sum()), int((fired & ~labels).sum())
    return Fit(
        direction=way,
        language=tag,
        safe=safe,
        unsafe=unsafe,
        threshold=at,
        f1=2 * hits / (hits + wrong + unsafe) if unsafe else math.nan,
        recall=hits / unsafe if unsafe else math.nan,
        fpr=wrong / safe if safe else math.nan,
        temperature=1 / fit_temperature(labels, scores).scale if safe and unsafe else math.nan,
    )


def at_most_fpr(labels: Bools, scores: Floats, fpr: float) -> float:
    """The lowest threshold at which at most the share `fpr` of safe rows fire.

    1 when even that is too low, since no policy has a higher one. There must be safe rows.
    """
    safe = np.sort(scores[~labels])[::-1]
    allowed = int(fpr * len(safe) + 1e-9)
    if allowed >= len(safe):
        return MIN_THRESHOLD
    first_out = float(safe[allowed])
    near = round(first_out, _DIGITS)
    return _clipped(near if near > first_out else round(near + 10.0**-_DIGITS, _DIGITS))


def best_f1(labels: Bools, scores: Floats) -> float:
    """The threshold with the best F1, midway to the next lower score; both classes must be there.

    Of several that are equally good the highest.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, hit = scores[order], labels[order]
    ends = np.flatnonzero(np.r_[np.diff(ranked) != 0, True])
    true, fired = hit.cumsum()[ends], ends + 1
    f1 = 2 * true / (fired + labels.sum())
    best = int(f1.argmax())
    high = float(ranked[ends[best]])
    low = float(ranked[ends[best + 1]]) if best + 1 < len(ends) else 0.0
    middle = round((high + low) / 2, _DIGITS)
    return _clipped(middle if low < middle <= high else high)


def _clipped(threshold: float) -> float:
    return min(1.0, max(MIN_THRESHOLD, threshold))


def fitted(
    rows: Sequence[Labelled], scores: Floats, fits: Sequence[Fit], otherwise: float
) -> Judged:
    """What the fits make of rows: scores at their temperature, verdicts by their threshold.

    A language without its own has that of the whole direction, and without that the scores stay
    and `otherwise` is the threshold. Verdicts are of the scores as they are, as a policy has it.
    """
    by = {(fit.direction, fit.language): fit for fit in fits if fit.threshold is not None}
    limits, temperatures = np.full(len(rows), otherwise), np.ones(len(rows))
    for at, row in enumerate(rows):
        way = row.direction
        fit = by.get((way, normal_tag(row.language))) or by.get((way, ""))
        if fit and fit.threshold is not None:
            limits[at] = fit.threshold
            temperatures[at] = 1.0 if math.isnan(fit.temperature) else fit.temperature
    clipped = np.clip(scores, 1e-9, 1 - 1e-9)
    tempered = 1 / (1 + np.exp(-np.log(clipped / (1 - clipped)) / temperatures))
    return Judged(labels_of(rows), tempered, scores >= limits)


def policy_fragment(fits: Sequence[Fit], aim: Aim) -> str:
    """The thresholds as YAML for a policy file, below its name and version.

    A language without a threshold of its own has that of the whole, and a comment says so.
    """
    document: dict[str, Any] = {}
    for fit in fits:
        if not fit.language:
            at = DEFAULT_THRESHOLD if fit.threshold is None else fit.threshold
            document[fit.direction.value] = {"threshold": at}
    languages: dict[str, Any] = {}
    for fit in fits:
        if fit.language and fit.threshold is not None:
            own = languages.setdefault(fit.language, {})
            own[fit.direction.value] = {"threshold": fit.threshold}
    if languages:
        document["languages"] = languages
    aimed = "the best F1" if aim.fpr is None else f"a false positive rate of at most {aim.fpr:g}"
    lines = [f"# Fitted on dev rows to {aimed}.", *map(_comment, fits)]
    return "\n".join(lines) + "\n" + yaml.safe_dump(document, sort_keys=False)


def _comment(fit: Fit) -> str:
    name = f"{fit.direction.value} {fit.language!r}" if fit.language else fit.direction.value
    rows = f"# {name}: {fit.safe} safe, {fit.unsafe} unsafe"
    if fit.threshold is None:
        return f"{rows}: too few to fit"
    parts = {"F1": fit.f1, "recall": fit.recall, "FPR": fit.fpr, "temperature": fit.temperature}
    shown = (f"{key} {value:.3f}" for key, value in parts.items() if not math.isnan(value))
    return f"{rows}: {', '.join(shown)}"
