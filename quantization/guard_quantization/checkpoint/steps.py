"""What every step of runs costs: models side by side, each against the first, on the same rows.

Figures are taken after a Platt calibration on the dev rows, per direction and model, so that F1 at
one half compares models that were never calibrated with those that are.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from guard_quantization.data import Row
from guard_quantization.evaluation.compare import agreement, differences
from guard_quantization.evaluation.evaluate import calibrate, calibrations
from guard_quantization.evaluation.judges import judge_digest, open_judge
from guard_quantization.evaluation.kept import keep_scores
from guard_quantization.evaluation.markup import write_page
from guard_service.evaluation.figures import Floats, Judged, figures
from guard_service.evaluation.report import jsonable, labels_of

STAGES = ("prune", "distill", "export")  # whose results can be judged; codes alone cannot
SETS: Mapping[str, Callable[[Row], bool]] = {
    "dev prompts": lambda row: row.file in ("prompts_harm", "prompts_safe"),
    "dev responses": lambda row: row.file == "responses",
    "dev": lambda row: row.source != "probe",
    **{
        name: partial(lambda file, row: row.file == file, name)
        for name in ("probe_en", "probe_multi", "final_en", "final_multi")
    },
}
_SHOWN = ("auroc", "f1")


@dataclass(frozen=True, slots=True)
class Step:
    """A model by the name that tables give it: a checkpoint or artifact folder, or "starter"."""

    name: str
    place: str


def steps_of(named: Sequence[str]) -> list[Step]:
    """Steps of `FOLDER` or `NAME=FOLDER`; a run's folder stands for the stages that are done.

    Raises ValueError for two of one name.
    """
    found: list[Step] = []
    for one in named:
        name, _, place = one.rpartition("=")
        folder = Path(place)
        stages = [stage for stage in STAGES if (folder / stage / "model").is_dir()]
        name = name or folder.name
        found += [Step(f"{name} {stage}", str(folder / stage / "model")) for stage in stages]
        found += [] if stages else [Step(name, place)]
    if len({step.name for step in found}) < len(found):
        raise ValueError("two steps have one name: give others with NAME=FOLDER")
    return found


def thinned(rows: Sequence[Row], most: int) -> list[Row]:
    """At most `most` rows of each file, evenly spread; 0 takes all."""
    files: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        files[row.file].append(row)
    if not most:
        return list(rows)
    return [row for own in files.values() for row in own[:: math.ceil(len(own) / most)]]


def compare_steps(steps: Sequence[Step], rows: Sequence[Row], folder: Path) -> dict[str, Any]:
    """Figures of each step on each of SETS, ready for JSON; the first step is the reference.

    `folder` keeps scores by the model's digest: what was judged before is not judged again.
    Checkpoints are asked with the template that their config.json names. Raises ExportError,
    ArtifactError, DataError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scores = [_scores(step, rows, folder) for step in steps]
    labels = labels_of(rows)
    made: dict[str, Any] = {}
    for name, wanted in SETS.items():
        chosen = [at for at, row in enumerate(rows) if wanted(row)]
        own = [Judged(labels[chosen], one[chosen], one[chosen] >= 0.5) for one in scores]
        if chosen:
            made[name] = {
                step.name: _beside(own[0], judged) for step, judged in zip(steps, own, strict=True)
            }
    report: dict[str, Any] = jsonable({"steps": [step.name for step in steps], "sets": made})
    return report


def _scores(step: Step, rows: Sequence[Row], folder: Path) -> Floats:
    """Calibrated P(unsafe) of all rows."""
    key = judge_digest(step.place).removeprefix("sha256:")[:16]
    found = keep_scores(
        folder / f"scores-{key}.jsonl", rows, partial(open_judge, step.place), step.name
    )
    dev = [at for at, row in enumerate(rows) if row.source != "probe"]
    fitted = calibrations([rows[at] for at in dev], found.unsafe[dev])
    return calibrate(rows, found.unsafe, fitted)


def _beside(reference: Judged, judged: Judged) -> dict[str, Any]:
    paired = differences(reference, judged)
    return {
        **figures(judged),
        "against_first": {name: paired[name] for name in _SHOWN},
        "agreement": agreement(reference, judged)["agreement"],
    }


def page(report: Mapping[str, Any]) -> str:
    """Tables in Markdown: a set each, AUROC and F1 in points, with 95 % intervals."""
    parts = []
    for name, steps in report["sets"].items():
        first = next(iter(steps.values()))
        parts.append(f"### {name} ({first['safe']} safe, {first['unsafe']} unsafe)\n")
        parts.append("| step | AUROC | against the first | F1 | agreement with the first |")
        parts.append("|---|---:|---:|---:|---:|")
        for step, figure in steps.items():
            difference = figure["against_first"]["auroc"]
            told = (
                _with_interval(figure["auroc"], figure["intervals"].get("auroc")),
                _with_interval(difference["difference"], difference["interval"], "+"),
                _with_interval(figure["f1"], figure["intervals"].get("f1")),
                f"{100 * figure['agreement']:.1f}",
            )
            parts.append(f"| {step} | {' | '.join(told)} |")
        parts.append("")
    return "\n".join(parts)


def _with_interval(
    value: float | None, interval: Sequence[float | None] | None, sign: str = ""
) -> str:
    if value is None or math.isnan(value):
        return ""
    told = f"{100 * value:{sign}.1f}"
    ends = [end for end in interval or () if end is not None and not math.isnan(end)]
    if len(ends) < 2:
        return told
    return f"{told} ({100 * ends[0]:{sign}.1f} to {100 * ends[1]:{sign}.1f})"


def write_steps(folder: Path, report: Mapping[str, Any]) -> Path:
    """steps.json and steps.md; the path of the latter."""
    for name, content in (("steps.json", json.dumps(report, indent=1)), ("steps.md", page(report))):
        write_page(folder / name, content)
    return folder / "steps.md"
