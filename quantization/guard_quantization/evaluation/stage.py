"""The evaluate stage: who judges what, what is written down, and what a build fails on.

In the folder: `scores-NAME.jsonl` of each judge (an interrupted run goes on there), `report.json`
as guardctl writes it, that of the reference, `comparison.json`, and what was fitted, as figures
(`fitted.json`) and as a piece of a policy (`thresholds.yaml`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from guard_quantization.data import Row, probe_rows, sample_epoch
from guard_quantization.evaluation.compare import compare
from guard_quantization.evaluation.evaluate import Judge
from guard_quantization.evaluation.kept import keep_scores
from guard_quantization.evaluation.plan import EvaluatePlan
from guard_quantization.evaluation.thresholds import Aim, fit_thresholds, fitted, policy_fragment
from guard_quantization.recipe import shares
from guard_service.evaluation.figures import Judged, figures, values
from guard_service.evaluation.gate import Limits, Violation, violations
from guard_service.evaluation.report import evaluate, jsonable, labels_of
from guard_service.evaluation.rows import DataError
from guard_service.evaluation.scores import Scores

MODEL, REFERENCE = "model", "reference"  # names of judges
REPORT, REFERENCE_REPORT = "report.json", "reference.json"
COMPARISON, FITTED, THRESHOLDS = "comparison.json", "fitted.json", "thresholds.yaml"
_PROBE = "probe"  # the source of rows of the packaged sets


@dataclass(frozen=True, slots=True)
class Chosen:
    """Rows that are judged; which of them figures are of, and on which thresholds are fitted."""

    rows: list[Row]
    reported: list[int]
    fit: list[int]

    @property
    def digest(self) -> str:
        """Of all that figures depend on."""
        said = [(row.id, row.turns, row.unsafe, row.categories, row.file) for row in self.rows]
        return hashlib.sha256(repr((said, self.reported, self.fit)).encode()).hexdigest()


def choose_rows(rows: Iterable[Row], plan: EvaluatePlan, seed: int = 0) -> Chosen:
    """The rows of a plan, in an order that depends on both alone. Raises DataError for none."""
    wanted = [row for row in rows if row.split in {plan.split, plan.fit}]
    if plan.rows:
        drawn = sample_epoch(wanted, shares(plan.rows), seed)
        kept = {(row.file, row.id) for row, _ in drawn}
        wanted = [row for row in wanted if (row.file, row.id) in kept]
    if not any(row.split == plan.split for row in wanted):
        raise DataError(f"no row of split {plan.split!r} to evaluate on")
    wanted += probe_rows() if plan.probe else []
    reported = [
        at for at, row in enumerate(wanted) if row.split == plan.split or row.source == _PROBE
    ]
    fit = [at for at, row in enumerate(wanted) if plan.fit and row.split == plan.fit]
    return Chosen(wanted, reported, fit)


def evaluate_model(
    folder: Path, plan: EvaluatePlan, chosen: Chosen, judges: Mapping[str, Callable[[], Judge]]
) -> dict[str, Any]:
    """Let every judge judge the rows, and write all files of the stage; figures for its record.

    `judges` has MODEL, and REFERENCE if there is one; others are steps on the way to the model.
    """
    rows = [chosen.rows[at] for at in chosen.reported]
    said: dict[str, Scores] = {}
    for name, opened in judges.items():
        kept = folder / f"scores-{name}.jsonl"
        said[name] = keep_scores(kept, chosen.rows, opened, f"judge with {name}")
    shown = {name: scores.take(chosen.reported) for name, scores in said.items()}
    for name, file in ((MODEL, REPORT), (REFERENCE, REFERENCE_REPORT)):
        if name in shown:
            _write(folder / file, evaluate(rows, shown[name], plan.threshold))
    told: dict[str, Any] = {
        "rows": len(rows),
        "accuracy": {name: _values(rows, one, plan.threshold) for name, one in shown.items()},
    }
    if REFERENCE in shown:
        found = compare(rows, shown[REFERENCE], shown[MODEL], plan.threshold)
        _write(folder / COMPARISON, found)
        told["agreement"] = found["verdicts"]["agreement"]
        told["unsafe_score"] = found["unsafe_score"]
    if chosen.fit:
        made = fit_languages(chosen, said[MODEL], plan)
        _write(folder / FITTED, made)
        (folder / THRESHOLDS).write_text(made["policy"], "utf-8")
        told["fitted"] = {key: made[key] for key in ("measured_on", "as_it_is", "with_fits")}
    plain: dict[str, Any] = jsonable(told)
    return plain


def fit_languages(chosen: Chosen, scores: Scores, plan: EvaluatePlan) -> dict[str, Any]:
    """Temperatures and thresholds of each direction and language, and what they come to.

    Measured on reported rows that nothing was fitted on where these have both labels, else on the
    rows of the fit; `measured_on` says which.
    """
    judged = {*scores.judged()}
    fit = [at for at in chosen.fit if at in judged]
    aim = Aim(plan.fpr, plan.least_rows)
    fits = fit_thresholds([chosen.rows[at] for at in fit], scores.unsafe[fit], aim)
    fitted_on = {*fit}
    others = [at for at in chosen.reported if at in judged and at not in fitted_on]
    apart = len({chosen.rows[at].unsafe for at in others}) == 2
    measured = others if apart else fit
    rows, unsafe = [chosen.rows[at] for at in measured], scores.unsafe[measured]
    plainly = Judged(labels_of(rows), unsafe, unsafe >= plan.threshold)
    return {
        "aim": asdict(aim),
        "fits": [{**asdict(fit), "direction": fit.direction.value} for fit in fits],
        "policy": policy_fragment(fits, aim),
        "measured_on": "rows that were not fitted on" if apart else "the rows they were fitted on",
        "as_it_is": figures(plainly),
        "with_fits": figures(fitted(rows, unsafe, fits, plan.threshold)),
    }


def broken_limits(folder: Path, limits: Limits) -> list[Violation]:
    """Which limits the results in a stage's folder do not keep."""
    report, reference, compared = (
        read(folder, name) for name in (REPORT, REFERENCE_REPORT, COMPARISON)
    )
    agreement = compared["verdicts"]["agreement"] if compared else None
    return violations(limits, report or {}, reference, agreement)


def read(folder: Path, name: str) -> dict[str, Any] | None:
    """A JSON file of a stage's folder; None where it has none."""
    path = folder / name
    found: dict[str, Any] | None = json.loads(path.read_text("utf-8")) if path.exists() else None
    return found


def _values(rows: Sequence[Row], scores: Scores, threshold: float) -> dict[str, float]:
    judged = scores.judged()
    own = scores.take(judged)
    labels = labels_of([rows[at] for at in judged])
    return values(Judged(labels, own.unsafe, own.verdicts(threshold)))


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(jsonable(content), indent=1) + "\n", "utf-8")
